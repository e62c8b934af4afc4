"""What of aiortc and aioice is repaired here, why, and how the repairs get into a connection.

Each repair overrides private methods, which upstream may change with any release. So nothing of the libraries
is patched: our subclasses take the place of theirs in the connections of this transport alone, and only where
a library is built as they expect (`compat`). ``tests/transports/webrtc/aiortc/test_upstream.py`` shows each
fault in the installed libraries; where it fails, upstream has fixed one, and the repair can go.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from typing import Any

import attrs
from aiortc import rtcpeerconnection

from swarmcore_transports.webrtc.aiortc.compat import missing_of_ice, missing_of_sctp
from swarmcore_transports.webrtc.aiortc.ice_transport import (
    MakeAgent,
    RestartableIceTransport,
    TrickleIceGatherer,
)
from swarmcore_transports.webrtc.aiortc.sctp_sender import RackSctpTransport

logger = logging.getLogger(__name__)

CHECKED = "aiortc 1.16 with aioice 0.13"
"""The versions in which the faults were seen and with which the repairs work: earlier ones lack what they
build on, and the extra ``webrtc`` asks for no others."""


@attrs.frozen
class Repair:
    """A fault of the libraries, and what is done about it."""

    name: str
    fault: str
    reason: str
    """What it costs us, and the section that says how it should be."""
    where: str
    """The class and methods that repair it."""


REPAIRS = (
    Repair(
        "congestion window",
        "begins with 3 packets, sends 4 at once, and grows by a packet for each acknowledgement",
        "a hidden state takes several round trips; RFC 6928 (first window) and RFC 9438 (CUBIC) in place of "
        "RFC 9260, 7.2",
        "congestion.CongestionWindow, RackSctpTransport._transmit",
    ),
    Repair(
        "loss detection",
        "takes a packet for lost once three later ones have arrived, and a lost tail after a second or more",
        "RFC 8985 (RACK-TLP) finds both within a few round trips; RFC 9260, 6.3.1 has the slow timer",
        "RackSctpTransport._receive_sack_chunk, _detect_losses, _probe, _update_rto",
    ),
    Repair(
        "INIT backoff",
        "repeats INIT and COOKIE-ECHO at a constant pace",
        "a peer behind a slow path is flooded once our first timeout is short; RFC 9260, 5.1 and 6.3.3 (E2)",
        "RackSctpTransport._t1_expired",
    ),
    Repair(
        "peer's window",
        "sends beyond the receiver window that the peer advertises",
        "a slow reader drops what comes; RFC 9260, 6.1 (A)",
        "RackSctpTransport._send_what_fits",
    ),
    Repair(
        "unsent acknowledged",
        "takes acknowledgements of what was never sent, after which real ones are ignored",
        "one forged or mistaken number stops an association; RFC 9260, 6.2.1",
        "RackSctpTransport._receive_sack_chunk",
    ),
    Repair(
        "delayed acknowledgement",
        "acknowledges every packet at once",
        "half of the packets of a transfer are acknowledgements, each with its encryption; RFC 9260, 6.2",
        "DelayedSackReceiver._send_sack",
    ),
    Repair(
        "receive window",
        "takes data beyond the window that it advertised",
        "a peer fills this process's memory with messages that never end; RFC 9260, 6.2",
        "DelayedSackReceiver._receive_data_chunk",
    ),
    Repair(
        "cost of gaps",
        "looks at everything above a gap for each packet that comes",
        "one lost packet of a fast path costs time that grows with the square of what follows",
        "DelayedSackReceiver._mark_received",
    ),
    Repair(
        "cost of fragments",
        "looks through all fragments of a message at each of its packets",
        "a long message costs time that grows with the square of its length",
        "sctp_receiver._InboundStream",
    ),
    Repair(
        "closed twice",
        "fails when the end of one channel closes another while the association ends",
        "the association is left half closed",
        "RackSctpTransport._data_channel_closed",
    ),
    Repair(
        "DTLS closed",
        "lets an error of OpenSSL through when something is sent while DTLS is being closed",
        "callers expect the ConnectionError of a closed transport",
        "DelayedSackReceiver._send_chunk",
    ),
    Repair(
        "trickle",
        "gives no candidate before all STUN and TURN servers have answered or five seconds have passed",
        "one dead server delays every connection; RFC 8838",
        "TrickleIceAgent.gather_candidates, TrickleIceGatherer",
    ),
    Repair(
        "STUN over IPv6",
        "asks STUN servers over IPv4 only",
        "RFC 8445, 5.1.1.2 gathers from each base",
        "TrickleIceAgent._reflexive",
    ),
    Repair(
        "ICE restart",
        "cannot restart ICE",
        "every stream ends when a machine changes its network; RFC 8445, 9 and RFC 8839, 4.4.1.1.1",
        "RestartableIceTransport",
    ),
    Repair(
        "triggered check",
        "does not repeat its own check when the peer's comes through while that is under way",
        "a hole punched from both sides opens half a second later; RFC 8445, 7.3.1.4",
        "TrickleIceAgent.check_incoming",
    ),
    Repair(
        "remote candidates",
        "remembers and checks every address from which a check comes",
        "a peer with many ports makes this machine send without bound; RFC 8445, 19.5.1",
        "TrickleIceAgent.check_incoming",
    ),
    Repair(
        "closed while connecting",
        "begins to ask for consent although it was closed in the moment in which it connected",
        "a task that nobody ends, which keeps the connection in memory",
        "TrickleIceAgent.connect",
    ),
    Repair(
        "closed port",
        "does nothing when the network says that the peer's port is closed",
        "a killed peer is noticed after half a minute (RFC 7675, 5.1) instead of half a second",
        "TrickleIceAgent.probe_peer, sockets.watch_refusals",
    ),
    Repair(
        "one datagram a turn",
        "asyncio reads one datagram, then looks at everything else",
        "a third of the CPU time of a transfer",
        "sockets.read_in_batches",
    ),
)


@contextlib.contextmanager
def repaired(make_agent: MakeAgent) -> Iterator[None]:
    """Within, the first data channel of an `RTCPeerConnection` gets our SCTP and ICE over ``make_agent``.

    aiortc names its classes in private methods and takes no others. Replacing the names around the one call
    that uses them leaves every other peer connection of the process alone: only for code without an
    ``await``. Where a library is not built as ours expects, its own stays, and a warning says so.
    """
    parts: dict[str, Any] = {}
    if not _missing_of_sctp():
        parts["RTCSctpTransport"] = RackSctpTransport
    if not _missing_of_ice():
        parts["RTCIceGatherer"] = lambda **_: TrickleIceGatherer(make_agent)
        parts["RTCIceTransport"] = RestartableIceTransport
    module: Any = rtcpeerconnection
    originals = {name: getattr(module, name) for name in parts}
    try:
        for name, part in parts.items():
            setattr(module, name, part)
        yield
    finally:
        for name, original in originals.items():
            setattr(module, name, original)


@cache
def _missing_of_sctp() -> bool:
    return _warned(missing_of_sctp(), "data channels are slow on long links")


@cache
def _missing_of_ice() -> bool:
    return _warned(
        missing_of_ice(), "connections are made slowly, and lost when a machine changes its network"
    )


def _warned(missing: list[str], effect: str) -> bool:
    if missing:
        logger.warning(
            "aiortc %s and aioice %s lack what swarmcore's repairs build on (%s): %s, until swarmcore knows "
            "these versions; it knows %s",
            version("aiortc"),
            version("aioice"),
            ", ".join(missing),
            effect,
            CHECKED,
        )
    return bool(missing)
