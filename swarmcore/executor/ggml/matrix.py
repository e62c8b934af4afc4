"""A matrix of a GGUF as it is in the file, which ggml multiplies a row with: a client's output layer."""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from typing import Any

import numpy as np

from swarmcore.checkpoint.gguf_header import TENSOR_TYPES
from swarmcore.checkpoint.gguf_model import GgufModel
from swarmcore.checkpoint.storage import ProgressCounter, no_progress
from swarmcore.errors import CheckpointError, InternalError, UnsupportedModelError
from swarmcore.executor.ggml.graph_tap import Rows
from swarmcore.executor.ggml.library import library
from swarmcore.types import Progress

_ALIGNMENT = 64
_F32 = 0
_NO_PRODUCTS = {"I8", "I16", "I32", "I64", "F64"}
_CPU_BACKEND = 0
_NODES = 4
"""Room in a graph, which has one product."""
_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_size_t


class _Parameters(ctypes.Structure):
    """ggml's ``ggml_init_params``."""

    _fields_ = (("mem_size", _SIZE), ("mem_buffer", _POINTER), ("no_alloc", ctypes.c_bool))


_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "ggml_backend_buffer_free": (None, [_POINTER]),
    "ggml_backend_cpu_buffer_from_ptr": (_POINTER, [_POINTER, _SIZE]),
    "ggml_backend_dev_backend_reg": (_POINTER, [_POINTER]),
    "ggml_backend_free": (None, [_POINTER]),
    "ggml_backend_get_device": (_POINTER, [_POINTER]),
    "ggml_backend_graph_compute": (ctypes.c_int, [_POINTER, _POINTER]),
    "ggml_backend_init_by_type": (_POINTER, [ctypes.c_int, ctypes.c_char_p]),
    "ggml_backend_reg_get_proc_address": (_POINTER, [_POINTER, ctypes.c_char_p]),
    "ggml_backend_tensor_alloc": (ctypes.c_int, [_POINTER, _POINTER, _POINTER]),
    "ggml_build_forward_expand": (None, [_POINTER, _POINTER]),
    "ggml_free": (None, [_POINTER]),
    "ggml_graph_overhead_custom": (_SIZE, [_SIZE, ctypes.c_bool]),
    "ggml_init": (_POINTER, [_Parameters]),
    "ggml_mul_mat": (_POINTER, [_POINTER, _POINTER, _POINTER]),
    "ggml_new_graph_custom": (_POINTER, [_POINTER, _SIZE, ctypes.c_bool]),
    "ggml_new_tensor_2d": (_POINTER, [_POINTER, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]),
    "ggml_tensor_overhead": (_SIZE, []),
}
_SetThreads = ctypes.CFUNCTYPE(None, _POINTER, ctypes.c_int)


