"""Where and in which precision a span is computed: names of devices and dtypes, and what they mean."""

from __future__ import annotations

import re
from typing import Any

import torch

from swarmcore.errors import InputError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Dtypes a span can be computed in, by the name they have on the wire."""

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


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
