"""The client of relays: reservations at one or two of them, and dialling peers that have one."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterable
from itertools import islice

import trio
from libp2p.abc import INetStream
from libp2p.connection_types import ConnectionType
from libp2p.host.exceptions import StreamFailure
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, StopMessage
from libp2p.relay.circuit_v2.pb.circuit_pb2 import PeerId as PeerMessage
from libp2p.relay.circuit_v2.protocol import PROTOCOL_ID as HOP
from libp2p.relay.circuit_v2.protocol import STOP_PROTOCOL_ID as STOP
from libp2p.relay.circuit_v2.protocol_buffer import StatusCode, to_proto_status
from libp2p.relay.circuit_v2.utils import read_delimited_msg, write_delimited_msg
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from swarmcore.errors import PeerIdentityError, PeerUnreachableError
from swarmcore.types import PeerId, short
from swarmcore_transports.libp2p.host import Host
from swarmcore_transports.libp2p.multiaddrs import circuit_addresses, relay_of
from swarmcore_transports.libp2p.patches.host import reset
from swarmcore_transports.libp2p.relay.plan import RelayPlan
from swarmcore_transports.libp2p.translation import translated

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.5
"""py-libp2p tells nobody when it has learnt what a peer offers, so all that is left is to look."""

_OK = to_proto_status(StatusCode.OK)
_ANSWER_SECONDS = 10.0
_RESET_SECONDS = 1.0
_MAX_RELAY_ADDRESSES = 16
"""Addresses that a relay may tell of itself; further ones are not looked at."""

_REFUSALS = {
    StatusCode.NO_RESERVATION: "it has no reservation for that peer, which is gone or has another relay now; "
    "look its addresses up anew",
    StatusCode.RESOURCE_LIMIT_EXCEEDED: "it has no room for a further circuit; try later or by another relay",
    StatusCode.PERMISSION_DENIED: "it does not relay for this peer; have its owner allow it "
    "(--allow-peer), or use another relay",
    StatusCode.CONNECTION_FAILED: "the peer behind it did not answer; it may be leaving",
    StatusCode.RESERVATION_REFUSED: "it takes no more reservations; use another relay",
}


class RelayClient:
    """Keeps this peer reachable through relays, and reaches others through theirs. Lives in trio.

    ``preferred`` are relays to prefer, with where they are. Others are found among the connected peers.
    """

    def __init__(self, host: Host, preferred: Iterable[tuple[Multiaddr, PeerId]] = ()) -> None:
        self._host = host
        self._locations = {relay: location for location, relay in preferred if relay != host.peer}
        self._plan = RelayPlan(self._locations, random.Random())
        self._wake_event = trio.Event()
        self.refusal = ""
        """Why the last relay that was asked gave no reservation; empty when it did."""

    def __repr__(self) -> str:
        return f"<RelayClient {self._plan!r}>"

    # --- reservations ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """While this peer listens and is not public, keep reservations; their addresses become the host's."""
        self._host.serve(STOP, self._accept_circuit)
        self._host.addresses.subscribe(self._wake)
        self._host.events.on_disconnected.append(lambda connection: self._wake())
        async with trio.open_nursery() as nursery:
            while True:
                self._wake_event = trio.Event()
                now = trio.current_time()
                self._plan.update_connected(self._connected_relays(), now)
                wanted = bool(self._host.addresses.of("listening")) and not self._host.addresses.public
                if wanted:
                    for relay in self._plan.next_requests(now):
                        nursery.start_soon(self._obtain_reservation, relay)
                self._update_addresses(wanted)
                with trio.move_on_after(_POLL_SECONDS):
                    await self._wake_event.wait()

    def network_changed(self) -> None:
        """This machine is on another network: relays that could not be reached may be by now."""
        self._plan.retry_all(trio.current_time())
        self._wake()

    def _wake(self) -> None:
        self._wake_event.set()

    def _update_addresses(self, wanted: bool) -> None:
        reservations = self._plan.reservations().values() if wanted else ()
        self._host.addresses.put(
            "relayed", [address for reservation in reservations for address in reservation.addresses]
        )

    def _connected_relays(self) -> list[PeerId]:
        """The directly connected peers that say that they relay, or have given a reservation already."""
        connected = []
        kept = self._plan.reservations()
        for peer in self._host.libp2p.get_connected_peers():
            name = PeerId(str(peer))
            if self._host.connections(peer, direct=True) and (name in kept or self._host.supports(peer, HOP)):
                connected.append(name)
        return connected

    async def _obtain_reservation(self, relay: PeerId) -> None:
        try:
            with trio.fail_after(self._host.limits.connect_timeout + _ANSWER_SECONDS):
                addresses, seconds = await self._reserve(relay)
        except Exception as exc:
            reason = f"no answer within {_ANSWER_SECONDS:g} s" if isinstance(exc, trio.TooSlowError) else exc
            self.refusal = f"no reservation at the relay {short(relay)}: {reason}"
            logger.info("%s", self.refusal)
            self._plan.refused(relay, trio.current_time())
        else:
            self.refusal = ""
            logger.info("the relay %s has given a reservation for %g s", short(relay), seconds)
            self._plan.granted(relay, addresses, seconds, trio.current_time())
        self._update_addresses(not self._host.addresses.public)

    async def _reserve(self, relay: PeerId) -> tuple[list[Multiaddr], float]:
        """Ask ``relay`` for a reservation: this peer's addresses there, and for how many seconds."""
        peer = ID.from_string(relay)
        if location := self._locations.get(relay):
            await self._host.connect(peer, location, direct=True)
        elif not self._host.connections(peer, direct=True):
            raise PeerUnreachableError("it is not connected any more, and where it is is not known")
        stream, answer = await self._request(peer, HopMessage(type=HopMessage.RESERVE))
        await reset(stream)
        stated = list(_valid_multiaddrs(answer.reservation.addrs))
        addresses = circuit_addresses(relay, [*stated, *self._addresses_of(peer)])
        if not addresses:
            raise PeerUnreachableError("it tells no address at which others could reach it")
        self._locations.setdefault(relay, relay_of(addresses[0])[0])
        # The relay speaks of the time of day.
        return addresses, answer.reservation.expire - time.time()

    def _addresses_of(self, relay: ID) -> list[Multiaddr]:
        """Where ``relay`` has been reached from here."""
        if location := self._locations.get(PeerId(str(relay))):
            return [location]
        return self._host.dialled_addresses(relay)

    async def _accept_circuit(self, stream: INetStream) -> None:
        """A relay at which this peer has a reservation offers a circuit from somebody."""
        relay = stream.muxed_conn.peer_id
        with trio.fail_after(_ANSWER_SECONDS):
            offer = await read_delimited_msg(stream, StopMessage)
            reservation = self._plan.reservations().get(PeerId(str(relay)))
            taken = offer.type == StopMessage.CONNECT and reservation is not None
            status = StatusCode.OK if taken else StatusCode.PERMISSION_DENIED
            await write_delimited_msg(
                stream, StopMessage(type=StopMessage.STATUS, status=to_proto_status(status))
            )
        if reservation is None or not taken:
            await stream.close()
            return
        source = ID(offer.peer.id)
        at = Multiaddr(f"{reservation.addresses[0]}/p2p/{source}")
        raw = RawConnection(stream, False, ConnectionType.RELAYED, [at])
        muxed = await self._host.libp2p.upgrade_inbound_connection(raw, at)
        if muxed.peer_id == source:
            await muxed.event_closed.wait()  # type: ignore[attr-defined]
            # py-libp2p lets the stream go when its handler returns
        else:
            logger.info("the relay %s lied about who dials: not %s", short(str(relay)), short(str(source)))
            with trio.move_on_after(_RESET_SECONDS):
                await muxed.close()
        await reset(stream)

    # --- dialling -------------------------------------------------------------------------------------

    async def dial(self, peer: ID, multiaddr: Multiaddr) -> None:
        """Make a relayed connection to ``peer`` at ``multiaddr``, ``/…/p2p/RELAY/p2p-circuit/p2p/PEER``.

        Raise `PeerUnreachableError` when the relay cannot be reached or refuses, `PeerIdentityError` when
        another peer than ``peer`` is behind it.
        """
        location, relay = relay_of(multiaddr)
        if relay == self._host.peer:
            raise PeerUnreachableError(
                f"{short(str(peer))} is reached through this very peer, and has left it; "
                f"look its addresses up anew"
            )
        relay_id = ID.from_string(relay)
        ask = HopMessage(type=HopMessage.CONNECT, peer=PeerMessage(id=peer.to_bytes()))
        try:
            with trio.fail_after(self._host.limits.connect_timeout):
                await self._host.connect(relay_id, location, direct=True)
        except Exception as exc:
            reason = translated(exc).message if not isinstance(exc, trio.TooSlowError) else "no answer"
            raise PeerUnreachableError(
                f"cannot reach {short(relay)} at {location}, the relay of {short(str(peer))}: {reason}; "
                f"look the peer's addresses up anew, it may use another relay"
            ) from exc
        stream, _ = await self._request(relay_id, ask)
        try:
            raw = RawConnection(stream, True, ConnectionType.RELAYED, [multiaddr])
            with trio.fail_after(self._host.limits.connect_timeout):
                await self._host.libp2p.upgrade_outbound_connection(raw, peer)
        except BaseException as exc:
            await reset(stream)
            if not isinstance(exc, Exception):
                raise
            error = translated(exc)
            if isinstance(error, PeerIdentityError):
                raise
            late = isinstance(exc, trio.TooSlowError)
            reason = f"no answer within {self._host.limits.connect_timeout:g} s" if late else error.message
            raise PeerUnreachableError(
                f"the relay {short(relay)} has connected {short(str(peer))}, but then: {reason}; try again, "
                f"or by another relay"
            ) from exc

    async def _request(self, relay: ID, message: HopMessage) -> tuple[INetStream, HopMessage]:
        """What ``relay`` says, and on which stream. Raise `PeerUnreachableError` if it refuses."""
        name = short(str(relay))
        stream: INetStream | None = None
        try:
            with trio.fail_after(_ANSWER_SECONDS):
                stream = await self._host.new_stream(relay, HOP)
                await write_delimited_msg(stream, message)
                answer = await read_delimited_msg(stream, HopMessage)
            if answer.status != _OK:
                raise PeerUnreachableError(f"the relay {name} refuses: {_describe_status(answer.status)}")
        except BaseException as exc:
            if stream:
                await reset(stream)
            if isinstance(exc, StreamFailure):
                raise PeerUnreachableError(f"{name} relays for nobody; use another relay") from exc
            if isinstance(exc, trio.TooSlowError):
                raise PeerUnreachableError(
                    f"the relay {name} did not answer within {_ANSWER_SECONDS:g} s; use another relay"
                ) from exc
            if isinstance(exc, Exception) and not isinstance(exc, PeerUnreachableError):
                reason = translated(exc).message
                raise PeerUnreachableError(
                    f"the relay {name} broke off: {reason}; use another relay"
                ) from exc
            raise
        return stream, answer


def _describe_status(status: int) -> str:
    try:
        known = StatusCode(status)
    except ValueError:
        return f"status {status}"
    return _REFUSALS.get(known, known.name)


def _valid_multiaddrs(stated: Iterable[bytes]) -> Iterable[Multiaddr]:
    """The addresses among ``stated`` that are ones."""
    for data in islice(stated, _MAX_RELAY_ADDRESSES):
        try:
            address = Multiaddr(data)
            str(address)  # parses it
        except (MultiaddrError, ValueError):
            continue
        yield address
