"""What a model computes when it runs whole, in the family's own classes: what ours has to agree with.

The model has the checkpoint's config, made small, and random weights. It is at the same time a checkpoint in
memory, so that what serves real checkpoints can be loaded from it.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

from swarmcore.checkpoint import Checkpoint
from swarmcore.checkpoint.quiet import quiet_transformers
from swarmcore.checkpoint.storage import gigabytes
from swarmcore.errors import CheckpointError, UnsupportedModelError
from swarmcore.executor.torch.partial_model import build_on_meta, find_base, layer_list
from swarmcore.executor.torch.small_config import VOCABULARY, small_config
from swarmcore.types import ModelInfo, Progress

LARGEST = 512 * 2**20
"""Most bytes that the tensors of a small model may take; usually it is a hundredth of that."""
LENGTHS = (13, 10)
"""Tokens of the two sequences: past all windows and chunks, on which they end at different places."""


class Reference(Checkpoint):
    """A small random model of a checkpoint's kind, and what it computes for two sequences of tokens."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Takes some tens of milliseconds. Raise `UnsupportedModelError` for a model that cannot be run."""
        self.name, self.folder = checkpoint.name, Path()
        own = checkpoint.config.get_text_config(decoder=True)
        self.config = own
        try:
            self.config = text = small_config(own)
        except Exception as exc:  # some configs have values for each layer in place of one
            self._refuse(exc)
        self.info = ModelInfo(
            checkpoint.name, checkpoint.info.fingerprint, text.num_hidden_layers, text.hidden_size
        )
        generator = torch.Generator().manual_seed(0)
        self.ids = [
            torch.randint(3, min(VOCABULARY, text.vocab_size), (length,), generator=generator)
            for length in LENGTHS
        ]
        self.hidden: list[list[torch.Tensor]] = []
        """For each sequence what goes into each block, and out of the last: ``[tokens, hidden size]``."""
        self.logits: list[torch.Tensor] = []
        """For each sequence, ``[tokens, vocabulary]``."""
        self.model = self._build(generator)
        """The text model."""
        self._tensors = _without_twins(self.model)
        try:
            whole = _around(checkpoint.config, text, self.model)
            for ids in self.ids:
                self._run(whole, find_base(self.model)[1], ids)
        except UnsupportedModelError:
            raise
        except Exception as exc:  # any code of the family's
            self._refuse(exc)

    def _build(self, generator: torch.Generator) -> Any:
        empty = build_on_meta(self.config)
        size = sum(tensor.numel() for tensor in empty.state_dict().values()) * torch.float32.itemsize
        if size > LARGEST:
            raise UnsupportedModelError(
                f"{self.name} ({self.config.model_type}) cannot be tested, and is not served untested: "
                f"a small model of its kind would still take {gigabytes(size)}"
            )
        state = {
            name: _random(name, tensor, generator)
            for name, tensor in empty.state_dict().items()
            if tensor.is_floating_point()
        }
        try:
            with quiet_transformers(lambda share: None):
                model = type(empty).from_pretrained(
                    None, config=self.config, state_dict=state, dtype=torch.float32
                )
        except Exception as exc:  # any code of the family's
            self._refuse(exc)
        return model.eval().requires_grad_(False)

    def _refuse(self, exc: Exception) -> NoReturn:
        raise UnsupportedModelError(
            f"{self.name} ({self.config.model_type}) cannot be tested, and is not served untested: "
            f"a small model of its kind fails with {exc!r}"
        ) from exc

    @torch.inference_mode()
    def _run(self, whole: Any, base: Any, ids: torch.Tensor) -> None:
        blocks = getattr(base, layer_list(base))
        hidden: list[torch.Tensor] = []

        def before(block: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            entering = args[0] if args else options["hidden_states"]
            hidden.append(entering[0].clone())

        def after(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            hidden.append((output if isinstance(output, torch.Tensor) else output[0])[0].clone())

        hooks = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
        hooks.append(blocks[-1].register_forward_hook(after))
        try:
            output = whole(input_ids=ids[None], use_cache=False, return_dict=True)
        finally:
            for hook in hooks:
                hook.remove()
        if len(hidden) != len(blocks) + 1:
            raise UnsupportedModelError(
                f"{self.name} ({self.config.model_type}) does not run its blocks once each, in order"
            )
        self.hidden.append(hidden)
        self.logits.append(output.logits[0].float())

    def names(self) -> Collection[str]:
        return self._tensors.keys()

    def nbytes(self, names: Collection[str]) -> int:
        return sum(tensor.nbytes for tensor in self.read(names).values())

    def read(self, names: Collection[str], *, progress: Progress | None = None) -> dict[str, torch.Tensor]:
        """As `Checkpoint.read`."""
        try:
            return {name: self._tensors[name].clone() for name in names}
        except KeyError as exc:
            raise CheckpointError(f"{self.name} has no tensor {exc}") from exc


def _random(name: str, tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Large enough for every part to matter; norms and other factors stay near one."""
    noise = torch.randn(tensor.shape, generator=generator)
    if tensor.dim() > 1:
        return noise * 0.1
    return noise * 0.05 if name.endswith("bias") else 1 + noise * 0.05


def _without_twins(model: Any) -> dict[str, torch.Tensor]:
    """The model's tensors, each once, as a checkpoint has them: a tied head is left out."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen or not tensor.numel():
            seen.add(tensor.data_ptr())
            tensors[name] = tensor
    return tensors


def _around(config: Any, text: Any, model: Any) -> Any:
    """``model``, or the larger one around it that ``config`` is of, with ``model`` as its part for text.

    What else is in there (towers for images and sound) is not run for text, and takes no memory.
    """
    if config.get_text_config(decoder=True) is config:
        return model
    kind = _class_of(config)
    small = _with_text_config(config, text)
    with torch.device("meta"):
        whole = kind._from_config(small)
    for part in (model, model.base_model):
        found = [path for path, module in whole.named_modules() if type(module) is type(part)]
        if len(found) == 1:
            whole.set_submodule(found[0], part)
            break
    else:
        raise UnsupportedModelError(
            f"a {kind.__name__} has another model for text than {text.model_type}, which is not served"
        )
    if whole.get_output_embeddings() is not None:
        whole.set_output_embeddings(model.get_output_embeddings())
    for module in whole.modules():  # some put inputs where the first of their tensors is
        for tensors in (module._parameters, module._buffers):
            tensors.update({key: None for key, data in tensors.items() if data is not None and data.is_meta})
    return whole.eval()


def _class_of(config: Any) -> Any:
    """The class of models that a config says it is of, or the usual one of its type."""
    named = list(getattr(config, "architectures", None) or ())
    usual = (
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    )
    named += [names[config.model_type] for names in usual if config.model_type in names]
    for name in named:
        kind = getattr(transformers, str(name), None)
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel):
            return kind
    raise UnsupportedModelError(
        f"transformers has no class for a model of type {config.model_type!r}: {named}"
    )


def _with_text_config(config: Any, text: Any) -> Any:
    whole = copy.deepcopy(config)
    own = config.get_text_config(decoder=True)
    for name, value in vars(config).items():
        if value is own:
            setattr(whole, name, text)
            return whole
    raise UnsupportedModelError(f"the text model of {config.model_type} is not a part of its config")
