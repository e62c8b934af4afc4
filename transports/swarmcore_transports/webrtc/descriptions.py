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


def without_names(sdp: str) -> str:
    """``sdp`` without the candidates that are names, which browsers give in place of addresses of their LAN.

    Each would be looked up by multicast, for a second at a stranger's word, before there is an answer. Their
    owner reaches us all the same, and its checks then tell where from: so the list counts as unfinished.
    """
    lines = sdp.splitlines(keepends=True)
    kept = [line for line in lines if not _is_named(line)]
    if len(kept) < len(lines):
        kept = [line for line in kept if not line.startswith("a=end-of-candidates")]
    return "".join(kept)


def _is_named(line: str) -> bool:
    fields = line.split()
    return line.startswith("a=candidate:") and len(fields) > 4 and fields[4].endswith(".local")
