"""A checkpoint's model without a single block: what of it the client owns, in the family's own classes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from swarmcore.checkpoint.base import missing_tensors, one_line
from swarmcore.checkpoint.quantized import check_plain, unexpected_tensors
from swarmcore.checkpoint.quiet import quiet_transformers
from swarmcore.errors import UnsupportedModelError
from swarmcore.executor.torch.device import choose_dtype, loading_memory
from swarmcore.executor.torch.packed_linear import PackedLinear, packable
from swarmcore.executor.torch.partial_model import check_servable, load_state, misshapen
from swarmcore.executor.torch.quantized_layers import QuantizedLinear
from swarmcore.executor.torch.quantized_matrix import matrix_for
from swarmcore.executor.torch.structure import Structure, structure_of
from swarmcore.executor.torch.tensor_names import TextTensors
from swarmcore.imports import import_large

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from swarmcore.checkpoint import Checkpoint
    from swarmcore.executor.torch.reference import Reference
    from swarmcore.types import Progress

_PER_LAYER_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers", "attention_layers")
"""Lists in a config that must have one entry for each layer."""

Build = Callable[["PretrainedConfig"], "PreTrainedModel"]
"""Such as ``AutoModelForCausalLM.from_config``: raises ValueError for a family that has no such model."""


def load_without_blocks(
    checkpoint: Checkpoint,
    build: Build,
    *,
    what: str,
    dtype: str = "auto",
    settings: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> tuple[PreTrainedModel, Structure]:
    """Embeddings, final norm and head of ``checkpoint``; nothing else is read. Frozen, in evaluation mode.

    With it comes where its blocks would be, and which of its modules come after them.

    ``settings`` are put into the config first. A head that the checkpoint does not have, as of a classifier
    that is yet to be trained, is initialised as Transformers does, and can be trained. Raise `InputError`
    for an unknown dtype and when memory runs out, `CheckpointError` when a tensor is missing or has the
    wrong shape, `UnsupportedModelError` when ``build`` has no ``what`` of this family.
    """
    text = checkpoint.config.get_text_config(decoder=True)
    check_servable(text, checkpoint.name)
    structure = structure_of(text)
    config = without_blocks(checkpoint.config)
    for name, value in (settings or {}).items():
        setattr(config, name, value)
    wanted = choose_dtype(dtype, config, torch.device("cpu"))
    with quiet_transformers(lambda share: None):
        try:
            with torch.device("meta"):
                skeleton = build(config)
        except Exception as exc:  # each family checks its config in its own way
            raise UnsupportedModelError(
                f"{checkpoint.name} ({config.model_type}) is no {what} that transformers can build: "
                f"{one_line(exc)}"
            ) from exc
    tensors = TextTensors.of(checkpoint, structure)
    found = tensors.find(skeleton.state_dict(), structure.base)
    wanted_keys = {key for key, _ in skeleton.named_parameters() if not _is_new_head(skeleton, key)}
    known, others = list(found), tensors.names - set(found)
    if not wanted_keys <= set(found.values()):
        # Old names of this family, which transformers itself will translate.
        found |= {name: name for name in tensors.of_use(others)}
    elif unexpected := tensors.unexpected(others, found, skeleton):
        raise unexpected_tensors(checkpoint.name, unexpected)
    family = _initialised_as(type(skeleton), text.num_hidden_layers)
    with loading_memory(checkpoint.name):
        data = checkpoint.read(list(found), progress=progress)
        check_plain(checkpoint.name, data, tensors.whole_numbers(found, skeleton))
        state = {key: _in_dtype(data.pop(name), wanted) for name, key in found.items()}
        model, loaded = load_state(family, config, state, wanted, checkpoint.name)
    model.config.num_hidden_layers = 0
    for key, shape, expected in loaded.get("mismatched_keys", ()):
        raise misshapen(checkpoint.name, key, shape, expected)
    if unexpected := tensors.unexpected(loaded["unexpected_keys"], known, model):
        raise unexpected_tensors(checkpoint.name, unexpected)
    new = {name for name in loaded["missing_keys"] if _is_new_head(model, name)}
    if missing := set(loaded["missing_keys"]) - new:
        raise missing_tensors(checkpoint.name, missing)
    model.eval().requires_grad_(False)
    for name in new:
        model.get_parameter(name).requires_grad_(True)
    return model, structure


def _initialised_as(family: Any, blocks: int) -> Any:
    """``family`` without blocks, initialised as a model of that many: some divide by how many there are."""

    def __init__(self: Any, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        family.__init__(self, config, *args, **kwargs)
        config.num_hidden_layers = blocks

    # Under the name of its family, by which the library's loader knows what to convert.
    body = {"__init__": __init__, "__module__": family.__module__, "__qualname__": family.__qualname__}
    return type(family.__name__, (family,), body)


def without_blocks(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of the text model's config with no layers."""
    whole, config = config, copy.deepcopy(config.get_text_config(decoder=True))
    if getattr(whole, "tie_word_embeddings", False):
        config.tie_word_embeddings = True  # a larger model around it may say so in its own part alone
    config.num_hidden_layers = 0
    for name in _PER_LAYER_LISTS:
        if getattr(config, name, None):
            setattr(config, name, [])
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False  # there are no routers here
    return config


