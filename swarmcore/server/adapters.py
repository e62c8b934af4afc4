"""Small weights on a server: those that it was started with, by name, and those that clients bring."""

from __future__ import annotations

import asyncio
import logging
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self

import attrs

from swarmcore.errors import (
    AdapterError,
    AdapterNotFoundError,
    InputError,
    ProtocolError,
    ServerMemoryError,
    SwarmError,
)
from swarmcore.executor.base import Adapter, BlockExecutor, executor_error
from swarmcore.resources import Resource, ResourceManager
from swarmcore.rpc.channel import Channel
from swarmcore.tasks import deadline_after
from swarmcore.types import PeerId, Span, short
from swarmcore.wire.forward_backward import AdapterName, AdapterPart, AdapterWanted
from swarmcore.wire.tensors import Tensor

logger = logging.getLogger(__name__)

ARRIVAL_TIMEOUT = 600.0
"""Seconds in which a client has to send weights that it was asked for."""

PART_TIMEOUT = 60.0
"""Seconds for the next part of them to come."""

MAX_OF_ONE_PEER = 8
"""Adapters kept for one peer: each change of its weights brings a new one, and the old are of little use."""

MAX_TENSORS_PER_BLOCK = 64

_VERSION = re.compile(r"[0-9a-f]{32}")


@attrs.frozen
class Weights:
    """An adapter's tensors for some blocks, raw; possibly none."""

    tensors: Sequence[Tensor]
    scaling: float = 1.0


AskForWeights = Callable[[Span, "WeightsIntake"], Awaitable[Weights]]
"""Ask a client for the weights of some blocks, and give what it sends to the intake, to the last part."""

ReadWeights = Callable[[Span], Awaitable[Weights]]
"""Read the weights of some blocks from where a server has them."""


class WeightsIntake:
    """Puts the parts of a client's adapter together; a context manager, which lets go of them at its end.

    What a tensor is called, its shape and its size are checked against the blocks before it is decoded. All
    that has come is counted for the client, among what peers make this process hold.
    """

    def __init__(
        self, executor: BlockExecutor, span: Span, max_bytes: int, resources: ResourceManager, peer: PeerId
    ) -> None:
        self._executor = executor
        self._span = span
        self._max_bytes = max_bytes
        self._max_tensors = MAX_TENSORS_PER_BLOCK * len(span)
        self._tensors: dict[str, Tensor] = {}
        self._held = resources.reserve(peer, Resource.BYTES, 0)

    async def take(self, part: AdapterPart, tensors: Sequence[Tensor]) -> Weights | None:
        """Return the whole with the last part.

        Raise `AdapterError` for what does not fit the blocks or is too large, `ResourceLimitError` when there
        is no room for it to arrive now.
        """
        if len(self._tensors) + len(tensors) > self._max_tensors:
            raise AdapterError(f"the adapter has more than {MAX_TENSORS_PER_BLOCK} tensors for each block")
        if not tensors and not part.last:
            raise ProtocolError("an adapter's part has no tensors and is not the last")
        for tensor in tensors:
            self._check(tensor)
            self._held.resize(self._held.amount + tensor.decoded_nbytes)
            self._tensors[tensor.name] = await self._executor.decode(tensor)
        if not part.last:
            return None
        return Weights(list(self._tensors.values()), part.scaling)

    def _check(self, tensor: Tensor) -> None:
        if self._held.amount + tensor.decoded_nbytes > self._max_bytes:
            raise AdapterError(
                f"the adapter takes more than {self._max_bytes} bytes, all that this server has for adapters "
                f"of one client; use a smaller one, or another server"
            )
        if tensor.name in self._tensors:
            raise AdapterError(f"the adapter has two tensors named {tensor.name!r}")
        self._executor.check_adapter(tensor.name, tensor.dtype, tensor.shape, self._span)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._tensors.clear()
        self._held.release()


async def ask_for_weights(channel: Channel, span: Span, intake: WeightsIntake) -> Weights:
    """An `AskForWeights` for a channel on which nothing else comes before its answer."""
    await channel.send(AdapterWanted(tuple(span)))
    while True:
        late = f"nothing more of the adapter's weights came for {PART_TIMEOUT:.0f} s"
        async with deadline_after(PART_TIMEOUT, late):
            message = await channel.receive()
        if not isinstance(message.record, AdapterPart):
            raise ProtocolError(f"a {message.kind} came where an adapter's weights were asked for")
        if (whole := await intake.take(message.record, message.tensors)) is not None:
            return whole


