"""One span of blocks in llama.cpp: its weights, its attention cache, passes through some of its layers."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from swarmcore.errors import (
    CheckpointError,
    InputError,
    InternalError,
    ServerMemoryError,
    UnsupportedModelError,
)
from swarmcore.executor.ggml.graph_tap import GraphTap, Rows
from swarmcore.executor.ggml.kv_state import (
    F16,
    F32,
    Q8_0,
    CacheLayout,
    CacheState,
    caches_of,
    read_layout,
    read_state,
)
from swarmcore.executor.ggml.library import MAX_SEQUENCES, Device, Library
from swarmcore.resources import limits

SCRATCH = MAX_SEQUENCES - 1
"""The sequence of a context that is nobody's: pieces of caches pass through it."""
CELLS = 1024
"""Tokens that the cache of a new context has room for."""
CACHE_TYPES = {"f32": F32, "f16": F16, "int8": Q8_0}
_ALL_LAYERS = 999
_SPLIT_NONE = 0
_NO_FLASH_ATTENTION = 0
_NO_CELLS = 1


class NoCellsError(Exception):
    """The cache of the context has no room left; nothing has changed."""


@attrs.frozen(kw_only=True)
class ModelSettings:
    """How spans are run."""

    device: Device
    threads: int
    cache_dtype: str = "f16"
    repacked: bool = False
    """Whether weights are arranged anew for the processor: faster with few rows, slower with many, and a copy
    in memory that is shared with nobody."""
    batch_tokens: int = 512
    """Most rows of one pass."""


