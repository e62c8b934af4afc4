"""Where and in which precision is computed: names of devices and dtypes, and what they mean; threads."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import attrs
import torch

from swarmcore.checkpoint import Checkpoint
from swarmcore.errors import InputError, ServerMemoryError, SwarmError
from swarmcore.executor.torch.quantized_matrix import choose_weights

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Dtypes a span can be computed in, by the name they have on the wire."""

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@attrs.frozen
class Precision:
    """In what blocks are kept and computed, and where."""

    device: torch.device
    dtype: torch.dtype
    weights: str | None
    """What weights are rounded to, of `quantized_matrix.MATRICES`; None where they are in ``dtype``."""


def choose_precision(checkpoint: Checkpoint, *, dtype: str, weights: str, device: str) -> Precision:
    """What these names come to for a checkpoint; ``bf16`` weights are plain ones in ``bfloat16``.

    Raise `InputError` for unknown names and what does not go together, `MissingExtraError` for a library that
    the weights need.
    """
    where = parse_device(device)
    if weights == "bf16":
        if dtype not in ("auto", "bfloat16"):
            raise InputError(f"weights bf16 and dtype {dtype} exclude each other; leave one of them out")
        dtype = "bfloat16"
    plain = choose_dtype(dtype, checkpoint.config.get_text_config(decoder=True), where)
    return Precision(where, plain, choose_weights(weights, checkpoint.stored_weights, where))


def parse_device(name: str) -> torch.device:
    """Read ``"cpu"``, ``"cuda"`` or ``"cuda:1"``. Raise `InputError` for other names and absent GPUs."""
    if name == "cpu":
        return torch.device("cpu")
    match = re.fullmatch(r"cuda(?::(\d{1,3}))?", name)
    if not match:
        raise InputError(f"device {name!r} is not known; use cpu, cuda, or cuda:N for the GPU with number N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(match[1] or 0)
    if index >= count:
        found = f"only {count} found" if count else "torch finds no CUDA GPU on this machine"
        raise InputError(f"device {name!r} is not there ({found}); use cpu or another number")
    return torch.device("cuda", index)


def choose_dtype(name: str, config: Any, device: torch.device) -> torch.dtype:
    """The dtype that ``name`` asks for; ``"auto"`` is the checkpoint's own if the device is good at it.

    ``auto`` gives bfloat16 when the config names no dtype, and in place of float16 on CPUs, which compute it
    very slowly, and float16 in place of bfloat16 on GPUs without it. Raise `InputError` for an unknown name.
    """
    if name != "auto":
        try:
            return DTYPES[name]
        except KeyError:
            raise InputError(f"dtype {name!r} is not known; use auto, {', '.join(DTYPES)}") from None
    own = getattr(config, "dtype", None)
    if isinstance(own, str):
        own = DTYPES.get(own.removeprefix("torch."))
    if own == torch.float32:
        return torch.float32
    if device.type == "cpu":
        return torch.bfloat16
    if own == torch.float16 or not _computes_bfloat16(device):
        return torch.float16
    return torch.bfloat16


def wait_for(device: torch.device) -> None:
    """Wait until ``device`` has computed all that it was given: a GPU is given work ahead of time."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _computes_bfloat16(gpu: torch.device) -> bool:
    with torch.cuda.device(gpu):  # torch asks the current one, and takes slow emulation for support
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


_NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory|ALLOC_FAILED", re.IGNORECASE)
"""In the message of a ``RuntimeError``, which is how torch reports it on CPUs and from some GPU libraries."""


def is_out_of_memory(exc: BaseException) -> bool:
    """Whether ``exc`` is one of the errors that Python and torch raise when memory runs out."""
    if isinstance(exc, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(exc, RuntimeError) and _NO_MEMORY.search(str(exc)) is not None


@contextmanager
def memory_errors(what: str) -> Iterator[None]:
    """Raise `ServerMemoryError` when memory runs out within it; what ``what`` had allocated is freed."""
    with _out_of_memory_as(
        ServerMemoryError,
        f"the server ran out of memory in {what}; send smaller micro-batches or steps, or use another server",
    ):
        yield


@contextmanager
def loading_memory(name: str) -> Iterator[None]:
    """Raise `InputError` when memory runs out while the model ``name`` is loaded within it."""
    with _out_of_memory_as(
        InputError,
        f"memory ran out while {name} was loaded; free some, or hold fewer blocks or fewer bits",
    ):
        yield


@contextmanager
def _out_of_memory_as(error: type[SwarmError], message: str) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as exc:
        if not is_out_of_memory(exc):
            raise
        # The error outlives this call, and with its traceback every tensor that was a local variable.
        traceback.clear_frames(exc.__traceback__)
        raise error(message) from exc
