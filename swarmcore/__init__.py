"""Run language models too big for one machine on many machines.

Everything public is here; names load on first use, so that importing this imports neither torch nor any
transport.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swarmcore import errors, sync
    from swarmcore.client.autograd.options import PassOptions
    from swarmcore.client.autograd.remote_blocks import RemoteBlocks
    from swarmcore.client.generation.generation import BatchGeneration, Generation
    from swarmcore.client.generation.model import RemoteModel
    from swarmcore.client.generation.remote import RemoteGeneration
    from swarmcore.client.generation.token_session import ModelSession
    from swarmcore.client.session.options import Failover, SessionOptions
    from swarmcore.client.session.session import InferenceSession
    from swarmcore.client.swarm import Swarm, connect
    from swarmcore.errors import SwarmError
    from swarmcore.executor.base import BlockExecutor
    from swarmcore.generation_settings import GenerationSettings, Speculation
    from swarmcore.identity import Identity
    from swarmcore.registry.base import Registry, SwarmView
    from swarmcore.routing.base import Router
    from swarmcore.routing.chain import Chain
    from swarmcore.routing.least_latency import LeastLatency
    from swarmcore.server.block_server import BlockServer
    from swarmcore.transport import Stream, Transport
    from swarmcore.types import Address, ModelInfo, PeerId, ServerInfo, Span
    from swarmcore.wire.limits import Limits

    __version__: str

_PLACES = {
    "errors": "errors",
    "sync": "sync",
    "Address": "types",
    "BatchGeneration": "client.generation.model",
    "BlockExecutor": "executor.base",
    "BlockServer": "server.block_server",
    "Chain": "routing.chain",
    "Failover": "client.session.options",
    "Generation": "client.generation.model",
    "GenerationSettings": "generation_settings",
    "Speculation": "generation_settings",
    "Identity": "identity",
    "InferenceSession": "client.session.session",
    "LeastLatency": "routing.least_latency",
    "Limits": "wire.limits",
    "ModelInfo": "types",
    "ModelSession": "client.generation.model",
    "PassOptions": "client.autograd.options",
    "PeerId": "types",
    "Registry": "registry.base",
    "RemoteBlocks": "client.generation.model",
    "RemoteGeneration": "client.generation.remote",
    "RemoteModel": "client.generation.model",
    "Router": "routing.base",
    "ServerInfo": "types",
    "SessionOptions": "client.session.options",
    "Span": "types",
    "Stream": "transport",
    "Swarm": "client.swarm",
    "SwarmError": "errors",
    "SwarmView": "registry.base",
    "Transport": "transport",
    "connect": "client.swarm",
}
"""The module of each public name; a module itself where they are the same. What needs torch comes from
``client.model``, which says so when it is missing."""

_RENAMED = {"ThinGeneration": "RemoteGeneration"}
"""Names of the version before, and what they are called now."""

__all__ = [
    "Address",
    "BatchGeneration",
    "BlockExecutor",
    "BlockServer",
    "Chain",
    "Failover",
    "Generation",
    "GenerationSettings",
    "Identity",
    "InferenceSession",
    "LeastLatency",
    "Limits",
    "ModelInfo",
    "ModelSession",
    "PassOptions",
    "PeerId",
    "Registry",
    "RemoteBlocks",
    "RemoteGeneration",
    "RemoteModel",
    "Router",
    "ServerInfo",
    "SessionOptions",
    "Span",
    "Speculation",
    "Stream",
    "Swarm",
    "SwarmError",
    "SwarmView",
    "Transport",
    "connect",
    "errors",
    "sync",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from swarmcore.distribution import version

        return version()
    if (new := _RENAMED.get(name)) is not None:
        warnings.warn(f"swarmcore.{name} is called swarmcore.{new} now", DeprecationWarning, stacklevel=2)
        return globals().get(new) or __getattr__(new)
    place = _PLACES.get(name)
    if place is None:
        raise AttributeError(f"module 'swarmcore' has no attribute {name!r}")
    module = import_module(f"swarmcore.{place}")
    value = module if place == name else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
