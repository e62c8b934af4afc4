"""What is left out of a browser's description."""

from __future__ import annotations

import pytest

pytest.importorskip("aiortc", reason="needs the extra webrtc")
from swarmcore_transports.webrtc.sdp import without_names

PLAIN = (
    "v=0\r\n"
    "m=application 9 UDP/DTLS/SCTP webrtc-datachannel\r\n"
    "a=candidate:1 1 udp 1677729535 192.0.2.7 4001 typ srflx raddr 0.0.0.0 rport 0\r\n"
)
NAMED = "a=candidate:2 1 udp 2113937151 1b2c3d4e-0000-4000-8000-000000000000.local 5001 typ host\r\n"
END = "a=end-of-candidates\r\n"


def test_named_candidates_go_and_the_list_stays_open() -> None:
    """With no candidate left a finished list is a failure, before the browser's own checks arrive."""
    assert without_names(PLAIN + NAMED + END) == PLAIN


def test_others_stay_as_they_are() -> None:
    assert without_names(PLAIN + END) == PLAIN + END
    assert (
        without_names("a=candidate:\r\na=candidate:1 1 udp\r\n") == "a=candidate:\r\na=candidate:1 1 udp\r\n"
    )
