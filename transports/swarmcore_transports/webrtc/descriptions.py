"""What is looked at in a peer's SDP before a WebRTC implementation parses it."""

from __future__ import annotations

from swarmcore.errors import ProtocolError

MAX_CANDIDATES = 32
"""Most candidates of one peer. Each costs packets to wherever it points, for every address of ours."""

MAX_LINES = 256


def check_description(sdp: str) -> None:
    """Raise `ProtocolError` unless ``sdp`` describes one association for data, and no more than that."""
    lines = sdp.splitlines()
    if len(lines) > MAX_LINES:
        raise ProtocolError(f"the peer sent a description of {len(lines)} lines, more than {MAX_LINES}")
    media = [line for line in lines if line.startswith("m=")]
    if len(media) != 1 or not media[0].startswith("m=application "):
        raise ProtocolError(
            f"the peer sent a description of {len(media)} media sections instead of one for data"
        )
    candidates = sum(line.startswith("a=candidate:") for line in lines)
    if candidates > MAX_CANDIDATES:
        raise ProtocolError(f"the peer sent {candidates} candidates, more than {MAX_CANDIDATES}")
    for needed in ("a=fingerprint:", "a=ice-ufrag:", "a=ice-pwd:"):
        if not any(line.startswith(needed) for line in lines):
            raise ProtocolError(f"the peer sent a description without {needed[2:-1]}")
