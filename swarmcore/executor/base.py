"""The executor seam: something that runs a span of blocks on batches of sequences at their own positions."""

from __future__ import annotations

import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NewType

import attrs

from swarmcore.errors import (
    AdapterError,
    InternalError,
    InvalidBatchError,
    RemoteFaultError,
    SpanError,
    SwarmError,
)
from swarmcore.types import ModelInfo, Numerics, Progress, Span
from swarmcore.wire.tensors import Tensor


def executor_error(exc: Exception) -> SwarmError:
    """What a caller gets when the executor raised ``exc``: an instance of its own each time."""
    if isinstance(exc, SwarmError):
        return type(exc)(exc.message, **exc.details)
    error = RemoteFaultError(
        f"the server's executor failed ({type(exc).__name__}); its log has the traceback"
    )
    error.__cause__ = exc
    return error


PrefixSharing = Literal["none", "copies", "pages"]

SequenceId = NewType("SequenceId", int)
"""One sequence's attention cache in an executor, counted up from 0 and never used twice."""


@attrs.frozen
class Segment:
    """Consecutive new tokens of one sequence: positions ``start`` to ``start + count``."""

    sequence: SequenceId
    start: int
    count: int


@attrs.define(eq=False)
class ScheduledChunk:
    """Some rows of one step's hidden states, to be run in one batch.

    A step that is larger than a batch is run as several chunks, in order, over several batches.
    """

    hidden: Tensor
    """All rows of the step, ``[tokens, hidden size]``, encoded as it came."""
    first_row: int
    span: Span
    """Which blocks to run: all of the executor's, or some of them, as the session's chain needs. Sessions of
    chains whose servers overlap pass through a part of a server's span; a sequence keeps one span
    for life."""
    segments: tuple[Segment, ...]
    """What the rows ``first_row:first_row + tokens`` are, in order."""
    reply: Literal["all", "last"] = "all"
    """Whether the result holds every row, or the last row of each segment."""
    codec: str = "raw"
    """How the result is to be encoded."""
    adapter: Adapter | None = None
    """What its rows are computed with besides the frozen weights; one sequence has the same one for life."""

    @property
    def tokens(self) -> int:
        return sum(segment.count for segment in self.segments)


