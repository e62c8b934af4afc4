"""Peers that dial each other back, to find out which addresses can be reached from outside.

The library's AutoNAT answers "reachable" for a closed port, because it counts the connection that is there
already. Here the peer that is asked makes a fresh one, as far as the proof of who answers, and closes it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TypeVar

import attrs
import trio
from libp2p.abc import INetConn, INetStream
from libp2p.custom_types import TProtocol
from libp2p.peer.id import ID
from libp2p.utils.varint import encode_varint_prefixed, read_varint_prefixed_bytes_limited
from multiaddr import Multiaddr

from swarmcore.errors import PeerUnreachableError
from swarmcore.types import PeerId, short
from swarmcore.wire.framing import decode_record, encode_record
from swarmcore_transports.libp2p.host import Host, remote_host
from swarmcore_transports.libp2p.multiaddrs import port_of, reach, tcp_multiaddr
from swarmcore_transports.libp2p.patches.host import reset

ASK_AGAIN_SECONDS = 600.0
"""How long an answer stands before its peer, or another one, is asked again."""

EXPIRY_SECONDS = 2 * ASK_AGAIN_SECONDS
"""How long an answer counts when nobody can be asked again."""

SILENCE_SECONDS = 1800.0
"""How long a peer that did not answer is left alone."""

ANSWERS_WANTED = 3
"""As many peers are asked as needed to have this many answers."""


@attrs.frozen
class Answer:
    """What one peer found: the addresses it tried, and those at which it reached this peer."""

    tried: frozenset[Multiaddr]
    reached: frozenset[Multiaddr]
    at: float


class Reachability:
    """A plain object: answers of peers in, the verdict and whom to ask next out. ``now`` is in seconds."""

    def __init__(self) -> None:
        self._answers: dict[PeerId, Answer] = {}
        self._unanswered: dict[PeerId, float] = {}

    def __repr__(self) -> str:
        tried = {address for answer in self._answers.values() for address in answer.tried}
        return f"<Reachability {len(self._answers)} answers about {len(tried)} addresses>"

    def answered(
        self, by: PeerId, tried: Iterable[Multiaddr], reached: Iterable[Multiaddr], now: float
    ) -> None:
        """``by`` has tried addresses, and reached some of them; this replaces what it said before."""
        self._unanswered.pop(by, None)
        tried = frozenset(tried)
        self._answers[by] = Answer(tried, tried & frozenset(reached), now)

    def no_answer(self, by: PeerId, now: float) -> None:
        """``by`` was asked and gave no answer; what it said before still counts."""
        self._unanswered[by] = now

    def clear(self) -> None:
        """Own addresses have changed: no answer stands any longer."""
        self._answers.clear()
        self._unanswered.clear()

    def to_ask(self, connected: Sequence[PeerId], now: float) -> list[PeerId]:
        """Which of ``connected`` to ask now; those that have never answered come first."""
        self._drop_old(now)
        fresh = [by for by, answer in self._answers.items() if now - answer.at < ASK_AGAIN_SECONDS]
        free = [by for by in connected if by not in fresh and by not in self._unanswered]
        free.sort(key=lambda by: by in self._answers)
        return free[: max(0, ANSWERS_WANTED - len(fresh))]

    def verified(self, now: float) -> list[Multiaddr]:
        """The addresses at which at least as many peers reached this one as failed to."""
        self._drop_old(now)
        votes: dict[Multiaddr, int] = {}
        for answer in self._answers.values():
            for address in answer.tried:
                votes[address] = votes.get(address, 0) + (1 if address in answer.reached else -1)
        reached = {address for answer in self._answers.values() for address in answer.reached}
        return sorted((address for address in reached if votes[address] >= 0), key=str)

    def is_reachable(self, now: float) -> bool | None:
        """Whether peers outside reach this one; None as long as none has tried."""
        verified = self.verified(now)
        return bool(verified) if self._answers else None

    def next_change_at(self, now: float) -> float:
        """When `to_ask` or `verified` will change by the passing of time alone."""
        moments = [answer.at + EXPIRY_SECONDS for answer in self._answers.values()]
        moments += [answer.at + ASK_AGAIN_SECONDS for answer in self._answers.values()]
        moments += [at + SILENCE_SECONDS for at in self._unanswered.values()]
        return min((moment for moment in moments if moment > now), default=float("inf"))

    def _drop_old(self, now: float) -> None:
        self._answers = {by: a for by, a in self._answers.items() if now - a.at < EXPIRY_SECONDS}
        self._unanswered = {by: at for by, at in self._unanswered.items() if now - at < SILENCE_SECONDS}


logger = logging.getLogger(__name__)

Record = TypeVar("Record")

PROTOCOL = TProtocol("/swarmcore/dialback/1")

MAX_PORTS = 8
"""Most ports dialled for one request; further ones are ignored."""

_MIN_INTERVAL_SECONDS = 15.0
"""A peer is dialled back at most this often, and all at one IP address `_MAX_PER_HOST` times a minute."""

_MAX_PER_HOST = 8
_MINUTE = 60.0
_MAX_RECENT = 4096
_MAX_CONCURRENT_DIALS = 8

_DIAL_SECONDS = 3.0
_ANSWER_SECONDS = 10.0
_CLOSE_SECONDS = 1.0
_MAX_MESSAGE = 1024


@attrs.frozen
class DialBackRequest:
    """Dial the address that you see me at, at these ports."""

    ports: tuple[int, ...] = ()


@attrs.frozen
class DialBackReply:
    """Which ports answered at ``host``, the IP address at which the asker is seen."""

    host: str = ""
    reached: tuple[int, ...] = ()
    refused: str = ""
    """Why nothing was dialled; empty when it was."""


class DialBackRateLimiter:
    """A plain object: who may be dialled back at the moment. What it remembers is bounded."""

    def __init__(self) -> None:
        self._recent: dict[PeerId, tuple[float, str]] = {}

    def admit(self, peer: PeerId, host: str, now: float) -> str:
        """Why ``peer``, seen at ``host``, is not dialled; empty, and counted, when it is."""
        self._recent = {by: (at, of) for by, (at, of) in self._recent.items() if now - at < _MINUTE}
        at, _ = self._recent.get(peer, (float("-inf"), ""))
        if now - at < _MIN_INTERVAL_SECONDS:
            return f"asked less than {_MIN_INTERVAL_SECONDS:g} s ago"
        if sum(of == host for _, of in self._recent.values()) >= _MAX_PER_HOST:
            return f"{host} was dialled {_MAX_PER_HOST} times in a minute"
        if len(self._recent) >= _MAX_RECENT:
            return "too many peers ask"
        self._recent[peer] = (now, host)
        return ""


class AutoNat:
    """Asks peers to dial this one back, puts what they reach into `Host.addresses`, and dials those that ask.

    Lives in trio.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._rate_limiter = DialBackRateLimiter()
        self._dial_slots = trio.CapacityLimiter(_MAX_CONCURRENT_DIALS)
        self._checked_ports: set[int] = set()
        self._wake_event = trio.Event()
        self.reachability = Reachability()
        self.status = "nobody has tried to reach this peer from outside"
        """Whether this peer is reached from outside, in words."""

    # --- asking ---------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve, and ask connected peers whenever there is something to ask."""
        self._host.serve(PROTOCOL, self._handle_request)
        self._host.events.on_connected.append(lambda connection: self._wake_event.set())
        self._host.addresses.subscribe(lambda: self._wake_event.set())
        while True:
            self._wake_event = trio.Event()
            ports = self._ports()
            if ports != self._checked_ports:
                self._checked_ports = ports
                self.reachability.clear()
            if ports:
                await self._request_due(sorted(ports))
            self._update_status()
            with trio.CancelScope(deadline=self.reachability.next_change_at(trio.current_time())):
                await self._wake_event.wait()

    def network_changed(self) -> None:
        """This machine is on another network: what peers have found out before is no longer so."""
        self.reachability.clear()
        self._wake_event.set()

    def _update_status(self) -> None:
        now = trio.current_time()
        verified = self.reachability.verified(now)
        is_reachable = self.reachability.is_reachable(now)
        if is_reachable is None:
            status = "nobody has tried to reach this peer from outside"
        elif is_reachable:
            status = f"reachable from outside at {', '.join(map(str, verified))}"
        else:
            status = "not reachable from outside: no peer that tried got through"
        if status != self.status:
            self.status = status
            logger.info("%s is %s", short(self._host.peer), status)
        self._host.addresses.put("verified", verified)

    def _ports(self) -> set[int]:
        own = [*self._host.addresses.of("mapped"), *self._host.addresses.of("listening")]
        return set([port_of(address) for address in own if reach(address) != "loopback"][:MAX_PORTS])

    async def _request_due(self, ports: list[int]) -> None:
        outside = {}
        for connection in self._host.swarm.get_connections():
            seen_at = remote_host(connection)
            if seen_at and reach(tcp_multiaddr(seen_at, 1)) == "public":
                outside[PeerId(str(connection.muxed_conn.peer_id))] = connection
        due = self.reachability.to_ask(list(outside), trio.current_time())
        async with trio.open_nursery() as nursery:
            for peer in due:
                nursery.start_soon(self._request_one, peer, outside[peer], ports)

    async def _request_one(self, peer: PeerId, connection: INetConn, ports: list[int]) -> None:
        now = trio.current_time()
        try:
            reply = await self.request_dial_back(connection, ports)
            tried = [tcp_multiaddr(reply.host, port) for port in ports]
            if reach(tried[0]) != "public":
                raise PeerUnreachableError(f"it sees this peer at {reply.host}, which is not public")
            reached = [tcp_multiaddr(reply.host, port) for port in ports if port in reply.reached]
        except Exception as exc:
            logger.debug("%s does not dial back: %r", short(peer), exc)
            self.reachability.no_answer(peer, now)
        else:
            self.reachability.answered(peer, tried, reached, now)

    async def request_dial_back(self, connection: INetConn, ports: list[int]) -> DialBackReply:
        """Have the peer of ``connection`` dial back at ``ports``.

        Raise `PeerUnreachableError` when it refuses, and whatever libp2p raises when it does not answer.
        """
        with trio.fail_after(_ANSWER_SECONDS):
            stream = await self._host.open_stream_on(connection, PROTOCOL)
            try:
                await _write(stream, DialBackRequest(tuple(ports)))
                reply: DialBackReply = await _read(stream, DialBackReply)
            finally:
                await reset(stream)
        if reply.refused:
            raise PeerUnreachableError(f"{short(str(stream.muxed_conn.peer_id))} refuses: {reply.refused}")
        return reply

    # --- answering ------------------------------------------------------------------------------------

    async def _handle_request(self, stream: INetStream) -> None:
        """Dial the IP address that the asker's own connection comes from, and no other."""
        with trio.fail_after(_ANSWER_SECONDS):
            request: DialBackRequest = await _read(stream, DialBackRequest)
            peer = stream.muxed_conn.peer_id
            at = remote_host(self._host.connection_of(stream))
            if at is None:
                reply = DialBackReply(refused="only those that are connected directly are dialled back")
            elif not self._host.allows(PeerId(str(peer))):
                reply = DialBackReply(refused="this swarm is closed; ask its owner to be allowed")
            elif refused := self._rate_limiter.admit(PeerId(str(peer)), at, trio.current_time()):
                reply = DialBackReply(refused=refused)
            else:
                ports = [port for port in dict.fromkeys(request.ports) if 0 < port < 2**16][:MAX_PORTS]
                reply = DialBackReply(at, await self._dial_ports(peer, at, ports))
            await _write(stream, reply)
            await stream.close()

    async def _dial_ports(self, peer: ID, at: str, ports: list[int]) -> tuple[int, ...]:
        reached = []

        async def dial(port: int) -> None:
            if await self._dial_back(peer, tcp_multiaddr(at, port)):
                reached.append(port)

        async with self._dial_slots, trio.open_nursery() as nursery:
            for port in ports:
                nursery.start_soon(dial, port)
        return tuple(sorted(reached))

    async def _dial_back(self, peer: ID, address: Multiaddr) -> bool:
        """Whether ``peer`` proves itself at ``address``.

        The connection never becomes one of the host's: no stream could land on it before it is closed.
        """
        connection = None
        try:
            with trio.fail_after(_DIAL_SECONDS):
                connection = await self._host.dial_raw(address)
                await self._host.swarm.upgrader.upgrade_security(connection, True, peer)
            return True
        except Exception as exc:
            logger.debug("dialling %s back at %s: %r", short(str(peer)), address, exc)
            return False
        finally:
            if connection is not None:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + _CLOSE_SECONDS):
                    await connection.close()


async def _write(stream: INetStream, record: DialBackRequest | DialBackReply) -> None:
    await stream.write(encode_varint_prefixed(encode_record(record)))


async def _read(stream: INetStream, record_type: type[Record]) -> Record:
    data = await read_varint_prefixed_bytes_limited(stream, _MAX_MESSAGE)
    record: Record = decode_record(data, record_type)
    return record
