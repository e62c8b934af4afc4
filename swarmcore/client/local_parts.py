"""The part of a model that the client owns: embeddings, final norm and head, without a single block."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from swarmcore.client.blockless import load_without_blocks
from swarmcore.imports import import_large

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from swarmcore.executor.torch.checkpoint import Checkpoint, Progress
    from swarmcore.executor.torch.structure import Structure


class LocalParts:
    """Turns token ids into the hidden states that go into the first block, and those that come out of the
    last one into logits, exactly as the model's own transformers class does.

    Whatever the family does there (position embeddings, embedding norms and multipliers, logit scaling and
    soft-capping) is done by its own code: the model is built with no layers at all. Not safe for use by
    several threads at once.
    """

    def __init__(self, model: PreTrainedModel, structure: Structure) -> None:
        """``model`` has no blocks; ``structure`` says where they would be."""
        base = cast(Any, model.get_submodule(structure.base))
        after = nn.Sequential(*(base.get_submodule(name) for name in structure.after))
        for name in structure.after:
            module = base.get_submodule(name)
            setattr(base, name, _FirstCall(module) if name in structure.twice else nn.Identity())
        model.set_submodule(structure.base, _AfterBlocks(after))
        self.config: PretrainedConfig = model.config
        # Not the model's: some families keep their norms in float32.
        self.dtype: torch.dtype = base.get_input_embeddings().weight.dtype
        self.hidden_size = int(model.config.hidden_size)
        self.vocab_size = int(model.config.vocab_size)
        self.max_positions = _max_positions(model.config)
        """Positions that the model was made for; None when its config names no limit."""
        self._embedding_model = base
        self._head_model = model
        self._lookup = self._plain_lookup()

    def __repr__(self) -> str:
        return f"<LocalParts {self.config.model_type} {self.vocab_size} x {self.hidden_size} {self.dtype}>"

    @classmethod
    def load(
        cls, checkpoint: Checkpoint, *, dtype: str = "auto", progress: Progress | None = None
    ) -> LocalParts:
        """Read embeddings, final norm and head from ``checkpoint``, and nothing else.

        ``dtype`` is ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"`` for the checkpoint's own (but
        not float16, at which CPUs are slow). Raise `InputError` for another, `CheckpointError` when one of
        the tensors is missing or has the wrong shape, `UnsupportedModelError` when the family is not a causal
        language model that transformers knows, or `self_test` finds that it would compute something else.
        """
        cls.check(checkpoint)
        return cls._load(checkpoint, dtype=dtype, progress=progress)

    @classmethod
    def check(cls, checkpoint: Checkpoint) -> None:
        """Raise `UnsupportedModelError` when it does not pass the self-test. Looks at the config alone."""
        import_large("transformers.modeling_utils")
        from swarmcore.client.self_test import check_parts

        check_parts(checkpoint, functools.partial(cls._load, dtype="float32", progress=None))

    @classmethod
    def _load(cls, checkpoint: Checkpoint, *, dtype: str, progress: Progress | None) -> LocalParts:
        from transformers import AutoModelForCausalLM

        model, structure = load_without_blocks(
            checkpoint,
            AutoModelForCausalLM.from_config,
            what="causal language model",
            dtype=dtype,
            progress=progress,
        )
        return cls(model, structure)

    @torch.inference_mode()
    def embed(self, ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """What goes into the first block for these tokens: ``[tokens, hidden size]`` in `dtype`.

        The tokens may be of any sequences, in any order; ``positions`` are their places in them. Ids must be
        in the vocabulary and positions below `max_positions`.
        """
        if self._lookup is not None:
            return cast(torch.Tensor, self._lookup(torch.tensor(ids)))
        return self._embed_with_base(ids, positions)

    @torch.inference_mode()
    def enter(self, embeddings: torch.Tensor, positions: Sequence[int]) -> torch.Tensor:
        """As `embed`, of embeddings ``[tokens, hidden size]`` that are no token's, as in a soft prompt."""
        output = self._embedding_model(
            inputs_embeds=embeddings.detach().to("cpu", self.dtype)[:, None],
            position_ids=torch.tensor(positions)[:, None],
            use_cache=False,
        )
        return cast(torch.Tensor, output.last_hidden_state[:, 0])

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[rows, hidden size]`` from the last block to ``[rows, vocabulary]`` in float32."""
        output = self._head_model(inputs_embeds=hidden.to(self.dtype)[None], use_cache=False)
        return cast(torch.Tensor, output.logits[0].float())

    def _embed_with_base(self, ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        # Every token is a batch row of its own, so that no attention mask above 1 by 1 is ever made.
        output = self._embedding_model(
            input_ids=torch.tensor(ids)[:, None],
            position_ids=torch.tensor(positions)[:, None],
            use_cache=False,
        )
        return cast(torch.Tensor, output.last_hidden_state[:, 0])

    @torch.inference_mode()
    def _plain_lookup(self) -> nn.Module | None:
        """The embedding module, when in this family it is all that happens before the first block.

        It takes 10 µs a call where the base model's forward, with its masks and rotary tables, takes 150.
        """
        lookup = self._embedding_model.get_input_embeddings()
        # Whole numbers: torch's default dtype is bfloat16 while another thread loads a model in that.
        ids = [step * (self.vocab_size - 1) // 7 for step in range(8)]
        positions = [step * (min(self.max_positions or 64, 64) - 1) // 7 for step in range(8)]
        same = torch.equal(lookup(torch.tensor(ids)), self._embed_with_base(ids, positions))
        return cast(nn.Module, lookup) if same else None


class _FirstCall(nn.Module):
    """In place of a module that is called before and after the blocks: does nothing the second time."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self._first = False

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self._first = not self._first
        return cast(torch.Tensor, self.module(hidden)) if self._first else hidden


class _AfterBlocks(nn.Module):
    """Takes the base model's place before the head: does what that does after its last block."""

    def __init__(self, after: nn.Module) -> None:
        super().__init__()
        self.after = after

    def forward(self, *args: Any, inputs_embeds: torch.Tensor, **kwargs: Any) -> _BaseOutput:
        return _BaseOutput(self.after(inputs_embeds))


class _BaseOutput:
    """What a head may read of a base model's output: the hidden states; the rest is None, in any family."""

    def __init__(self, last_hidden_state: torch.Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getitem__(self, index: int) -> torch.Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _max_positions(config: PretrainedConfig) -> int | None:
    limit = getattr(config, "max_position_embeddings", None)
    return int(limit) if limit else None
