"""The swarm's part of a model for Transformers: sessions, passes, and the connection they go over."""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING

import torch

from swarmcore import sync
from swarmcore.client.blocks import RemoteBlocks
from swarmcore.client.bridge import Bridge
from swarmcore.client.loop_thread import LoopThread
from swarmcore.client.options import SessionOptions
from swarmcore.transformers.cache import RemoteCache
from swarmcore.types import ModelInfo, Span

if TYPE_CHECKING:
    from swarmcore.training.adapter import BlockAdapter


class RemoteStack:
    """All blocks of a model, on the servers of a swarm, for callers that wait.

    ``adapter`` is one of the client's own, or the name of one that servers have. The swarm is closed with it
    if it ``owns`` that.
    """

    def __init__(
        self,
        swarm: sync.Swarm,
        model: ModelInfo,
        *,
        session_options: SessionOptions | None = None,
        adapter: BlockAdapter | str | None = None,
        owns: bool = True,
    ) -> None:
        self.model = model
        self._swarm, self._owns = swarm, owns
        self._loop: LoopThread = swarm.loop
        self._open_session = functools.partial(
            swarm.asynchronous.open_session, model, options=session_options
        )
        self._bridge = self._loop.run(self._bridged())
        self.blocks = RemoteBlocks(self._bridge, model, Span(0, model.blocks), adapter)
        """What runs batches without a cache, and carries gradients."""
        self._caches: weakref.WeakSet[RemoteCache] = weakref.WeakSet()

    def __repr__(self) -> str:
        return f"<RemoteStack {self.model.name} · {self.model.blocks} blocks · {self._swarm}>"

    def new_cache(self, expected_tokens: int = 0) -> RemoteCache:
        """An empty cache for some sequences, which are expected to grow to so many tokens."""
        cache = RemoteCache(self._loop, self._open_session, expected_tokens=expected_tokens)
        self._caches.add(cache)
        return cache

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor, block: int | None = None) -> torch.Tensor:
        """``hidden`` after all blocks, or that one alone; differentiable. See `RemoteBlocks.forward`."""
        blocks = self.blocks if block is None else self.blocks[block]
        output: torch.Tensor = blocks(hidden, None if bool(mask.all()) else mask)
        return output

    def close(self) -> None:
        """Close all sessions, and the swarm if it is its own. Harmless when repeated."""
        for cache in list(self._caches):
            cache.close()
        self._loop.run(self._bridge.close())
        if self._owns:
            self._swarm.close()

    async def _bridged(self) -> Bridge:
        return Bridge(self._swarm.asynchronous, self.model)
