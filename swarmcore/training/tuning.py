"""Models with remote blocks and something of the client's own to train: prompts, adapters, heads.

Each is an ordinary module whose only parameters are what is trained::

    model = AutoModelForCausalLM.from_pretrained("…", bootstrap=["tcp://…"])
    tuned = prompt_tuning(model, tokens=16)
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-2)
    tuned(ids, mask, labels=ids).loss.backward()
    optimizer.step()
    tuned.save("prompt")

Section 2.2 of arXiv 2312.08361.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeAlias, cast

import torch
from torch import nn
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

from swarmcore.errors import AdapterError, InputError, InvalidBatchError
from swarmcore.training.adapter import BlockAdapter
from swarmcore.training.batch_checks import IGNORED, check_token_ids, check_token_labels
from swarmcore.training.heads import ClassificationHead, SequenceClassificationHead
from swarmcore.training.lora import LoraAdapter
from swarmcore.training.peft_format import load_adapter, save_adapter
from swarmcore.training.prefix import PrefixAdapter
from swarmcore.training.prompt import SoftPrompt
from swarmcore.training.trainer_interface import TrainerInterface

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TunedOutput: TypeAlias = CausalLMOutputWithPast | SequenceClassifierOutput | TokenClassifierOutput


class TunedModel(TrainerInterface):
    """A remote language model with a soft prompt, an adapter of its blocks, a head, or several of them.

    ``model`` is one of `swarmcore.transformers.AutoModelForCausalLM`; it is shared, not changed and not
    closed: any number of tuned models, and their copies, may use one. It is no submodule, so that
    `parameters` and `state_dict` have what is trained and nothing else. With a ``head``, the model's own
    head is not used. It is a ``PreTrainedModel`` for those who ask (Transformers' ``Trainer``, TRL,
    pipelines), with the model's config and generation config.

    Raise `InputError` for another kind of model, and `AdapterError` for parts made for another one.
    """

    def __init__(
        self,
        model: Any,
        *,
        prompt: SoftPrompt | None = None,
        adapter: BlockAdapter | None = None,
        head: ClassificationHead | None = None,
    ) -> None:
        nn.Module.__init__(self)  # that of PreTrainedModel writes into the config, which is the model's
        if not hasattr(model, "stack") or model.get_output_embeddings() is None:
            raise InputError(
                f"a {type(model).__name__} cannot be tuned here; pass a model of "
                f"swarmcore.transformers.AutoModelForCausalLM.from_pretrained(name, bootstrap=[address])"
            )
        if prompt is None and adapter is None and head is None:
            raise AdapterError("there is nothing to tune: pass a prompt, an adapter or a head")
        self._model = (model,)  # in a tuple, modules do not find it
        self.prompt = prompt
        self.adapter = adapter
        self.head = head
        self._check_sizes()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo[id(self._model)] = self._model  # shared by copies too
        copied = self.__class__.__new__(self.__class__)
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    @property
    def model(self) -> Any:
        """The remote model, whose weights are frozen."""
        return self._model[0]

    @property
    def prompt_tokens(self) -> int:
        """Rows that the soft prompt takes before every sequence."""
        return 0 if self.prompt is None else self.prompt.tokens

    @property
    def _vocabulary(self) -> int:
        return len(self.model.get_input_embeddings().weight)

    def extra_repr(self) -> str:
        return f"over {self.model.stack!r}"

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **options: Any,
    ) -> TunedOutput | tuple[Any, ...]:
        """Logits, and with ``labels`` the loss, for token ids ``[batch, length]`` or their embeddings.

        ``attention_mask`` is 0 for padding, at either end of a sequence. Without a head, ``labels`` are
        ``[batch, length]`` ids, -100 where none counts, and are shifted by one as Transformers does; with
        one they are as its `loss` takes them. The logits are those of the given tokens: a soft prompt has
        none. ``options`` go to the model's own ``forward``; ``logits_to_keep`` needs ``labels`` left out, and
        ``output_hidden_states`` gives those of a soft prompt too.

        Raise `InvalidBatchError` for masks and labels of wrong shapes or values, `InputError` for what does
        not go together with a soft prompt, `AdapterError` where dropout is asked of the servers, and what
        `RemoteBlocks.forward` raises.
        """
        as_tuple = options.pop("return_dict", True) is False
        shape = self._check_inputs(input_ids, inputs_embeds, attention_mask)
        if self.head is not None and labels is not None:
            self.head.check_labels(labels, *shape)
        given = {"position_ids": position_ids, "inputs_embeds": inputs_embeds, **options}
        if self.head is None:
            output: Any = self._language(input_ids, attention_mask, labels, shape, given)
        else:
            output = self._classes(self._states(input_ids, attention_mask, **given), attention_mask, labels)
        return output.to_tuple() if as_tuple else output

    def generate(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **options: Any
    ) -> Any:
        """As Transformers' ``generate``, in all its modes, with what was tuned.

        It goes over a session of its own, which outlives servers that fail. What is returned begins with
        ``input_ids``; a soft prompt takes no place in it. Raise `InputError` where there is a head.
        """
        if self.head is not None:
            raise InputError("a model with a classification head generates no text; leave the head out")
        self._check_inputs(input_ids, None, attention_mask)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        options |= {"input_ids": input_ids, "attention_mask": mask}
        with torch.no_grad(), self._adapted():
            if self.prompt is not None:
                embeds, mask_of_both = self._enter(self.model.get_input_embeddings()(input_ids), mask)
                options |= {"inputs_embeds": embeds, "attention_mask": mask_of_both}
            return self.model.generate(**options)

    def save(self, folder: str | Path) -> None:
        """Write it in PEFT's format, over what is there; see `save_adapter`.

        Raise `AdapterError` for what PEFT has no file for: a head alone, or a prompt and an adapter together
        (save one after the other), and `StorageError` when the disk refuses.
        """
        if self.prompt is not None and self.adapter is not None:
            raise AdapterError(
                "PEFT has no file for a prompt and an adapter together: save_adapter writes each of them"
            )
        part = self.prompt or self.adapter
        if part is None:
            raise AdapterError("PEFT has no file for a head alone: save its state_dict()")
        config = self.model.config
        save_adapter(folder, part, config, head=self.head, base_model=config._name_or_path)

    @classmethod
    def load(cls, model: Any, folder: str | Path) -> Self:
        """What `save` or PEFT wrote, over ``model``; to use it, or to train it further.

        Raise `AdapterError` as `load_adapter` does.
        """
        loaded = load_adapter(folder, model.config)
        if isinstance(loaded.adapter, SoftPrompt):
            return cls(model, prompt=loaded.adapter, head=loaded.head)
        return cls(model, adapter=loaded.adapter, head=loaded.head)

    def _states(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **options: Any,
    ) -> BaseModelOutputWithPast:
        """As a base model's: hidden states after the final norm, of the given tokens."""
        shape = self._check_inputs(input_ids, inputs_embeds, attention_mask)
        with self._adapted():
            output = self.model.base_model(
                **self._inputs(input_ids, attention_mask, {"inputs_embeds": inputs_embeds} | options)
            )
        output["last_hidden_state"] = output.last_hidden_state[:, -shape[1] :]
        return cast(BaseModelOutputWithPast, output)

    def _language(
        self,
        input_ids: torch.Tensor | None,
        mask: torch.Tensor | None,
        labels: torch.Tensor | None,
        shape: tuple[int, int],
        options: dict[str, Any],
    ) -> CausalLMOutputWithPast:
        length = shape[1]
        if labels is None:
            options.setdefault("logits_to_keep", length)
        elif "logits_to_keep" in options:
            raise InputError("leave out logits_to_keep where there are labels: the loss is over all of them")
        else:
            check_token_labels(labels, shape, self._vocabulary)
            if self.prompt is not None:
                # The first token is predicted as well, after the last row of the prompt.
                options |= {"logits_to_keep": length + 1}
                labels = torch.cat([labels.new_full((len(labels), 1), IGNORED), labels], dim=1)
        with self._adapted():
            output = self.model(**self._inputs(input_ids, mask, options), labels=labels)
        return CausalLMOutputWithPast(
            loss=output.loss,
            logits=output.logits[:, -length:],
            hidden_states=output.hidden_states,
            past_key_values=output.past_key_values,
        )

    def _classes(
        self, output: Any, mask: torch.Tensor | None, labels: torch.Tensor | None
    ) -> SequenceClassifierOutput | TokenClassifierOutput:
        head = cast(Any, self.head)
        hidden = output.last_hidden_state.to(head.linear.weight.dtype)
        of_sequences = isinstance(head, SequenceClassificationHead)
        logits = head(hidden, mask) if of_sequences else head(hidden)
        loss = None if labels is None else head.loss(logits, labels)
        kind = SequenceClassifierOutput if of_sequences else TokenClassifierOutput
        return kind(loss=loss, logits=logits, hidden_states=output.hidden_states)

    def _inputs(
        self, input_ids: torch.Tensor | None, mask: torch.Tensor | None, options: dict[str, Any]
    ) -> dict[str, Any]:
        """What the model is called with: embeddings, so that nothing has to be told twice of a prompt."""
        self._check_dropout()
        embeds = options.pop("inputs_embeds", None)
        if embeds is None:
            embeds = self._embed(cast(torch.Tensor, input_ids))
        if self.prompt is not None:
            for name in ("position_ids", "token_type_ids", "past_key_values", "use_cache"):
                if options.get(name) is not None and options[name] is not False:
                    raise InputError(f"leave out {name}: a soft prompt comes first, and has no place in it")
        embeds, mask = self._enter(embeds, mask)
        return {"use_cache": False, "inputs_embeds": embeds, "attention_mask": mask} | options

    def _embed(self, input_ids: torch.Tensor) -> torch.Tensor:
        embeddings = self.model.get_input_embeddings()
        # Trainer puts noise on them by a hook that asks them whether this is training (NEFTune).
        before, embeddings.training = embeddings.training, self.training
        try:
            return cast(torch.Tensor, embeddings(input_ids))
        finally:
            embeddings.training = before

    def _check_dropout(self) -> None:
        dropout = getattr(self.adapter, "dropout", 0.0)
        if dropout and self.training and torch.is_grad_enabled():
            raise AdapterError(
                f"the adapter was made with lora_dropout={dropout}, which servers do not draw: set "
                f"adapter.dropout = 0.0 to train it further without, or call eval() to use it"
            )

    def _adapted(self) -> AbstractContextManager[None]:
        context: AbstractContextManager[None] = self.model.stack.using(self.adapter)
        return context

    def _enter(
        self, embeds: torch.Tensor, mask: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embeddings with the soft prompt before each sequence's first token, and the mask of both."""
        if self.prompt is None:
            return embeds, mask
        joined = self.prompt(embeds)
        if mask is None:
            return joined, None
        extended = self.prompt.extend_mask(mask)
        padding = (mask == 0).long().cumprod(1).sum(1, keepdim=True)  # before the first token
        columns = torch.arange(joined.shape[1], device=mask.device).expand(len(mask), -1)
        ahead, after = columns < padding, columns >= padding + self.prompt.tokens
        sources = torch.where(ahead, columns + self.prompt.tokens, columns - padding)
        sources = torch.where(after, columns, sources)
        rows = sources.to(joined.device)[..., None].expand_as(joined)
        return joined.gather(1, rows), extended.gather(1, sources)

    def _check_inputs(
        self,
        input_ids: torch.Tensor | None,
        embeds: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> tuple[int, int]:
        """Batch and length of them."""
        if (input_ids is None) == (embeds is None):
            raise InputError("pass either input_ids or inputs_embeds")
        if input_ids is not None:
            check_token_ids(input_ids, self._vocabulary)
        shape = cast(torch.Tensor, embeds if input_ids is None else input_ids).shape[:2]
        if mask is not None and mask.shape != shape and (self.prompt is not None or self.head is not None):
            raise InvalidBatchError(
                f"the attention mask must be {list(shape)} for this batch, got {list(mask.shape)}; a soft "
                f"prompt has no place in it"
            )
        return shape[0], shape[1]

    def _check_sizes(self) -> None:
        info = self.model.stack.model
        sizes = {
            "prompt": None if self.prompt is None else self.prompt.hidden_size,
            "head": None if self.head is None else self.head.linear.in_features,
        }
        for what, size in sizes.items():
            if size not in (None, info.hidden_size):
                raise AdapterError(
                    f"the {what} has the hidden size {size}, and {info.name} {info.hidden_size}: it was made "
                    f"for another model"
                )
        covered = self.adapter.covered_blocks if self.adapter is not None else ()
        if covered and covered[-1] >= info.blocks:
            raise AdapterError(
                f"the adapter is for block {covered[-1]}, and {info.name} has {info.blocks} blocks: it was "
                f"made for another model"
            )


def prompt_tuning(
    model: Any,
    tokens: int = 16,
    *,
    init_text: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    head: ClassificationHead | None = None,
    seed: int | None = None,
) -> TunedModel:
    """Train ``tokens`` embeddings that go before every sequence (arXiv 2104.08691).

    They begin as those of ``init_text``, cut or repeated to the length, which takes the ``tokenizer``; else
    as those of tokens drawn from the vocabulary. Raise `AdapterError` for less than one token.
    """
    embeddings = model.get_input_embeddings()
    if init_text is None:
        prompt = SoftPrompt.from_vocabulary(tokens, embeddings, seed=seed)
    elif tokenizer is None:
        raise InputError("init_text needs the model's tokenizer: pass tokenizer=")
    else:
        prompt = SoftPrompt.from_text(init_text, tokenizer, embeddings, tokens=tokens)
    return TunedModel(model, prompt=prompt, head=head)


def deep_prompt_tuning(
    model: Any,
    tokens: int = 8,
    *,
    std: float = 1.0,
    head: ClassificationHead | None = None,
    seed: int | None = None,
) -> TunedModel:
    """Train keys and values of ``tokens`` positions before every sequence, in every block.

    PEFT calls it prefix tuning. ``std`` as of `PrefixAdapter.for_model`. Raise `AdapterError` as that does.
    """
    adapter = PrefixAdapter.for_model(model.config, tokens=tokens, std=std, seed=seed)
    return TunedModel(model, adapter=adapter, head=head)


def lora_tuning(
    model: Any,
    targets: str | Collection[str] = ("q_proj", "v_proj"),
    rank: int = 8,
    *,
    alpha: float = 16,
    head: ClassificationHead | None = None,
    seed: int | None = None,
    **options: Any,
) -> TunedModel:
    """Train low-rank updates of the blocks' projections ``targets`` (arXiv 2106.09685).

    ``options`` are further ones of `LoraAdapter.for_model`: ``blocks``, ``rslora``, ``dtype``. Raise
    `AdapterError` as that does; for unknown targets it lists those that the blocks have.
    """
    adapter = LoraAdapter.for_model(
        model.config, targets=targets, rank=rank, alpha=alpha, seed=seed, **options
    )
    return TunedModel(model, adapter=adapter, head=head)
