"""What a client computes of a model itself: embeddings before its blocks, and logits after them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from swarmcore.client.generation.output_layer import SingleRowsByGgml, ggml_output_matrix
from swarmcore.client.generation.without_blocks import load_without_blocks
from swarmcore.errors import UnsupportedModelError
from swarmcore.executor.ggml.matrix import GgmlMatrix
from swarmcore.executor.torch.packed_linear import PackedLinear, packable
from swarmcore.executor.torch.quantized_layers import QuantizedLinear
from swarmcore.executor.torch.quantized_matrix import matrix_for
from swarmcore.executor.torch.structure import Structure
from swarmcore.imports import import_large

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from swarmcore.checkpoint import Checkpoint
    from swarmcore.executor.torch.reference import Reference
    from swarmcore.types import Progress

_SAME = 0.05
"""By how much logits may differ when the output layer is computed otherwise: ggml rounds what comes in to 8
bits where weights have fewer."""


class LocalParts:
    """Turns token ids into the hidden states that go into the first block, and those that come out of the
    last one into logits, exactly as the model's own transformers class does.

    Whatever the family does there (position embeddings, embedding norms and multipliers, logit scaling and
    soft-capping) is done by its own code: the model is built with no layers at all. Not safe for use by
    several threads at once.
    """

    def __init__(self, model: PreTrainedModel, structure: Structure) -> None:
        """``model`` has no blocks; ``structure`` says where they would be."""
        head = model.get_output_embeddings()  # not found any more without the base model
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
        self._after = after
        self._lookup = self._plain_lookup()
        self._output_layer = head
        self._head_is_one_product = False
        # A matrix that is embeddings as well is held twice then.
        if type(head) is nn.Linear and packable(head.weight):
            self._replace_output_layer(PackedLinear(head))
        self._head_is_one_product = self._is_one_product()

    def __repr__(self) -> str:
        return f"<LocalParts {self.config.model_type} {self.vocab_size} x {self.hidden_size} {self.dtype}>"

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        *,
        dtype: str = "auto",
        executor: str = "torch",
        progress: Progress | None = None,
    ) -> LocalParts:
        """Read embeddings, final norm and head from ``checkpoint``, and nothing else.

        ``dtype`` is ``"float32"``, ``"bfloat16"``, ``"float16"``, or ``"auto"`` for the checkpoint's own (but
        not float16, at which CPUs are slow). ``executor`` is as in `ggml_output_matrix`. Raise `InputError`
        for others, `CheckpointError` when one of the tensors is missing or has the wrong shape,
        `UnsupportedModelError` when the family is not a causal language model that transformers knows, or
        `check` finds that it would compute something else.
        """
        cls.check(checkpoint)
        return cls._load(checkpoint, dtype=dtype, executor=executor, progress=progress)

    @classmethod
    def check(cls, checkpoint: Checkpoint) -> None:
        """The numeric self-test: on a small random model of the same config, embeddings and logits are those
        of the family's whole model. Raise `UnsupportedModelError` when they are not. Returns at once when
        this has been tested before.
        """
        import_large("transformers.modeling_utils")
        from swarmcore.executor.torch.self_test import check, compare

        def difference(reference: Reference) -> str | None:
            parts = cls._load(reference, dtype="float32", progress=None)
            for ids, hidden, logits in zip(reference.ids, reference.hidden, reference.logits, strict=True):
                if found := compare(parts.embed(ids.tolist(), range(len(ids))), hidden[0]):
                    return f"what goes into the first block is off by {found}"
                if found := compare(parts.logits(hidden[-1]), logits):
                    return f"logits are off by {found}"
            return None

        check(checkpoint, "embeddings and logits", difference)

    @classmethod
    def _load(
        cls, checkpoint: Checkpoint, *, dtype: str, executor: str = "torch", progress: Progress | None
    ) -> LocalParts:
        from transformers import AutoModelForCausalLM

        model, structure = load_without_blocks(
            checkpoint,
            AutoModelForCausalLM.from_config,
            what="causal language model",
            dtype=dtype,
            progress=progress,
        )
        parts = cls(model, structure)
        matrix = ggml_output_matrix(checkpoint, executor, dtype, progress=progress)
        if matrix is not None and not parts.use_ggml(matrix) and executor == "ggml":
            raise UnsupportedModelError(
                f"the output layer of models of type {parts.config.model_type!r} is no plain product: ggml "
                f"cannot compute it, use executor torch"
            )
        return parts

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
    def embed_vectors(self, embeddings: torch.Tensor, positions: Sequence[int]) -> torch.Tensor:
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
        return self.scores(hidden).float()

    @torch.inference_mode()
    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """`logits` in the dtype that the head computes in."""
        if self._head_is_one_product and self._output_layer is not None:
            return cast(torch.Tensor, self._output_layer(self._after(hidden.to(self.dtype))))
        output = self._head_model(inputs_embeds=hidden.to(self.dtype)[None], use_cache=False)
        return cast(torch.Tensor, output.logits[0])

    @torch.inference_mode()
    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """``[rows, hidden size]`` from the last block as the output layer reads it: after the final norm."""
        return cast(torch.Tensor, self._after(hidden.to(self.dtype)))

    @torch.inference_mode()
    def project(self, normed: torch.Tensor) -> torch.Tensor:
        """The output layer alone, of rows that are `normed`: ``[rows, vocabulary]`` in float32.

        Without what some families do to logits after it, by which the order of tokens stays as it is.
        """
        if self._output_layer is None:
            raise UnsupportedModelError(f"models of type {self.config.model_type!r} have no output layer")
        return cast(torch.Tensor, self._output_layer(normed.to(self.dtype))).float()

    def round_head(self, kind: str) -> bool:
        """Keep the output layer in fewer bits from now on, as ``kind`` of `quantized_matrix.MATRICES`: for
        drafts, which may be less exact. Return whether it is: not where that is no faster on this machine.
        """
        packed = self._output_layer
        if not isinstance(packed, PackedLinear):
            return False
        weight = packed.packed.to_dense()
        matrix = matrix_for(kind, weight.shape[1])(weight, "the output layer")
        if not matrix.has_kernel:
            return False
        rounded = QuantizedLinear(matrix, packed.bias)
        name = next(name for name, module in self._head_model.named_modules() if module is packed)
        self._head_model.set_submodule(name, rounded)
        self._output_layer = rounded
        return True

    def use_ggml(self, matrix: GgmlMatrix) -> bool:
        """Have ``matrix``, which is the output layer's, multiply rows that come one at a time.

        Return whether it does: not where the family's own code makes more of its head than a product.
        """
        layer = self._output_layer
        return layer is not None and self._replace_output_layer(SingleRowsByGgml(matrix, layer))

    @torch.inference_mode()
    def _replace_output_layer(self, other: nn.Module) -> bool:
        """Take another module for it, and say so; not where logits are not the same then."""
        model, head = self._head_model, self._output_layer
        name = next(name for name, module in model.named_modules() if module is head)
        row = torch.ones(1, self.hidden_size, dtype=self.dtype)
        expected = self.scores(row).float()
        model.set_submodule(name, other)
        try:
            found = self.scores(row).float()
            same = found.shape == expected.shape and bool(
                (found - expected).norm() <= _SAME * expected.norm()
            )
        except (AttributeError, RuntimeError):  # it asks for the weight, or is of another shape
            same = False
        if same:
            self._output_layer = other
        else:
            model.set_submodule(name, cast(nn.Module, head))
        return same

    @torch.inference_mode()
    def _is_one_product(self) -> bool:
        """Whether the output layer's product with rows that are `normed` is all that this family's head does.

        Then its model's forward, which takes 0.25 ms besides, can be left out.
        """
        if self._output_layer is None:
            return False
        rows = torch.linspace(-3.0, 3.0, 4 * self.hidden_size).view(4, -1)[
            :, torch.arange(self.hidden_size).flip(0)
        ]
        rows = (rows * torch.tensor([[0.1], [1.0], [10.0], [100.0]])).to(self.dtype)
        return torch.equal(self._output_layer(self._after(rows)), self.scores(rows))

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
