"""What is looked at in SDP, before a WebRTC implementation parses it and for what it does not do itself."""

from __future__ import annotations

import attrs

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
    kept = [line for line in lines if not is_named(line.removeprefix("a="))]
    if len(kept) < len(lines):
        kept = [line for line in kept if not line.startswith("a=end-of-candidates")]
    return "".join(kept)


def is_named(candidate: str) -> bool:
    """Whether ``candidate`` (``candidate:…``) has a name of mDNS in place of an address."""
    fields = candidate.split()
    return candidate.startswith("candidate:") and len(fields) > 4 and fields[4].endswith(".local")


@attrs.frozen
class IceParameters:
    """What a description says of ICE."""

    username: str
    password: str
    candidates: tuple[str, ...] = ()
    """In SDP's notation, ``candidate:…``."""
    complete: bool = False
    """Whether there are no more."""


def ice_parameters(sdp: str) -> IceParameters:
    """Read them from a description of one media section. Raise ValueError when credentials are missing."""
    values: dict[str, list[str]] = {}
    for line in sdp.splitlines():
        name, _, value = line.removeprefix("a=").partition(":")
        if line.startswith("a="):
            values.setdefault(name, []).append(value)
    username, password = values.get("ice-ufrag", [""])[0], values.get("ice-pwd", [""])[0]
    if not (4 <= len(username) <= 256 and 22 <= len(password) <= 256):
        raise ValueError("ICE credentials are missing, or of impossible lengths")
    candidates = tuple(f"candidate:{value}" for value in values.get("candidate", []))
    return IceParameters(username, password, candidates, "end-of-candidates" in values)


def with_ice(sdp: str, parameters: IceParameters) -> str:
    """The description ``sdp`` with other ICE ``parameters``: that of a restart."""
    names = ("ice-ufrag", "ice-pwd", "candidate", "end-of-candidates")
    kept = [
        line for line in sdp.splitlines() if line.removeprefix("a=").partition(":")[0].strip() not in names
    ]
    added = [f"a=ice-ufrag:{parameters.username}", f"a=ice-pwd:{parameters.password}"]
    added += [f"a={candidate}" for candidate in parameters.candidates]
    added += ["a=end-of-candidates"] if parameters.complete else []
    return "".join(f"{line}\r\n" for line in [*kept, *added])