class SpanModel:
    """Used by one thread at a time, except for `close`."""

    def __init__(
        self,
        library: Library,
        path: Path,
        settings: ModelSettings,
        entrance: str | None = None,
        sliding: Sequence[bool] | None = None,
    ) -> None:
        """Map the weights in the GGUF ``path``, which has these blocks as all of its layers.

        ``entrance`` is as in `GraphTap`; ``sliding`` says for each layer whether its window slides, None for
        a model without windows.

        Raise `CheckpointError` when llama.cpp cannot read it, `UnsupportedModelError` for an architecture
        that cannot be cut into spans, `InputError` when there is no room for a cache, or none of the type
        that is asked for.
        """
        self._library, self._llama, self._settings = library, library.llama, settings
        self._model = self._load(path)
        self._context: Any = None
        self._memory: Any = None
        try:
            self.layers: int = self._llama.llama_model_n_layer(self._model)
            self.width: int = self._llama.llama_model_n_embd(self._model)
            self._window: int = self._llama.llama_model_n_swa(self._model)
            # llama.cpp takes cells for others that the window of the one sequence they belong to has passed.
            # So that rolling back stays possible, each sequence has a twin to which they belong as well.
            self.slots = SCRATCH // 2 if self._window else SCRATCH
            self._tap = GraphTap(library, self.width, self.layers, entrance)
            self._batch = _Batch(self._llama, settings.batch_tokens, self.width)
            self.cells = 0
            try:
                self._make_context(CELLS)
            except ServerMemoryError as exc:
                raise InputError(exc.message) from exc
            self.bytes_per_token = 0
            self.layout = self._look_into(caches_of(self.layers, sliding))
        except BaseException:
            self.close()
            raise

    def _load(self, path: Path) -> Any:
        parameters = self._llama.llama_model_default_params()
        handles = [handle for handle in (self._settings.device.handle,) if handle is not None]
        # Ends with a null; without a device between, everything stays on the CPU.
        devices = (ctypes.c_void_p * (len(handles) + 1))(*handles, None)
        parameters.devices = ctypes.cast(devices, ctypes.c_void_p)
        parameters.n_gpu_layers = _ALL_LAYERS if handles else 0
        parameters.split_mode = _SPLIT_NONE
        parameters.use_extra_bufts = self._settings.repacked
        with self._library.reporting() as lines:
            model = self._llama.llama_model_load_from_file(str(path).encode(), parameters)
        if not model:
            why = "; ".join(lines) or "it does not say why"
            raise CheckpointError(f"llama.cpp cannot load {path.name}: {why}")
        return model

    def _make_context(self, cells: int) -> None:
        settings = self._settings
        parameters = self._llama.llama_context_default_params()
        parameters.n_ctx = cells
        parameters.n_batch = parameters.n_ubatch = settings.batch_tokens
        parameters.n_outputs_max = parameters.n_outputs_max_per_seq = settings.batch_tokens
        parameters.n_seq_max = MAX_SEQUENCES
        parameters.n_threads = parameters.n_threads_batch = settings.threads
        parameters.type_k = parameters.type_v = CACHE_TYPES[settings.cache_dtype]
        if settings.cache_dtype == "f32":  # which flash attention would round to f16
            parameters.flash_attn_type = _NO_FLASH_ATTENTION
        parameters.kv_unified = True
        parameters.swa_full = True  # rolling back needs what a window has left behind
        parameters.cb_eval = self._tap.function
        with self._library.reporting() as lines:
            context = self._llama.llama_init_from_model(self._model, parameters)
        if not context:
            why = "; ".join(lines) or "it does not say why"
            raise ServerMemoryError(
                f"llama.cpp makes no cache of {cells} tokens in {settings.cache_dtype}: {why}"
            )
        self._context = context
        self.cells = int(self._llama.llama_n_ctx(context))
        self._memory = self._llama.llama_get_memory(context)

    def _free_context(self) -> None:
        if self._context is not None:
            self._llama.llama_free(self._context)
        self._context = self._memory = None

    @property
    def _ready(self) -> Any:
        """The context; it is gone where there was no memory to make it anew in its old size."""
        if self._context is None:
            raise InternalError("this span has no attention cache any more: restart the server")
        return self._context

    def _look_into(self, caches: tuple[tuple[int, ...], ...]) -> CacheLayout | None:
        """Run two rows, to see that the graph and the cache are as expected."""
        rows = np.random.default_rng(0).standard_normal((2, self.width)).astype(np.float32)
        numbers = np.arange(2, dtype=np.int32)
        try:
            self.run(0, self.layers, rows, numbers, np.zeros(2, np.int32), np.ones(2, np.bool_))
            state = self._sequence_state(0)
        except InternalError as exc:
            raise UnsupportedModelError(exc.message) from exc
        self.remove(0, 0)
        layout = read_layout(memoryview(state), caches)
        if layout is None or len(layout.keys) != self.layers:
            self.bytes_per_token = len(state) // len(rows)
            return None
        self.bytes_per_token = sum(width.nbytes for width in (*layout.keys, *layout.values))
        return layout

    def use_threads(self, decode: int, prefill: int) -> None:
        """Threads for passes of one row, and of more."""
        self._llama.llama_set_n_threads(self._ready, decode, prefill)

    # --- passes ----------------------------------------------------------------------------------------

    def run(
        self,
        first: int,
        last: int,
        rows: Rows,
        positions: np.ndarray[Any, np.dtype[np.int32]],
        slots: np.ndarray[Any, np.dtype[np.int32]],
        wanted: np.ndarray[Any, np.dtype[np.bool_]],
    ) -> Rows:
        """The rows that are ``wanted`` behind the layers ``first:last``, for ``rows`` before them.

        Row by row, ``slots`` and ``positions`` say which sequence of the context each belongs to, and where.
        At most as many as the settings' `batch_tokens`.
        """
        whole = last == self.layers
        outputs = wanted if whole and wanted.any() else np.ones(len(rows), np.bool_)
        for _ in range(2):
            self._tap.begin(first, last, rows, int(outputs.sum()))
            with self._library.reporting() as lines:
                status = self._llama.llama_decode(
                    self._ready, self._batch.fill(rows, positions, slots, outputs)
                )
            found = self._tap.end()
            if status == _NO_CELLS:
                raise NoCellsError("llama.cpp's attention cache has no room for the step")
            if status:
                raise InternalError(f"llama.cpp gave up on a step ({status}): {'; '.join(lines)}")
            if found is not None:
                self._keep(positions, slots)
                return found[wanted] if len(found) == len(rows) else found[wanted[outputs]]
            for slot in set(slots.tolist()):  # as it was, for another try
                self.remove(slot, int(positions[slots == slot].min()))
        raise InternalError("llama.cpp computes another graph each time")

    # --- sequences of the cache ------------------------------------------------------------------------

    def remove(self, slot: int, start: int) -> None:
        """Forget a sequence from ``start`` on."""
        self._llama.llama_memory_seq_rm(self._memory, slot, start, -1)
        if self._window and slot != SCRATCH:
            self._llama.llama_memory_seq_rm(self._memory, self.slots + slot, start, -1)

    def copy(self, source: int, target: int, start: int, end: int) -> None:
        """Let ``target`` have positions ``start:end`` of ``source``, in the same memory."""
        self._llama.llama_memory_seq_cp(self._memory, source, target, start, end)
        if self._window and target != SCRATCH:
            self._llama.llama_memory_seq_cp(self._memory, source, self.slots + target, start, end)

    def _keep(
        self, positions: np.ndarray[Any, np.dtype[np.int32]], slots: np.ndarray[Any, np.dtype[np.int32]]
    ) -> None:
        """Let the twins of sequences have what has just been computed."""
        if self._window:
            for slot in set(slots.tolist()):
                own = positions[slots == slot]
                start, end = int(own.min()), int(own.max()) + 1
                self._llama.llama_memory_seq_cp(self._memory, slot, self.slots + slot, start, end)

    # --- the cache as bytes ----------------------------------------------------------------------------

    def _sequence_state(self, slot: int) -> bytearray:
        size = self._llama.llama_state_seq_get_size(self._ready, slot)
        state = bytearray(size)
        buffer = (ctypes.c_uint8 * size).from_buffer(state)
        if self._llama.llama_state_seq_get_data(self._context, buffer, size, slot) != size:
            raise InternalError("llama.cpp did not write the state of a sequence")
        return state

    def read_sequence(self, slot: int, start: int, end: int) -> CacheState:
        """Positions ``start:end`` of a sequence, in order. Only where there is a `layout`."""
        whole, *more = pieces = [self._read_piece(slot, *piece) for piece in self._pieces(start, end)]
        if not more:
            return whole
        whole.positions = np.concatenate([piece.positions for piece in pieces])
        whole.keys = list(map(np.concatenate, zip(*(piece.keys for piece in pieces), strict=True)))
        whole.values = list(map(np.concatenate, zip(*(piece.values for piece in pieces), strict=True)))
        return whole

    def _pieces(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """In windows: of a sequence llama.cpp writes only what its last token sees."""
        size = self._window or end
        while start < end:
            last = min(end, (start // size + 1) * size)
            yield start, last
            start = last

    def _read_piece(self, slot: int, start: int, end: int) -> CacheState:
        assert self.layout is not None
        self.copy(slot, SCRATCH, start, end)
        try:
            state = read_state(memoryview(self._sequence_state(SCRATCH)), self.layout, whole=False)
        finally:
            self.remove(SCRATCH, 0)
        order = np.argsort(state.positions, kind="stable")
        if not np.array_equal(state.positions[order], np.arange(start, end)):
            raise InternalError(f"positions {start} to {end} were expected in a cache")
        state.keys = [array[order] for array in state.keys]
        state.values = [array[order] for array in state.values]
        return state

    def write_sequence(self, slot: int, start: int, state: CacheState) -> None:
        """Append what `read_sequence` gave to a sequence that ends at ``start``."""
        assert self.layout is not None
        count = len(state.keys[0])
        state.positions = np.arange(start, start + count, dtype=np.int32)
        state.owners = [(SCRATCH,)] * count
        data = bytearray(state.write(self.layout))
        buffer = (ctypes.c_uint8 * len(data)).from_buffer(data)
        try:
            if self._llama.llama_state_seq_set_data(self._context, buffer, len(data), SCRATCH) != len(data):
                raise NoCellsError("llama.cpp's attention cache has no room for what came in")
            self.copy(SCRATCH, slot, start, start + count)
        finally:
            self.remove(SCRATCH, 0)

    def whole_state(self) -> bytearray:
        """All that is cached, for `restore`."""
        size = self._llama.llama_state_get_size(self._ready)
        state = bytearray(size)
        buffer = (ctypes.c_uint8 * size).from_buffer(state)
        if self._llama.llama_state_get_data(self._context, buffer, size) != size:
            raise InternalError("llama.cpp did not write the state of its cache")
        return state

    def restore(self, state: bytearray) -> None:
        """Cache this, and nothing else; memory that it does not take is zero."""
        self._llama.llama_memory_clear(self._memory, True)
        buffer = (ctypes.c_uint8 * len(state)).from_buffer(state)
        if self._llama.llama_state_set_data(self._context, buffer, len(state)) != len(state):
            raise InternalError("llama.cpp did not take back the state of its cache")

    def resize(self, cells: int) -> None:
        """Make room for ``cells`` tokens in all, or give room back. What is cached stays.

        Raise `ServerMemoryError` when there is no memory; the cache is then as it was.
        """
        more = (cells - self.cells) * self.bytes_per_token
        if self._settings.device.handle is None and more > limits.free_memory():
            raise ServerMemoryError(f"no memory is left for an attention cache of {cells} tokens")
        state, before = self.whole_state(), self.cells
        self._free_context()  # so that there are never two of them
        try:
            self._make_context(cells)
        except ServerMemoryError:
            self._make_context(before)
            self.restore(state)
            raise
        self.restore(state)

    def close(self) -> None:
        """Free everything. Harmless when repeated; nothing else may run or follow."""
        self._free_context()
        if self._model is not None:
            self._llama.llama_model_free(self._model)
            self._model = None


class _Batch:
    """llama.cpp's batch, in arrays of our own."""

    def __init__(self, llama: Any, tokens: int, width: int) -> None:
        self._tokens = tokens
        self._rows = np.zeros((tokens, width), np.float32)
        self._positions = np.zeros(tokens, np.int32)
        self._many = np.ones(tokens, np.int32)
        self._slots = np.zeros(tokens, np.int32)
        self._outputs = np.zeros(tokens, np.int8)
        first = self._slots.ctypes.data
        self._pointers = np.arange(first, first + 4 * tokens, 4, dtype=np.uint64)
        self._struct = llama.llama_batch()
        for name, array in (
            ("embd", self._rows),
            ("pos", self._positions),
            ("n_seq_id", self._many),
            ("seq_id", self._pointers),
            ("logits", self._outputs),
        ):
            kind = dict(llama.llama_batch._fields_)[name]
            setattr(self._struct, name, ctypes.cast(array.ctypes.data, kind))

    def fill(
        self,
        rows: Rows,
        positions: np.ndarray[Any, np.dtype[np.int32]],
        slots: np.ndarray[Any, np.dtype[np.int32]],
        outputs: np.ndarray[Any, np.dtype[np.bool_]],
    ) -> Any:
        many = len(rows)
        if not 0 < many <= self._tokens:
            raise InternalError(f"a pass of {many} rows; it takes 1 to {self._tokens}")
        self._rows[:many], self._positions[:many], self._slots[:many] = rows, positions, slots
        self._outputs[:many] = outputs
        self._struct.n_tokens = many
        return self._struct