class GgmlMatrix:
    """``[outputs, inputs]``, on the CPU. Its bytes are mapped from the file, and shared by processes."""

    def __init__(self, model: GgufModel, name: str, *, progress: Progress | None = None) -> None:
        """The tensor ``name``, which is downloaded first where the model is on a hub.

        Raise `CheckpointError` when there is no such matrix, `UnsupportedModelError` for a type that ggml
        multiplies nothing with, `MissingExtraError` without a llama-cpp-python that can, and what
        `GgufModel.fetch` raises.
        """
        place = model.places.get(name)
        if place is None or len(place.tensor.shape) != 2:
            raise CheckpointError(f"{model.name} has no matrix {name}")
        kind = TENSOR_TYPES[place.tensor.type].name
        if kind in _NO_PRODUCTS:
            raise UnsupportedModelError(
                f"{name} of {model.name} is of {kind}, with which ggml multiplies nothing"
            )
        self._ggml: Any = library().functions(_FUNCTIONS)
        what = f"downloading {model.name}"
        model.fetch([name], ProgressCounter(what, model.missing([name]), progress or no_progress))
        self.inputs, self.outputs = place.tensor.shape
        self.kind = kind
        self._type = place.tensor.type
        self._weight = _mapped(model, name)
        self._given, self._result = _aligned(4 * self.inputs), _aligned(4 * self.outputs)
        self._one_at_a_time = threading.Lock()
        self._threads = 0
        self._prepare()

    def _prepare(self) -> None:
        ggml = self._ggml
        backend = ggml.ggml_backend_init_by_type(_CPU_BACKEND, None)
        if not backend:
            raise InternalError("ggml finds no processor to compute on; build llama-cpp-python anew")
        room = 3 * ggml.ggml_tensor_overhead() + ggml.ggml_graph_overhead_custom(_NODES, False)
        context = ggml.ggml_init(_Parameters(room + 1024, None, True))
        arrays = (self._weight, self._given, self._result)
        buffers = [ggml.ggml_backend_cpu_buffer_from_ptr(array.ctypes.data, array.nbytes) for array in arrays]
        weakref.finalize(self, _free, ggml, context, buffers, backend, arrays)
        registry = ggml.ggml_backend_dev_backend_reg(ggml.ggml_backend_get_device(backend))
        set_threads = ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_set_n_threads")
        self._set_threads = _SetThreads(set_threads) if set_threads else None
        matrix = ggml.ggml_new_tensor_2d(context, self._type, self.inputs, self.outputs)
        given = ggml.ggml_new_tensor_2d(context, _F32, self.inputs, 1)
        result = ggml.ggml_mul_mat(context, matrix, given)
        for tensor, buffer, array in zip((matrix, given, result), buffers, arrays, strict=True):
            if ggml.ggml_backend_tensor_alloc(buffer, tensor, array.ctypes.data):
                raise InternalError("ggml does not take the memory of a matrix")
        self._graph = ggml.ggml_new_graph_custom(context, _NODES, False)
        ggml.ggml_build_forward_expand(self._graph, result)
        self._backend = backend

    def product(self, row: Rows, threads: int = 1) -> Rows:
        """``row``, ``[inputs]``, times the matrix: ``[outputs]``, in memory of its own."""
        with self._one_at_a_time:
            if threads != self._threads and self._set_threads is not None:
                self._set_threads(self._backend, threads)
                self._threads = threads
            self._given.view(np.float32)[:] = row
            if status := self._ggml.ggml_backend_graph_compute(self._backend, self._graph):
                raise InternalError(f"ggml gave up on a product ({status})")
            return self._result.view(np.float32).copy()

    def __repr__(self) -> str:
        return f"<GgmlMatrix {self.kind} {self.outputs} x {self.inputs}>"


def _mapped(model: GgufModel, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A tensor's bytes in the file; a copy where they do not lie as ggml wants them."""
    with model.opened(name) as (file, tensor):
        first = tensor.start - tensor.start % mmap.ALLOCATIONGRANULARITY
        try:
            pages = mmap.mmap(file, tensor.end - first, offset=first, access=mmap.ACCESS_READ)
        except ValueError as exc:
            raise CheckpointError(f"{model.name} has become shorter while it was read: {exc}") from exc
    data = np.frombuffer(pages, np.uint8)[tensor.start - first :]
    if data.ctypes.data % _ALIGNMENT == 0:
        return data
    copied = _aligned(data.nbytes)
    copied[:] = data
    return copied


def _aligned(nbytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    memory = np.zeros(nbytes + _ALIGNMENT, np.uint8)
    return memory[-memory.ctypes.data % _ALIGNMENT :][:nbytes]


def _free(ggml: Any, context: int, buffers: list[int], backend: int, _arrays: object) -> None:
    """``_arrays`` are kept until ggml is through with them."""
    ggml.ggml_free(context)
    for buffer in buffers:
        ggml.ggml_backend_buffer_free(buffer)
    ggml.ggml_backend_free(backend)
