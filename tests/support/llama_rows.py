"""Hidden states through a GGUF in llama.cpp itself: rows in, rows of one block out, by its C interface."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as lib
import numpy as np

_base: Any = ctypes.CDLL(str(next(Path(lib.__file__).parent.glob("lib/libggml-base*"))))
_base.ggml_get_name.restype = ctypes.c_char_p
_base.ggml_get_name.argtypes = [ctypes.c_void_p]
_base.ggml_nbytes.restype = ctypes.c_size_t
_base.ggml_nbytes.argtypes = [ctypes.c_void_p]
_base.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
_base.ggml_backend_tensor_get.restype = None

_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_EVALUATED = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)
said: list[str] = []
"""Errors that llama.cpp has logged."""


@_LOG
def _log(level: int, text: bytes, _: Any) -> None:
    if level >= 3:
        said.append(text.decode(errors="replace"))


def rows_of(path: Path, block: int, rows: np.ndarray, *, chunk: int = 512) -> np.ndarray:
    """What block ``block`` of the model gives for ``rows``, ``[tokens, width]``, given ``chunk`` at a time.

    Raise `ValueError`, with what llama.cpp logs, when it does not take the file.
    """
    return _seen(path, f"l_out-{block}".encode(), rows, chunk)


def logits_of(path: Path, tokens: list[int]) -> np.ndarray:
    """The model's logits behind each token, ``[tokens, vocabulary]``. Raise as `rows_of`."""
    return _seen(path, b"result_output", np.array(tokens, np.int32), len(tokens))


def _seen(path: Path, wanted: bytes, given: np.ndarray, chunk: int) -> np.ndarray:
    """What the node ``wanted`` of the graph has for each row or token that is given."""
    lib.llama_backend_init()
    lib.llama_log_set(_log, None)
    said.clear()
    model_settings = lib.llama_model_default_params()
    model_settings.n_gpu_layers = 0
    model_settings.use_extra_bufts = False  # weights as they are in the file
    model = lib.llama_model_load_from_file(str(path).encode(), model_settings)
    if not model:
        raise ValueError("".join(said))
    width = lib.llama_model_n_embd(model)
    found: list[np.ndarray] = []

    @_EVALUATED
    def evaluated(tensor: Any, asked: bool, _: Any) -> bool:
        if asked:
            return bool(_base.ggml_get_name(tensor) == wanted)
        values = np.empty(_base.ggml_nbytes(tensor) // 4, np.float32)
        _base.ggml_backend_tensor_get(tensor, values.ctypes.data, 0, values.nbytes)
        found.append(values.reshape(len(part), -1))
        return True

    settings = lib.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = max(64, len(given))
    settings.n_threads = settings.n_threads_batch = 1
    settings.swa_full = True
    settings.cb_eval = ctypes.cast(evaluated, type(settings.cb_eval))
    context = lib.llama_init_from_model(model, settings)
    if not context:
        lib.llama_model_free(model)
        raise ValueError("".join(said))
    batch = lib.llama_batch_init(chunk, width if given.ndim > 1 else 0, 1)
    for start in range(0, len(given), chunk):
        part = np.ascontiguousarray(given[start : start + chunk])
        batch.n_tokens = len(part)
        ctypes.memmove(batch.embd if given.ndim > 1 else batch.token, part.ctypes.data, part.nbytes)
        for row in range(len(part)):
            batch.pos[row], batch.n_seq_id[row], batch.logits[row] = start + row, 1, 1
            batch.seq_id[row][0] = 0
        if (result := lib.llama_decode(context, batch)) != 0:
            raise ValueError(f"llama_decode: {result}: {''.join(said)}")
    lib.llama_batch_free(batch)
    lib.llama_free(context)
    lib.llama_model_free(model)
    return np.concatenate(found)