class BlockExecutor(ABC):
    """Runs blocks ``span`` of ``model``. Backends: torch, and a cost model for simulations.

    The caller has already checked positions and cache room (`swarmcore.engine.engine`); the executor only
    computes. Calls to `step` never overlap. `reserve` and `release` may come while one computes, for
    sequences that are not in its batch.
    """

    model: ModelInfo
    span: Span
    dtype: str
    """Name of the dtype that hidden states have here: ``"float32"``, ``"bfloat16"``, ``"float16"``."""
    numerics: Numerics
    """How it computes. The same for every span of a model and for as long as the executor lives."""
    capabilities: frozenset[str] = frozenset()
    """What it can do besides steps: ``"training"`` is `forward` and `backward`, ``"adapters"`` is
    `load_adapter`. Clients use other servers for the rest."""
    cache_bytes_per_token: int
    """Bytes of attention cache that one token takes, over all blocks of the span."""
    page: int
    """Cache is allocated in multiples of this many tokens for each sequence."""
    computes_padding: bool = False
    """Whether `forward` and `backward` take batches with `TrainingBatch.padding`; they get none otherwise."""
    prefix_sharing: PrefixSharing = "none"
    """What `share_prefix` does: it is not there, it copies, or sequences have whole pages in common, which
    takes no memory."""
    caches_whole_span: bool = False
    """Whether a sequence takes `cache_bytes_per_token` for each of its tokens, also where it goes through a
    part of the span."""
    max_sequences: int | None = None
    """How many sequences may have a cache at a time; steps of more are refused (`CacheFullError`)."""
    thread_choices: tuple[int, ...] = ()
    """Numbers of compute threads to choose from, most first; none where there is nothing to choose."""

    def use_threads(self, decode: int, forward: int) -> None:
        """Compute steps of few tokens with ``decode`` threads, and all else with ``forward`` threads.

        Both are of `thread_choices`. Holds from the next step on.
        """
        raise InternalError(f"{type(self).__name__} has no choice of threads")

    @abstractmethod
    async def step(self, batch: Sequence[ScheduledChunk]) -> list[Tensor | SwarmError]:
        """Run all chunks, which are all of one ``span``, in one pass.

        Their keys and values are appended to the caches of their sequences.
        A segment whose ``start`` is below its sequence's cached length first rolls that cache back to
        ``start``. Return for each chunk a tensor ``"hidden"`` of ``[rows, hidden size]``, or the error that
        is this chunk's own (non-finite values: `InvalidStepError`); then its sequences' caches may hold
        anything from ``start`` on. Never blocks the event loop.
        """

    async def encode(self, tensor: Tensor, codec: str) -> Tensor:
        """A raw result, put together from several chunks, in another codec.

        Override it when encoding takes long enough to matter to the event loop.
        """
        return tensor.encode(codec)

    async def decode(self, tensor: Tensor) -> Tensor:
        """A tensor that came in, as raw values. Raise as `Tensor.decode` does; override it as `encode`."""
        return tensor.decode()

    async def load_adapter(self, tensors: Sequence[Tensor], scaling: float) -> Adapter:
        """Make an adapter ready for use.

        Its raw tensors are named as in `swarmcore.wire.forward_backward.AdapterPart`. They are of
        blocks that are held; the adapter may be used in batches of some of them. May come while a batch
        computes. Raise `AdapterError` for tensors that do not fit the blocks, and where the backend takes no
        adapters.
        """
        raise AdapterError(f"{type(self).__name__} takes no adapters")

    def check_adapter(self, name: str, dtype: str, shape: tuple[int, ...], span: Span) -> None:  # noqa: B027
        """Raise `AdapterError` unless a tensor of this description may be part of an adapter for ``span``.

        Asked about each tensor of a stranger's adapter before it is decoded, so that its size is one that the
        blocks give rise to. By default `load_adapter` alone says so.
        """

    def forward(self, batch: TrainingBatch, *, keep: bool = False) -> ForwardPass:
        """A forward pass of ``batch``, not begun; with ``keep`` it holds activations for `backward`.

        Raise `InvalidBatchError` for what can be seen to be wrong at once, `SpanError` for blocks that are
        not held, and where the backend runs no passes.
        """
        raise InvalidBatchError(f"{type(self).__name__} runs no batches without a cache")

    def backward(
        self,
        batch: TrainingBatch,
        gradients: Tensor,
        *,
        kept: ForwardPass | None = None,
        inputs: bool = True,
        weights: bool = False,
    ) -> BackwardPass:
        """A backward pass, not begun, from ``gradients`` of the outputs, ``[tokens, hidden size]``, encoded.

        ``inputs`` and ``weights`` say which gradients are wanted: of ``batch.hidden``, of the adapter's
        weights. With ``kept``, the forward pass of the same batch, nothing is computed again, and
        ``batch.hidden`` is not looked at; closing this pass closes it too. Raises as `forward` does, and
        leaves ``kept`` open then.
        """
        raise InvalidBatchError(f"{type(self).__name__} runs no batches without a cache")

    @abstractmethod
    async def reorder(self, sequences: Sequence[SequenceId], sources: Sequence[int]) -> None:
        """Let each sequence ``i`` hold a copy of what sequence ``sources[i]`` of ``sequences`` held.

        For beam search. Never overlaps with `step` or another `reorder`. Each sequence's room for tokens was
        reserved before, as for a step. When it fails the sequences may hold anything.
        """

    async def share_prefix(self, source: SequenceId, target: SequenceId, tokens: int) -> None:
        """Let ``target``, a sequence without a cache, begin with the first ``tokens`` tokens of ``source``.

        With the prefix of its adapter, where ``source`` has one. Nothing is computed; from then on both go
        on, roll back and end independently of each other. The target's room was reserved before, as for a
        step. May come while a batch computes, with ``source`` too unless that rolls back into these tokens.
        Raise `SessionLostError` when ``source`` has no cache or ``target`` no reservation,
        `InvalidStepError` when the one is not that long or the other has a cache; nothing has changed then.
        """
        raise InternalError(f"{type(self).__name__} shares no prefixes")

    @abstractmethod
    async def export_cache(self, sequence: SequenceId, start: int, count: int) -> tuple[Tensor, ...]:
        """The attention cache of positions ``start`` to ``start + count``, for `import_cache` elsewhere.

        The tensors' layout is the backend's own; their names and shapes tell it. Values are exact. Not while
        the sequence is in a batch; others may be. Raise `SessionLostError` when the sequence has no cache,
        `InvalidStepError` when it is not that long.
        """

    @abstractmethod
    async def import_cache(
        self,
        sequence: SequenceId,
        span: Span,
        start: int,
        count: int,
        tensors: Sequence[Tensor],
        adapter: Adapter | None = None,
    ) -> None:
        """Append what another executor's `export_cache` gave for the blocks ``span``.

        ``adapter`` is what the sequence's steps are computed with. Its prefix is put in here: prefixes are
        in no export.

        Like a step it needs its room reserved, and rolls back to ``start`` first. Not while the sequence is
        in a batch; others may be. Raise `InvalidStepError` unless the tensors have this executor's own layout
        and dtype for ``span`` and follow on what is cached; the cache is then as it was. When it is cancelled
        the sequence may hold anything from ``start`` on.
        """

    @abstractmethod
    async def change_span(self, span: Span) -> None:
        """Hold the blocks ``span`` from now on; steps through blocks that stay go on meanwhile.

        First the blocks that leave are dropped, then those that come are loaded. Sessions through blocks that
        leave have ended before. `self.span` is the part that stays until all is loaded, and ``span`` after
        that; where nothing stays it is ``span`` at once, and no step may come before the return.
        `cache_bytes_per_token` follows `self.span`. When loading fails the part that stays is still served,
        and another call may load the rest. Never overlaps with itself. Raise `SpanError` for blocks that the
        model does not have, and what loading raises.
        """

    @abstractmethod
    def reserve(self, sequence: SequenceId, tokens: int) -> None:
        """Make the sequence's cache ready for ``tokens`` tokens in all; memory is taken at its next step.

        Where there are more, those beyond are forgotten before anything else is done with the sequence.

        The `Adapter.prefix_tokens` of its adapter count; they have no positions in steps and exports.
        """

    @abstractmethod
    def release(self, sequence: SequenceId) -> None:
        """Free the sequence's cache. Unknown sequences are ignored."""

    @abstractmethod
    async def close(self) -> None:
        """Stop the compute thread and free the weights. Harmless when repeated."""


