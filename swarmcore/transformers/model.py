"""Models of Transformers' own classes whose blocks are elsewhere."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import torch
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel

from swarmcore.client.autograd.remote_blocks import RemoteBlocks
from swarmcore.errors import InputError, InvalidBatchError
from swarmcore.training.batch_checks import IGNORED, check_sequence_labels, check_token_labels, problem_of
from swarmcore.training.training_modes import NoActivationCheckpointing, note_dropout
from swarmcore.transformers.base_model import make_remote, rows_wanted
from swarmcore.transformers.cache import RemoteCache
from swarmcore.transformers.forward_options import check_options
from swarmcore.transformers.peft_layers import check_injected, using_layers
from swarmcore.transformers.saving import save_parts, save_trained
from swarmcore.transformers.stack import RemoteStack

DEFAULT_NEW_TOKENS = 20
"""How many Transformers generates where nobody names a limit."""


class RemoteModelMixin(NoActivationCheckpointing, PreTrainedModel):  # type: ignore[misc]
    """What a family's class is given when its blocks are remote; see `remote_model`.

    Embeddings, final norm and head are here, frozen unless they are new; ``requires_grad_()`` thaws them.
    Close the model, or use it as a context manager, to free what it has on servers.
    """

    stack: RemoteStack

    @property
    def blocks(self) -> RemoteBlocks:
        """The remote blocks as a module; ``blocks[3:7]`` are some of them."""
        return self.stack.blocks

    def new_cache(self, expected_tokens: int = 0) -> RemoteCache:
        """An empty cache, to be passed as ``past_key_values``."""
        with using_layers(self):
            return self.stack.new_cache(expected_tokens)

    def close(self) -> None:
        """Free the caches on servers, and leave the swarm unless it was passed in. Harmless when repeated."""
        self.stack.close()

    # --- what PEFT and Trainer ask of a model -----------------------------------------------------------

    @property
    def peft_config(self) -> dict[str, Any]:
        """PEFT's configs of the adapters that it has put on the layers, by their names."""
        try:
            return cast(dict[str, Any], self.__dict__["_peft_config"])
        except KeyError:
            raise AttributeError("peft_config") from None

    @peft_config.setter
    def peft_config(self, configs: dict[str, Any]) -> None:
        # PEFT says here what it has done to the layers.
        check_injected(self, configs)
        self.__dict__["_peft_config"] = configs

    @peft_config.deleter
    def peft_config(self) -> None:
        self.__dict__.pop("_peft_config", None)

    def train(self, mode: bool = True) -> Self:
        """As any module's; says once that dropout inside of the blocks is left out."""
        if mode:
            note_dropout(self.config)
        return cast(Self, super().train(mode))

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        **options: Any,
    ) -> None:
        """Write the local parameters that can be trained, and which model they belong to.

        Where `add_adapter` or `load_adapter` has put an adapter on the layers: that, in PEFT's format.

        ``from_pretrained(save_directory, bootstrap=…)`` of the same automatic class reads them. There is no
        config.json in the folder, so that nobody takes it for a whole model. ``state_dict`` has the values
        where they are not the model's own. Raise `InputError` when nothing here can be trained or for
        ``push_to_hub``, and `StorageError` when the disk refuses; other ``options`` make no difference.
        """
        if options.get("push_to_hub"):
            raise InputError("leave out push_to_hub: save to a folder, and upload that")
        if not is_main_process:
            return
        if self._hf_peft_config_loaded:
            super().save_pretrained(save_directory, state_dict=state_dict, **options)
            save_trained(self, Path(save_directory), state_dict)  # Trainer goes on from it
        else:
            save_parts(self, self.stack.model, Path(save_directory), state_dict)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


class RemoteGenerationMixin(RemoteModelMixin, GenerationMixin):  # type: ignore[misc]
    """Of a family's class for language models."""

    def init_continuous_batching(self, *args: Any, **options: Any) -> Any:
        """Raise `InputError`: servers batch what all their clients generate."""
        raise InputError(
            "leave out continuous batching (generate_batch), which keeps attention caches here: servers "
            "batch what their clients generate; call generate() with a padded batch, or in several threads"
        )

    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As Transformers', over a session that is closed at the end, unless the cache is returned."""
        if kwargs.get("cache_implementation") is not None:
            raise InputError("leave out cache_implementation: the attention caches are the servers' business")
        config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
        config = config or self.generation_config
        wanted = kwargs.get("use_cache")
        if wanted is None:
            wanted = config.use_cache
        if kwargs.get("past_key_values") is not None or wanted is False:
            return super().generate(*args, **kwargs)
        kwargs["past_key_values"] = cache = self.new_cache(_expected_tokens(args, kwargs, config))
        output = None
        try:
            output = super().generate(*args, **kwargs)
        finally:
            if getattr(output, "past_key_values", None) is not cache:
                cache.close()
        return output