@attrs.define(eq=False)
class _CachedAdapter:
    adapter: Adapter | None
    """None when there are no weights for these blocks."""
    span: Span
    """What was asked for."""
    users: int = 0

    @property
    def nbytes(self) -> int:
        return self.adapter.nbytes if self.adapter is not None else 0


@attrs.define(eq=False)
class _Request:
    """Weights that one of the client's channels was asked for, while others wait for them."""

    span: Span
    over: asyncio.Event = attrs.field(factory=asyncio.Event)
    refusal: SwarmError | None = None
    """Why nobody needs to ask again."""


class AdapterStore:
    """Adapters of ``executor``. Those of clients take at most ``budget`` bytes, the least recently used go
    first; sessions and passes that use one hold it. Those that one client uses take at most half of it.

    A client's adapter is known by the peer that sent it and its version: nobody else gets it or can
    replace it. What is on its way is counted by ``resources``.
    """

    def __init__(
        self, executor: BlockExecutor, budget: int, resources: ResourceManager | None = None
    ) -> None:
        self.budget = budget
        self.share = budget // 2
        """Bytes of adapters that one client may use at a time."""
        self._resources = resources or ResourceManager()
        self.counters: Counter[str] = Counter()
        self._executor = executor
        self._sources: dict[str, ReadWeights] = {}
        self._named: dict[str, Adapter | None] = {}
        self._of_clients: dict[tuple[PeerId, str], list[_CachedAdapter]] = {}
        self._requested: dict[tuple[PeerId, str], list[_Request]] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters that it serves to everyone."""
        return tuple(sorted(self._named))

    @property
    def nbytes(self) -> int:
        """What clients' adapters take now."""
        return sum(cached.nbytes for versions in self._of_clients.values() for cached in versions)

    @property
    def in_use(self) -> int:
        """By how many sessions and passes clients' adapters are used."""
        return sum(cached.users for versions in self._of_clients.values() for cached in versions)

    async def load_named(self, name: str, read: ReadWeights) -> None:
        """Serve what ``read`` gives as ``name``, from now on. Raise what it raises, and `AdapterError`."""
        self._named[name] = await self._load(await read(self._executor.span))
        self._sources[name] = read

    async def change_span(self) -> None:
        """The executor has changed its blocks: read what is served by name for these.

        What cannot be read is not served any longer.
        """
        for name, read in self._sources.items():
            try:
                self._named[name] = await self._load(await read(self._executor.span))
            except Exception as exc:
                self._named.pop(name, None)
                logger.error("adapter %r cannot be served with blocks %s: %s", name, self._executor.span, exc)

    @asynccontextmanager
    async def obtain(
        self, peer: PeerId, name: AdapterName | None, span: Span, ask: AskForWeights
    ) -> AsyncIterator[Adapter | None]:
        """The adapter that ``peer`` means, for the blocks ``span``, to be used inside of the context.

        None when there is none, or it has no weights for these blocks. ``ask`` is called when it is not here,
        and not on its way. Raise `AdapterNotFoundError` for an unknown name, `AdapterError` for weights that
        do not fit, `ServerMemoryError` when there is no room, `DeadlineExceededError` when they do not come.
        """
        if name is None:
            yield None
        elif name.name:
            yield self._of_name(name.name)
        else:
            cached = await self._of_peer(peer, _checked(name.version), span, ask)
            try:
                yield cached.adapter
            finally:
                cached.users -= 1

    def _of_name(self, name: str) -> Adapter | None:
        try:
            return self._named[name]
        except KeyError:
            served = ", ".join(self.names) or "none"
            raise AdapterNotFoundError(
                f"this server has no adapter {name[:64]!r}; it serves {served}", adapters=list(self.names)
            ) from None

    async def _of_peer(self, peer: PeerId, version: str, span: Span, ask: AskForWeights) -> _CachedAdapter:
        """What the peer has sent, or sends now; counted as used once more."""
        if not self.budget:
            raise AdapterNotFoundError("this server takes no adapters of clients; use another one")
        key = peer, version
        while True:
            if (cached := self._find(key, span)) is not None:
                self.counters["adapter_hits"] += 1
                return cached
            coming = [each for each in self._requested.get(key, ()) if each.span.covers(span)]
            if not coming:
                return await self._fetch(key, span, ask)
            await coming[0].over.wait()
            if coming[0].refusal is not None:
                raise executor_error(coming[0].refusal)

    def _find(self, key: tuple[PeerId, str], span: Span) -> _CachedAdapter | None:
        for cached in self._of_clients.get(key, ()):
            if cached.span.covers(span):
                self._of_clients[key] = self._of_clients.pop(key)  # the last to go
                cached.users += 1
                return cached
        return None

    async def _fetch(self, key: tuple[PeerId, str], span: Span, ask: AskForWeights) -> _CachedAdapter:
        request = _Request(span)
        self._requested.setdefault(key, []).append(request)
        self.counters["adapters_asked"] += 1
        try:
            return await self._receive(key, span, ask)
        except SwarmError as exc:
            # An instance of its own: the traceback of this one holds what has come.
            refusal = executor_error(exc)
            if isinstance(exc, InputError | ServerMemoryError):
                request.refusal = refusal
            else:
                raise
        finally:
            request.over.set()
            self._requested[key].remove(request)
            if not self._requested[key]:
                del self._requested[key]
        raise executor_error(refusal)

    async def _receive(self, key: tuple[PeerId, str], span: Span, ask: AskForWeights) -> _CachedAdapter:
        intake = WeightsIntake(self._executor, span, self.share, self._resources, key[0])
        with intake:
            late = f"the weights of the adapter did not come within {ARRIVAL_TIMEOUT:.0f} s"
            async with deadline_after(ARRIVAL_TIMEOUT, late):
                weights = await ask(span, intake)
            cached = _CachedAdapter(await self._load(weights), span, users=1)
        self._add(key, cached)
        return cached

    async def _load(self, weights: Weights) -> Adapter | None:
        if not weights.tensors:
            return None
        try:
            return await self._executor.load_adapter(weights.tensors, weights.scaling)
        except Exception as exc:
            if not isinstance(exc, SwarmError):
                logger.exception("the executor failed to load an adapter")
            raise executor_error(exc) from exc

    def _add(self, key: tuple[PeerId, str], cached: _CachedAdapter) -> None:
        if cached.nbytes > self.share:
            raise AdapterError(
                f"the adapter takes {cached.nbytes} bytes here, and the server has {self.share} for adapters "
                f"of one client; use a smaller one, or another server"
            )
        same_peer = [other for other in self._of_clients if other[0] == key[0] and other != key]
        for old in same_peer[: max(0, len(same_peer) + 1 - MAX_OF_ONE_PEER)]:
            self._drop_unused(old)
        used = self._used_by(key[0])
        if used + cached.nbytes > self.share:
            raise ServerMemoryError(
                f"the adapter takes {cached.nbytes} bytes, and of the {self.share} that this server has for "
                f"adapters of one client {used} are in use by you; end some of your sessions"
            )
        for old in list(self._of_clients):
            if self.nbytes + cached.nbytes <= self.budget:
                break
            self._drop_unused(old)
        if self.nbytes + cached.nbytes > self.budget:
            raise ServerMemoryError(
                f"the adapter takes {cached.nbytes} bytes, and of the {self.budget} that this server has for "
                f"adapters of clients {self.nbytes} are in use; try again later, or another server"
            )
        self._of_clients[key] = [*self._of_clients.pop(key, ()), cached]

    def _used_by(self, peer: PeerId) -> int:
        """Bytes of a client's adapters that it uses: the others make room for anybody."""
        own = (cached for key, versions in self._of_clients.items() if key[0] == peer for cached in versions)
        return sum(cached.nbytes for cached in own if cached.users)

    def _drop_unused(self, key: tuple[PeerId, str]) -> None:
        used = [cached for cached in self._of_clients[key] if cached.users]
        self.counters["adapters_dropped"] += len(self._of_clients[key]) - len(used)
        if used:
            self._of_clients[key] = used
        else:
            del self._of_clients[key]

    def __repr__(self) -> str:
        peers = ", ".join(sorted({short(peer) for peer, _ in self._of_clients}))
        return (
            f"<AdapterStore {len(self._named)} named · {len(self._of_clients)} of {peers or 'nobody'} · "
            f"{self.nbytes}/{self.budget} bytes>"
        )


def _checked(version: str) -> str:
    if not _VERSION.fullmatch(version):
        raise AdapterError("an adapter is called by a name, or by its version of 32 hex digits")
    return version
