"""Trickle ICE (RFC 8838): candidates of this machine are sent at once, those of servers as they come.

https://www.rfc-editor.org/rfc/rfc8838 for trickling, https://www.rfc-editor.org/rfc/rfc8445 for the checks.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

from aioice import Candidate, Connection, TransportPolicy, stun
from aioice.candidate import candidate_foundation, candidate_priority
from aioice.ice import CandidatePair, StunProtocol, relayed_candidate

from swarmcore.tasks import cancel_and_wait
from swarmcore_transports.webrtc.aiortc.sockets import read_in_batches, watch_refusals
from swarmcore_transports.webrtc.ice import IceServer
from swarmcore_transports.webrtc.sdp import MAX_CANDIDATES

logger = logging.getLogger(__name__)

SERVER_SECONDS = 5.0
"""How long STUN and TURN servers are waited for."""

RELAY_PATIENCE = 0.75
"""Seconds for which paths through a TURN server stand back for direct ones: the first that works is taken."""

MAX_REMOTE = 3 * MAX_CANDIDATES
"""Most addresses at which the peer is looked for: described, told later, and where its checks come from."""


class TrickleIceAgent(Connection):
    """aioice's side of a connection, which gathers in the background.

    `gather_candidates` returns with what this machine knows by itself; with ``relay_only``, with the first
    candidate of a TURN server. ``on_candidate`` is called with each that a server brings, and with None at
    the end. STUN servers are asked over IPv6 as well. Checks of a peer from ever more addresses are dropped
    beyond `MAX_REMOTE`. Once connected, it closes when the peer's port is found to be closed.
    """

    def __init__(
        self,
        servers: Sequence[IceServer],
        on_candidate: Callable[[Candidate | None], None],
        *,
        relay_only: bool = False,
        controlling: bool = False,
    ) -> None:
        policy = TransportPolicy.RELAY if relay_only else TransportPolicy.ALL
        super().__init__(controlling, transport_policy=policy)
        self._servers = tuple(servers)
        self._relay_only = relay_only
        self._on_candidate = on_candidate
        self._some_found = asyncio.Event()
        self._querying: asyncio.Task[None] | None = None
        self._probing: asyncio.Task[None] | None = None
        self._refusals = 0
        self.relay_failure: str | None = None
        """Why the latest TURN server that failed relays nothing."""
        self._checks: WeakKeyDictionary[CandidatePair, stun.Message] = WeakKeyDictionary()
        self.gathering = True
        """Whether more candidates may come."""

    async def gather_candidates(self) -> None:
        await super().gather_candidates()  # it knows of no servers
        if self._querying is None:
            for protocol in self._protocols:
                read_in_batches(protocol, protocol.transport)
            self._querying = asyncio.create_task(self._query_servers())
        if not self._local_candidates:
            await self._some_found.wait()

    def hurry(self) -> None:
        """Let `gather_candidates` return with what there is."""
        self._some_found.set()

    async def _query_servers(self) -> None:
        bases = list(self._protocols)
        asking = [asyncio.create_task(self._relayed(one)) for one in self._servers if one.relays]
        asking += [
            asyncio.create_task(self._reflexive(base, one))
            for base in bases
            for one in self._servers
            if not (one.relays or self._relay_only)
        ]
        try:
            if asking:
                await asyncio.wait(asking, timeout=SERVER_SECONDS)
        finally:
            for task in asking:
                task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        self.gathering = False
        self._some_found.set()
        self._on_candidate(None)
        # All pairs may have failed while more candidates were to come; now none are (RFC 8838, 8.1.1).
        if self._early_checks_done and not self._check_list_maybe_complete():
            self._check_list_maybe_fail()

    async def _relayed(self, server: IceServer) -> None:
        try:
            candidate, protocol = await relayed_candidate(
                component=1,
                hide_related_address=self._relay_only,
                protocol_factory=lambda: StunProtocol(self),
                turn_server=(server.host, server.port),
                turn_username=server.user,
                turn_password=server.password,
                turn_ssl=server.scheme == "turns",
                turn_transport=server.transport,
            )
        except (OSError, stun.TransactionError, ValueError) as exc:
            self.relay_failure = f"TURN server {server}: {str(exc) or 'no answer'}"
            logger.info("no relay by %s", self.relay_failure)
            return
        self._protocols.append(protocol)
        self._found(candidate)
        if not self._check_list_done:
            for remote in self._remote_candidates:
                self._pair_remote_candidate(remote)
            self.sort_check_list()

    async def _reflexive(self, base: StunProtocol, server: IceServer) -> None:
        inside = base.local_candidate
        try:
            request = stun.Message(stun.Method.BINDING, stun.Class.REQUEST)
            response, _ = await base.request(request, await _server_address(server, inside.host))
            host, port = response.attributes["XOR-MAPPED-ADDRESS"][:2]
        except (OSError, stun.TransactionError, LookupError, ValueError) as exc:
            logger.debug("STUN server %s tells nothing to %s: %r", server, inside.host, exc)
            return
        if (host, port) != (inside.host, inside.port):
            self._found(
                Candidate(
                    foundation=candidate_foundation("srflx", "udp", inside.host),
                    component=1,
                    transport="udp",
                    priority=candidate_priority(1, "srflx"),
                    host=host,
                    port=port,
                    type="srflx",
                    related_address=inside.host,
                    related_port=inside.port,
                )
            )

    def _found(self, candidate: Candidate) -> None:
        self._local_candidates.append(candidate)
        self._some_found.set()
        self._on_candidate(candidate)

    def _remote_candidates_expected(self) -> bool:
        """Asked before the base gives up: more of our own may come as well."""
        return self.gathering or super()._remote_candidates_expected()

    async def check_start(self, pair: CandidatePair) -> None:
        # aioice nominates the first pair that works; a relayed one often does before the hole is punched. RFC
        # 8445, 8.1.1 lets the controlling side decide how long it waits for a better one.
        if self.ice_controlling and _relayed(pair) and not self._relay_only:
            self.check_state(pair, CandidatePair.State.IN_PROGRESS)
            await asyncio.sleep(RELAY_PATIENCE)
        await super().check_start(pair)

    def build_request(self, pair: CandidatePair, nominate: bool) -> stun.Message:
        request = self._checks[pair] = super().build_request(pair, nominate)
        return request

    def check_incoming(self, message: stun.Message, addr: tuple[str, int], protocol: StunProtocol) -> None:
        """The peer's check came through: repeat one of ours that its router turned away before.

        Our first check opened our router and was dropped by the peer's; the peer's, which opened its router,
        shows that both are open now (a triggered check: RFC 8445, 7.3.1.4). Once for each check, and without
        waiting for the half second after which it is repeated anyway.
        """
        known = any((one.host, one.port) == addr for one in self._remote_candidates)
        if not known and len(self._remote_candidates) >= MAX_REMOTE:
            return
        super().check_incoming(message, addr, protocol)
        for pair in self._check_list:
            met = pair.protocol is protocol and pair.remote_addr == addr
            if met and pair.state is CandidatePair.State.IN_PROGRESS and pair in self._checks:
                protocol.send_stun(self._checks.pop(pair), addr)

    # --- a peer whose port is closed ------------------------------------------------------------------

    async def connect(self) -> None:
        await super().connect()
        if self._closing:  # in the moment before: the base has begun to ask for consent, and would for ever
            await cancel_and_wait(self._query_consent_task)
            raise ConnectionError("the agent was closed")
        for pair in self._nominated.values():
            watch_refusals(pair.protocol, pair.protocol.transport, self._refused)

    def _refused(self, host: str, port: int) -> None:
        if any(pair.remote_addr == (host, port) for pair in self._nominated.values()):
            self._refusals += 1
            self.probe_peer()

    def probe_peer(self) -> None:
        """Find out whether the peer's port is closed. Harmless when repeated."""
        if self._probing is None and self._nominated and not self._closing:
            self._probing = asyncio.create_task(self._probe(*self._nominated.values()))

    async def _probe(self, pair: CandidatePair) -> None:
        """Take the peer for gone if it is silent, and its port said to be closed once more.

        Consent alone takes half a minute to expire (RFC 7675, 5.1). ICMP alone could be forged by anybody who
        knows both ports: it only makes us ask, and a peer that lives answers the check, which nobody can
        answer without its password.
        """
        before = self._refusals
        assert self.remote_password is not None
        try:
            await pair.protocol.request(
                self.build_request(pair, nominate=False),
                pair.remote_addr,
                integrity_key=self.remote_password.encode(),
                retransmissions=0,
            )
            gone = False
        except stun.TransactionError as exc:
            gone = isinstance(exc, stun.TransactionTimeout) and self._refusals > before
        self._probing = None  # so that `close` does not wait for what calls it
        if gone:
            logger.info("%s:%s is closed", *pair.remote_addr)
            await self.close()

    async def close(self) -> None:
        await cancel_and_wait(self._querying, self._probing)
        await super().close()


def _relayed(pair: CandidatePair) -> bool:
    return "relay" in (pair.local_candidate.type, pair.remote_candidate.type)


async def _server_address(server: IceServer, asked_from: str) -> tuple[str, int]:
    """An address of ``server`` of the same family as ``asked_from``. Raise OSError when it has none."""
    family = socket.AF_INET6 if ipaddress.ip_address(asked_from).version == 6 else socket.AF_INET
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(server.host, server.port, family=family, type=socket.SOCK_DGRAM)
    return str(found[0][4][0]), server.port