def remote_model(model: PreTrainedModel, stack: RemoteStack) -> RemoteModelMixin:
    """Turn a model without layers into one whose layers are those of ``stack``; its class is a subclass.

    Raise `UnsupportedModelError` for a family without a final norm of a known name.
    """
    make_remote(model, stack)
    remote = cast(Any, model)
    remote.__class__ = _remote_class(cast(Any, type(model)))
    remote.stack = stack
    return cast(RemoteModelMixin, remote)


@functools.cache
def _remote_class(family: Any) -> type[RemoteModelMixin]:
    signature = inspect.signature(family.forward)

    @functools.wraps(family.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        check_options(self.config, given, signature.parameters)
        if given.get("output_hidden_states") is None and self.config.output_hidden_states:
            kwargs["output_hidden_states"] = True
        if given.get("use_cache") is None and not getattr(self.config, "use_cache", True):
            kwargs["use_cache"] = False  # the base model has a config of its own
        keep = given.get("logits_to_keep", 0)
        if given.get("labels") is not None:
            _check_labels(self, given)
            _check_trainable(self, given.get("inputs_embeds"))
        last_only = isinstance(keep, int) and keep == 1
        padding = _predicted_from_padding(self, given) and not last_only
        with rows_wanted(last_only=last_only, padding=padding):
            return family.forward(self, *args, **kwargs)

    mixin = RemoteGenerationMixin if issubclass(family, GenerationMixin) else RemoteModelMixin
    # Under the family's own name: Trainer and pipelines look up by it what a model does.
    return type(family.__name__, (mixin, family), {"forward": forward, "__module__": __name__})


def _expected_tokens(args: tuple[Any, ...], kwargs: dict[str, Any], config: Any) -> int:
    """What the sequences of a generation are expected to grow to."""
    new = kwargs.get("max_new_tokens") or config.max_new_tokens  # it takes precedence
    length = kwargs.get("max_length") or config.max_length
    if length and not new:
        return int(length)
    names = ("input_ids", "inputs", "inputs_embeds")
    prompt = args[0] if args else next((kwargs[n] for n in names if kwargs.get(n) is not None), None)
    return int(new or DEFAULT_NEW_TOKENS) + (prompt.shape[1] if prompt is not None else 0)


def _predicted_from_padding(model: Any, given: Mapping[str, Any]) -> bool:
    """Whether a label is compared to what is predicted from padding before a sequence, as a sequence's first
    one is. Without labels: whether it may be.

    Raise `InvalidBatchError` where one is for padding behind a sequence, or for that of a deep prompt.
    """
    mask, labels, shifted = given.get("attention_mask"), given.get("labels"), given.get("shift_labels")
    if not isinstance(model, GenerationMixin) or not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        return False
    if (labels is None and shifted is None) or not isinstance(given.get("logits_to_keep", 0), int):
        return True
    if shifted is None:
        shifted = functional.pad(cast(torch.Tensor, labels), (0, 1), value=IGNORED)[:, 1:]
    real = mask[:, -shifted.shape[1] :].to(shifted.device) != 0
    if real.shape != shifted.shape:
        return True  # the base model says what is wrong with it
    at_padding = (shifted != IGNORED) & ~real
    before = real.long().cumsum(1) == 0
    if (at_padding & ~before).any():
        raise InvalidBatchError(
            f"labels at padding behind a sequence: servers are sent none of it, and so nothing is predicted "
            f"from it; set them to {IGNORED}"
        )
    wanted = bool(at_padding.any())
    if wanted and model.stack.prefix_tokens:
        raise InvalidBatchError(
            f"the first label of a sequence behind padding would be predicted from padding, which sees no "
            f"deep prompt here: set it to {IGNORED}, or pad at the right"
        )
    return wanted


def _check_trainable(model: Any, embeds: torch.Tensor | None) -> None:
    """Raise `InputError` for a step of training in which nothing can be trained."""
    if not model.training or not torch.is_grad_enabled() or model.stack.adapter is not None:
        return
    if not any(p.requires_grad for p in model.parameters()) and (embeds is None or not embeds.requires_grad):
        raise InputError(
            "there is nothing to train: the blocks' weights are the servers', and every parameter here is "
            "frozen; put an adapter on the model (peft.get_peft_model(model, LoraConfig(…)), "
            "swarmcore.training.lora_tuning), or thaw a part of it with requires_grad_()"
        )


def _check_labels(model: Any, given: Mapping[str, Any]) -> None:
    """Raise `InvalidBatchError` for labels that are no labels of these inputs."""
    labels, ids, embeds = given["labels"], given.get("input_ids"), given.get("inputs_embeds")
    inputs = ids if ids is not None else embeds
    if inputs is None:
        return  # the base model says what is missing
    batch, length = inputs.shape[:2]
    if isinstance(model, GenerationMixin):
        keep = given.get("logits_to_keep", 0)
        rows = min(keep, length) or length if isinstance(keep, int) else len(keep)
        check_token_labels(labels, (batch, rows), model.get_output_embeddings().weight.shape[0])
    else:
        problem = model.config.problem_type or problem_of(labels, model.num_labels)
        check_sequence_labels(labels, batch, model.num_labels, problem)