class SpanChange:
    """For `BlockExecutor.change_span`: one change at a time, whose loading is given up when it is over."""

    def __init__(self, model: ModelInfo) -> None:
        self._model = model
        self._over: threading.Event | None = None

    @contextmanager
    def begin(self, span: Span) -> Iterator[Progress]:
        """Change to ``span`` within it. Loading calls what it yields, which raises once loading is in vain.

        Raise `InternalError` while another change goes on, `SpanError` for blocks that the model has not.
        """
        if self._over is not None:
            raise InternalError("the span is being changed already")
        if not self._model.span.covers(span):
            raise SpanError(
                f"blocks {span} are not in {self._model.name}, which has blocks 0:{self._model.blocks}"
            )
        over = self._over = threading.Event()

        def progress(what: str, done: int, total: int) -> None:
            if over.is_set():
                raise InternalError("loading was given up")

        try:
            yield progress
        finally:
            over.set()
            self._over = None

    def give_up(self) -> None:
        """Have the loading of a change that goes on end soon: the executor closes."""
        if self._over is not None:
            self._over.set()


class Adapter:
    """Small weights that a backend has made ready to be used with its blocks; freed with the last reference.

    Of the kinds that `swarmcore.wire.forward_backward.AdapterPart` names.
    """

    span: Span
    """The blocks that it has weights for, or none in between."""
    nbytes: int
    """Memory that it takes."""
    prefix_tokens: int = 0
    """Positions that it puts before the first token of every sequence."""


@attrs.define(eq=False)
class TrainingBatch:
    """Sequences from their first token on, to go through the blocks ``span``."""

    span: Span
    lengths: tuple[int, ...]
    """Tokens of each sequence, one or more."""
    hidden: Tensor
    """``[sum(lengths), hidden size]``, encoded as it came."""
    adapter: Adapter | None = None
    reproducible: bool = False
    """Compute in an order that depends on the batch alone."""
    padding: bool = False
    """The rows attend to nothing, not even to themselves: what attention adds to them is 0."""

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


PassKind = Literal["forward", "backward"]


class TrainingPass(ABC):
    """A pass that has begun or is about to. Close it in any case; its results stay."""

    seconds: float = 0.0
    """Time at work on it so far."""
    token_bytes: float = 0.0
    """Memory that activations of a token in a block turned out to take; 0 as long as that is not known, and
    for a pass that computes none to be held."""

    @abstractmethod
    async def advance(self, max_tokens: int) -> bool:
        """Compute the next unit, such as some sequences through one block; return whether it was the last.

        A unit is of ``max_tokens`` tokens at most, but of one sequence at least, and of what was together in
        a kept forward pass; a reproducible batch is cut in one way always. Never blocks the event loop;
        does not overlap with `BlockExecutor.step` or another pass. Raise `InvalidBatchError` for rows or
        gradients of a wrong shape or with values that are not finite, `ServerMemoryError` when memory runs
        out; the pass is over then, and everything else unharmed.
        """

    @abstractmethod
    def close(self) -> None:
        """Free what it holds. Harmless when repeated; not while `advance` runs."""


class ForwardPass(TrainingPass):
    """Its result is `outputs`."""

    outputs: Tensor
    """``[tokens, hidden size]``, raw, in the executor's dtype; once it is through."""
    kept_bytes: int = 0
    """Memory of the activations that it keeps until it is closed; grows with each unit."""

    @abstractmethod
    def forget(self) -> None:
        """Keep no activations after all; those that it has are freed. Not while `advance` runs."""


class BackwardPass(TrainingPass):
    """Its results are `gradients` and `weights`."""

    gradients: Tensor | None = None
    """Of the inputs, ``[tokens, hidden size]``, raw, in the executor's dtype; if they were asked for."""
    weights: tuple[Tensor, ...] = ()
    """Of the adapter's weights, under their names, in their dtypes; if they were asked for."""


_RENAMED = {"Slice": "ScheduledChunk", "SequenceBatch": "TrainingBatch", "BatchPass": "TrainingPass"}
"""What executors of others may still call by the name of the last version."""


def __getattr__(name: str) -> Any:
    if (new := _RENAMED.get(name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{__name__}.{name} is called {new} now", DeprecationWarning, stacklevel=2)
    return globals()[new]