def with_blocks(config: PretrainedConfig, whole: PretrainedConfig) -> PretrainedConfig:
    """A copy of a config `without_blocks`, with the number of blocks that the ``whole`` model has."""
    config = copy.deepcopy(config)
    config.num_hidden_layers = whole.num_hidden_layers
    for name in _PER_LAYER_LISTS:
        if getattr(whole, name, None):
            setattr(config, name, list(getattr(whole, name)))
    return config


def _is_new_head(model: PreTrainedModel, name: str) -> bool:
    # A language model's head is part of what was trained; it never is new.
    in_base = name.startswith(f"{model.base_model_prefix}.")
    return not in_base and model.get_output_embeddings() is None


def _in_dtype(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return data.to(dtype) if data.is_floating_point() else data


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
        self._head_is_one_product = False
        self._output_layer = self._pack_head(head)
        self._head_is_one_product = self._is_one_product()

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
        language model that transformers knows, or `check` finds that it would compute something else.
        """
        cls.check(checkpoint)
        return cls._load(checkpoint, dtype=dtype, progress=progress)

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
        self._output_layer = QuantizedLinear(matrix, packed.bias)
        name = next(name for name, module in self._head_model.named_modules() if module is packed)
        self._head_model.set_submodule(name, self._output_layer)
        return True

    def _pack_head(self, head: nn.Module | None) -> nn.Module | None:
        """Let the ``head`` read its weight in the layout of the CPU's kernels, which takes half the time.

        A matrix that is embeddings as well is held twice then. Where the family's own code makes something
        else of its head than one product, it stays as it is.
        """
        model = self._head_model
        if type(head) is not nn.Linear or not packable(head.weight):
            return head
        name = next(name for name, module in model.named_modules() if module is head)
        row = torch.ones(1, self.hidden_size, dtype=self.dtype)
        expected = self.scores(row)
        packed = PackedLinear(head)
        model.set_submodule(name, packed)
        try:
            same = torch.allclose(self.scores(row), expected, rtol=0.02, atol=1e-3, equal_nan=True)
        except AttributeError:  # it asks for the weight
            same = False
        if same:
            return packed
        model.set_submodule(name, head)
        return head

    @torch.inference_mode()
    def _is_one_product(self) -> bool:
        """Whether the output layer's product with rows that are `normed` is all that this family's head does.

        Then its model's forward, which takes 0.4 ms besides, can be left out.
        """
        if self._output_layer is None:
            return False
        rows = torch.linspace(-3.0, 3.0, 4 * self.hidden_size).view(4, -1)[:, torch.arange(self.hidden_size).flip(0)]
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
