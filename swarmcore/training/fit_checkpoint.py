"""The state of a run on disk: all that the rest of it depends on, so that it goes on with the same bits.

Tensors, numbers and texts in ``torch.save``'s format, read with its ``weights_only``, which builds nothing
else.
"""

from __future__ import annotations

import io
import pickle
import random
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from swarmcore.checkpoint.storage import save_file
from swarmcore.errors import CheckpointError, InputError, StorageError

FORMAT = 1


def random_states() -> dict[str, Any]:
    """Of the global generators that a program's own functions may draw from: torch's, Python's, NumPy's."""
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": _plain(random.getstate())}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["cuda"] = torch.cuda.get_rng_state_all()
    if "numpy" in sys.modules:
        kind, keys, *rest = sys.modules["numpy"].random.get_state()
        states["numpy"] = [kind, keys.tolist(), *rest]
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"][: torch.cuda.device_count()])
    if "numpy" in states and "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(tuple(states["numpy"]))


def live_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that belong to its state."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {
        name: value
        for name, value in model.state_dict().items()
        if name not in parameters and isinstance(value, torch.Tensor)
    }


def buffers_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of `live_buffers`."""
    return {name: value.clone() for name, value in live_buffers(model).items()}


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """All or nothing. Raise `StorageError` when the disk refuses."""
    content = io.BytesIO()
    torch.save({"format": FORMAT, **state}, content)
    save_file(path, content.getbuffer())


def read_checkpoint(path: Path) -> dict[str, Any] | None:
    """None when there is no such file.

    Raise `CheckpointError` when it is no checkpoint of a run, or damaged, `StorageError` when the disk
    refuses.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as exc:
        raise StorageError(f"{path} cannot be read: {exc}") from exc
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as exc:
        raise CheckpointError(
            f"{path} is no checkpoint of a run, or damaged; remove it, or pass resume=False, to begin anew"
        ) from exc
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} is no checkpoint of a run that this version reads; remove it, or pass resume=False"
        )
    return state


def restore_tensors(kind: str, found: dict[str, torch.Tensor], into: dict[str, torch.Tensor]) -> None:
    """Copy values of a checkpoint. Raise `InputError` when names or shapes differ."""
    differing = sorted(
        name for name in found.keys() | into.keys() if _shape(found, name) != _shape(into, name)
    )
    if differing:
        raise InputError(
            f"the checkpoint is of another model: its {kind} differ in {', '.join(differing[:3])}; pass the "
            f"model it was made with, another file, or resume=False"
        )
    with torch.no_grad():
        for name, value in into.items():
            value.copy_(found[name])


def _shape(tensors: dict[str, torch.Tensor], name: str) -> torch.Size | None:
    return tensors[name].shape if name in tensors else None


def _plain(state: Any) -> Any:
    return [_plain(item) for item in state] if isinstance(state, tuple) else state
