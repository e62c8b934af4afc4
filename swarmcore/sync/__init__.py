"""swarmcore without asyncio, for scripts and notebooks: the same names, and every call waits.

    import swarmcore.sync

    with swarmcore.sync.connect("tcp://…") as swarm:
        model = swarm.load_model("…")
        for piece in model.generate("The capital of France is"):
            print(piece, end="", flush=True)

Everything runs on one event loop in a thread of its own, so that it works where a loop is already running, as
in a notebook. Ctrl-C stops what is waited for, and cleans up after it.
"""

from __future__ import annotations

import warnings
from typing import Any

from swarmcore.loop_thread import LoopThread, background_loop
from swarmcore.sync.faces import Chat, Generation, Model, RemoteGeneration, Session, Swarm, connect
from swarmcore.sync.waiting import Pieces

__all__ = [
    "Chat",
    "Generation",
    "LoopThread",
    "Model",
    "Pieces",
    "RemoteGeneration",
    "Session",
    "Swarm",
    "background_loop",
    "connect",
]


def __getattr__(name: str) -> Any:
    if name == "ThinGeneration":
        message = "swarmcore.sync.ThinGeneration is called swarmcore.sync.RemoteGeneration now"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return RemoteGeneration
    raise AttributeError(f"module 'swarmcore.sync' has no attribute {name!r}")
