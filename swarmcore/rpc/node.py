"""A peer on the network: calls and channels out of it, and handlers for those that come in."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from functools import partial
from types import MappingProxyType, TracebackType
from typing import Any, cast

from swarmcore.errors import (
    ConnectionLostError,
    DeadlineExceededError,
    InputError,
    PeerNotAllowedError,
    ResourceLimitError,
    StreamClosedError,
    SwarmError,
    TooManyCallsError,
)
from swarmcore.identity import Identity
from swarmcore.resources import Reservation, Resource, ResourceManager
from swarmcore.resources.loop_stalls import LoopStalls
from swarmcore.rpc.channel import Channel
from swarmcore.rpc.dialing import dial, one_peer
from swarmcore.rpc.memory_stream import Loopback
from swarmcore.rpc.response_times import ResponseTimes
from swarmcore.rpc.serving import Server
from swarmcore.tasks import deadline_at
from swarmcore.transport import Stream, Transport
from swarmcore.types import Address, PeerId, short
from swarmcore.wire.failure import Failure, to_error, to_failure
from swarmcore.wire.framing import Message, decode_message, encode_message, kinds_of, tag_of
from swarmcore.wire.limits import MAX_ADDRESSES, Limits
from swarmcore.wire.method import Caller, Method, Protocol, Rep, Req
from swarmcore.wire.tensors import Tensor

logger = logging.getLogger(__name__)

_CLOSE_TIMEOUT = 5.0
_MAX_PATHS = 1024
_MAX_LOGGED_REFUSALS = 256  # in the log, one for each peer


class Node:
    """Identity, transports and handlers of one peer; both ends of every call in swarmcore are a node.

    ``allowed_peers`` closes the swarm: the node neither answers nor calls anybody else.
    ``limits.max_calls`` and ``max_calls_per_peer`` bound what remote peers have open here; above them they
    get `TooManyCallsError`. ``resources`` bounds what they make this process hold; it is shared with the
    transports, and with whatever else serves peers here.
    """

    def __init__(
        self,
        identity: Identity,
        transports: Sequence[Transport],
        *,
        limits: Limits | None = None,
        allowed_peers: Collection[PeerId] | None = None,
        resources: ResourceManager | None = None,
    ) -> None:
        self.identity = identity
        self.limits = limits or Limits()
        self.allowed_peers = None if allowed_peers is None else frozenset(allowed_peers)
        self.counters: Counter[str] = Counter()
        """What happened since the start, by name: calls_in, calls_out, refused."""
        self.response_times = ResponseTimes()
        """What `swarmcore.rpc.ping.probe` has learned of other peers."""
        self._transports = {transport.scheme: transport for transport in transports}
        self.resources = resources or ResourceManager.of_calls(
            self.limits.max_calls, self.limits.max_calls_per_peer
        )
        self.loop_stalls = LoopStalls()
        """What holds the event loop up, in programs that watch it."""
        for transport in transports:
            transport.resources = self.resources
        if self.allowed_peers is not None:
            for transport in transports:
                transport.allow_only(self.allowed_peers)
        self._addresses: dict[str, tuple[Address, ...]] = {}  # by scheme
        self._readdressed = asyncio.Event()
        self._server = Server(self.limits, self.resources)
        self._calls_out = 0
        self._paths: OrderedDict[PeerId, str] = OrderedDict()
        self._serving: dict[asyncio.Task[Any], None] = {}  # in order, so that a simulation repeats itself
        self._loopback = Loopback(identity.peer, self.limits, self._accept)
        self._logged_refusals: set[PeerId] = set()
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def peer(self) -> PeerId:
        return self.identity.peer

    @property
    def transports(self) -> tuple[Transport, ...]:
        return tuple(self._transports.values())

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Where others can dial this peer now; empty before `start`, and for a pure client.

        No more than fit into a record: where its transports have more, each has the same share.
        """
        ranked = [
            (place, address) for found in self._addresses.values() for place, address in enumerate(found)
        ]
        last = sorted(place for place, _ in ranked)[MAX_ADDRESSES - 1 : MAX_ADDRESSES] or [len(ranked)]
        return tuple(address for place, address in ranked if place <= last[0])[:MAX_ADDRESSES]

    @property
    def notes(self) -> tuple[str, ...]:
        """How this peer is reached, where that could be better (see `Transport.notes`), what it had to refuse
        for lack of room, and what holds its event loop up."""
        reached = (note for transport in self._transports.values() for note in transport.notes())
        return (*reached, *filter(None, (self.resources.note, self.loop_stalls.note)))

    @property
    def measures(self) -> dict[str, float]:
        """`counters`, and how often and for how many seconds at most the event loop was held up."""
        held_up = {"loop_held_up": self.loop_stalls.count, "loop_longest_hold_up": self.loop_stalls.longest}
        return {name: float(value) for name, value in {**self.counters, **held_up}.items()}

    async def addresses_other_than(self, known: Sequence[Address]) -> tuple[Address, ...]:
        """Wait until `addresses` are not ``known`` (any more); return them."""
        while self.addresses == tuple(known):
            await self._readdressed.wait()
        return self.addresses

    def _put_addresses(self, scheme: str, addresses: Sequence[Address]) -> None:
        self._addresses[scheme] = tuple(addresses)
        self._readdressed.set()
        self._readdressed = asyncio.Event()

    async def start(self) -> None:
        """Listen on every transport that has a place to listen on.

        Raise `AddressInUseError` or `AddressError` when one cannot; the node is then closed.
        """
        self.check_loop()
        try:
            for scheme, transport in self._transports.items():
                if transport.listen_on:
                    transport.on_addresses = partial(self._put_addresses, scheme)
                    self._put_addresses(scheme, await transport.listen(self._accept))
        except BaseException:
            await self.close()
            raise

    def check_loop(self) -> None:
        """Raise `InputError` on another event loop than the first one: there, awaiting it would never end."""
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
        elif self._loop is not loop:
            raise InputError(
                "this swarm was joined on another event loop, and can be used on that one only; elsewhere "
                "use swarmcore.sync, or asyncio.run_coroutine_threadsafe with the loop that it was joined on"
            )

    async def find_neighbours(self, on_found: Callable[[tuple[Address, ...]], None]) -> None:
        """Look for peers on the local network, over every transport that can, until closed.

        Raise `InputError` when none can, `UnavailableError` when this machine does not let it.
        """
        able = [transport for transport in self._transports.values() if transport.finds_neighbours]
        if not able:
            ours = ", ".join(self._transports) or "no transport"
            raise InputError(f"to find peers on the local network takes transport libp2p; there is {ours}")
        for transport in able:
            await transport.find_neighbours(on_found)

    async def close(self) -> None:
        """Cancel the handlers, abort all streams, close the transports. Harmless when repeated.

        Handlers have five seconds to clean up.
        """
        self._closed = True
        serving = [task for task in self._serving if task is not asyncio.current_task()]
        for task in serving:
            if not task.cancelling():
                task.cancel()
        if serving:
            _, late = await asyncio.wait(serving, timeout=_CLOSE_TIMEOUT)
            if late:
                logger.warning("%r: %d handlers did not end when they were cancelled", self, len(late))
        await self._loopback.close(_CLOSE_TIMEOUT, "this node is closed")
        await asyncio.gather(*(transport.close() for transport in self._transports.values()))

    async def __aenter__(self) -> Node:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    def serve(self, method: Method[Req, Rep], handler: Callable[[Req, Caller], Awaitable[Rep]]) -> None:
        """Answer ``method`` with what ``handler`` returns.

        A `SwarmError` it raises reaches the caller as the same class; anything else is logged here, and the
        caller gets `RemoteFaultError`. It is cancelled at the deadline and when the caller is gone.
        """
        self._server.add_call(method, handler)

    def serve_protocol(self, protocol: Protocol, handler: Callable[[Channel], Awaitable[None]]) -> None:
        """Give each channel of ``protocol`` to ``handler``; the channel is closed when it returns.

        Errors reach the other side as in `serve`. It is cancelled, once, when the channel breaks, is
        aborted, or this node closes, also while it waits in `Channel.receive`.
        """
        self._server.add_channel(protocol, handler)

    @property
    def served(self) -> Server:
        """The methods and protocols that this node answers to."""
        return self._server

    async def call(
        self,
        to: Address | Sequence[Address],
        method: Method[Req, Rep],
        request: Req,
        *,
        timeout: float = 10.0,
        elsewhere: bool = False,
    ) -> Rep:
        """Call ``method`` on the peer at ``to`` and return its reply.

        ``to`` may be several addresses of one peer: see `swarmcore.rpc.dialing.dial` for who is tried when.
        Raise `PeerUnreachableError` when none answers, `UnknownTransportError` when this node has no
        transport for any of them, `DeadlineExceededError` after ``timeout`` seconds, the remote's own error
        when it failed (its ``origin`` is then the peer's id). Cancelling the call cancels the remote's
        handler. A peer that calls itself does so inside the process; with ``elsewhere`` the addresses are
        dialled all the same, to see who else answers to its id.
        """
        deadline = asyncio.get_running_loop().time() + timeout
        stream = await self._dial(to, deadline, elsewhere=elsewhere)
        self._calls_out += 1
        try:
            async with deadline_at(deadline, lambda: _too_late(stream, method.name, timeout)):
                await _send_opening(stream, request, (), self.limits, method.name, deadline)
                data = await stream.receive()
            await stream.close()
        except StreamClosedError as exc:
            await stream.close()
            raise ConnectionLostError(f"{short(stream.remote)} ended {method.name} without a reply") from exc
        except BaseException as exc:
            stream.abort(f"the caller gave up: {type(exc).__name__}")
            raise
        finally:
            self._calls_out -= 1
        message = decode_message(data, kinds_of(method.reply, Failure), self.limits)
        if isinstance(message.record, Failure):
            raise to_error(message.record, stream.remote)
        return cast(Rep, message.record)

    async def open(
        self,
        to: Address | Sequence[Address],
        protocol: Protocol,
        opening: Any,
        *tensors: Tensor,
        timeout: float = 10.0,
    ) -> Channel:
        """Open a channel to the peer at ``to`` and send ``opening``; raises as `call` does.

        The remote's consent is not awaited: a refusal is raised by the first `Channel.receive`. ``timeout``
        bounds the dialling and the opening message, not the life of the channel.
        """
        if type(opening) not in protocol.openings:
            raise InputError(f"a {type(opening).__name__} record does not open {protocol.name}")
        deadline = asyncio.get_running_loop().time() + timeout
        stream = await self._dial(to, deadline)
        try:
            async with deadline_at(deadline, lambda: _too_late(stream, protocol.name, timeout)):
                await _send_opening(stream, opening, tensors, self.limits, protocol.name)
        except BaseException as exc:
            stream.abort(f"the caller gave up: {type(exc).__name__}")
            raise
        self._calls_out += 1
        return Channel(
            stream,
            Message(tag_of(type(opening)), opening, tensors),
            self.limits,
            sends=protocol.to_acceptor,
            receives=protocol.to_opener,
            on_close=self._channel_closed,
        )

    def _channel_closed(self) -> None:
        self._calls_out -= 1

    async def _dial(
        self, to: Address | Sequence[Address], deadline: float, *, elsewhere: bool = False
    ) -> Stream:
        self.check_loop()
        if self._closed:
            raise StreamClosedError("this node is closed")
        peer, addresses = one_peer(to)
        if not self._allows(peer):
            raise PeerNotAllowedError(f"{short(peer)} is not among the allowed peers of this closed swarm")
        self.counters["calls_out"] += 1
        if peer == self.peer and not elsewhere:
            return self._loopback.open_stream()
        stream = await dial(self._transports, addresses, deadline)
        self._paths[peer] = stream.path
        self._paths.move_to_end(peer)
        if len(self._paths) > _MAX_PATHS:
            self._paths.popitem(last=False)
        return stream

    @property
    def paths(self) -> Mapping[PeerId, str]:
        """How each of the last thousand peers called was reached, as in `Stream.path`."""
        return MappingProxyType(self._paths)

    def allow_only(self, peers: Collection[PeerId]) -> None:
        """The swarm is closed to all but ``peers`` from now on; calls that are under way go on."""
        self.allowed_peers = frozenset(peers)
        for transport in self._transports.values():
            transport.allow_only(self.allowed_peers)

    def _allows(self, peer: PeerId) -> bool:
        return self.allowed_peers is None or peer in self.allowed_peers or peer == self.peer

    async def _accept(self, stream: Stream) -> None:
        task = asyncio.current_task()
        assert task is not None
        peer = stream.remote
        self._serving[task] = None
        try:
            try:
                call = self._admitted(peer)
            except SwarmError as refusal:
                self.counters["refused"] += 1
                await self._server.refuse(stream, to_failure(refusal))
                return
            self.counters["calls_in"] += 1
            with call:
                await self._server.serve(stream)
        finally:
            del self._serving[task]

    def _admitted(self, peer: PeerId) -> Reservation:
        """Room for one more call of ``peer``; raise what it is to hear where there is none."""
        if not self._allows(peer):
            if peer not in self._logged_refusals and len(self._logged_refusals) < _MAX_LOGGED_REFUSALS:
                self._logged_refusals.add(peer)
                logger.info("%s was refused: it is not on the list of this closed swarm", peer)
            raise PeerNotAllowedError(
                f"this swarm is closed; ask its owner to allow {peer}, and keep that identity: "
                f"without --identity FILE a client has another one at each start"
            )
        try:
            return self.resources.reserve(peer, Resource.STREAMS)
        except ResourceLimitError as exc:
            if (yours := self.resources.used(Resource.STREAMS, peer)) >= exc.limit:
                message = f"you have {yours} calls open on this peer, its limit; end some first"
            else:
                message = f"the peer serves {exc.limit} calls, its limit; retry later or elsewhere"
            raise TooManyCallsError(message) from exc

    def __repr__(self) -> str:
        schemes = "+".join(self._transports) or "no transport"
        calls_in = self.resources.used(Resource.STREAMS)
        return f"<Node {short(self.peer)} {schemes} {calls_in} calls in {self._calls_out} out>"


async def _send_opening(
    stream: Stream,
    record: Any,
    tensors: Sequence[Tensor],
    limits: Limits,
    method: str,
    deadline: float | None = None,
) -> None:
    timeout = None
    if deadline is not None:
        timeout = max(deadline - asyncio.get_running_loop().time(), 0.001)
    buffers = encode_message(record, tensors, limits, method=method, timeout=timeout)
    # A peer that refuses has closed the stream by now; its reason waits to be received.
    with contextlib.suppress(StreamClosedError):
        await stream.send(*buffers)


def _too_late(stream: Stream, name: str, timeout: float) -> DeadlineExceededError:
    stream.abort("the caller's deadline passed")
    return DeadlineExceededError(f"{short(stream.remote)} did not answer {name} within {timeout:.3g} s")
