"""The swarm's part of a model for Transformers: sessions, passes, and the connection they go over."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import torch

from swarmcore import sync
from swarmcore.client.autograd.bridge import Bridge
from swarmcore.client.autograd.options import PassOptions
from swarmcore.client.autograd.packing import snapshot
from swarmcore.client.autograd.remote_blocks import RemoteBlocks
from swarmcore.client.session.options import SessionOptions
from swarmcore.loop_thread import LoopThread
from swarmcore.transformers.cache import RemoteCache
from swarmcore.types import ModelInfo, Span

if TYPE_CHECKING:
    from swarmcore.training.adapter import BlockAdapter


class _InThisThread(threading.local):
    """What a thread uses in place of a stack's own adapter.

    No context variable: tasks of the event loop keep copies of those, and with them an adapter that nobody
    else has any more.
    """

    adapter: BlockAdapter | str | None = None


def identity_of(adapter: BlockAdapter | str | None) -> object:
    """Equal for the same adapter, whatever its weights are by now."""
    return adapter if adapter is None or isinstance(adapter, str) else adapter.identity


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
        pass_options: PassOptions | None = None,
        adapter: BlockAdapter | str | None = None,
        owns: bool = True,
    ) -> None:
        self.model = model
        self.swarm, self._owns = swarm, owns
        self._loop: LoopThread = swarm.loop
        self._open_session = functools.partial(
            swarm.asynchronous.open_session, model, options=session_options
        )
        self._bridge = self._loop.run(self._bridged(pass_options))
        self._in_this_thread = _InThisThread()
        self.blocks = RemoteBlocks(self._bridge, model, Span(0, model.blocks), adapter)
        """What runs batches without a cache, and carries gradients."""
        self._caches: weakref.WeakSet[RemoteCache] = weakref.WeakSet()

    def __repr__(self) -> str:
        return f"<RemoteStack {self.model.name} · {self.model.blocks} blocks · {self.swarm}>"

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self  # copies of a model use the same swarm, and are closed with it

    @property
    def adapter(self) -> BlockAdapter | str | None:
        """What this thread uses now: that of `using`, or else the stack's own."""
        chosen = self._in_this_thread.adapter
        return self.blocks.adapter if chosen is None else chosen

    @property
    def prefix_tokens(self) -> int:
        """Positions before the first token that the adapter in use takes."""
        adapter = self.adapter
        return 0 if adapter is None or isinstance(adapter, str) else adapter.prefix_tokens

    @contextmanager
    def using(self, adapter: BlockAdapter | str | None) -> Iterator[None]:
        """Within it, in this thread, passes and new caches are of ``adapter``; None for the stack's own."""
        before, self._in_this_thread.adapter = self._in_this_thread.adapter, adapter
        try:
            yield
        finally:
            self._in_this_thread.adapter = before

    def new_cache(self, expected_tokens: int = 0) -> RemoteCache:
        """An empty cache for some sequences, which are expected to grow to so many tokens."""
        weights = snapshot(self.adapter, Span(0, self.model.blocks))
        opener = functools.partial(self._open_session, adapter=weights)
        cache = RemoteCache(self._loop, opener, expected_tokens=expected_tokens)
        cache.adapter = identity_of(self.adapter)
        self._caches.add(cache)
        return cache

    def forward(
        self, hidden: torch.Tensor, mask: torch.Tensor, block: int | None = None, *, padding: bool = False
    ) -> torch.Tensor:
        """``hidden`` after all blocks, or that one alone; differentiable. See `RemoteBlocks.forward`."""
        blocks = self.blocks if block is None else self.blocks[block]
        output: torch.Tensor = blocks(
            hidden,
            None if bool(mask.all()) else mask,
            adapter=self.adapter,
            padding=padding and not self.prefix_tokens,
        )
        return output

    def close(self) -> None:
        """Close all sessions, and the swarm if it is its own. Harmless when repeated."""
        for cache in list(self._caches):
            cache.close()
        self._loop.run(self._bridge.close())
        if self._owns:
            self.swarm.close()

    async def _bridged(self, options: PassOptions | None) -> Bridge:
        return Bridge(self.swarm.asynchronous, self.model, options)
