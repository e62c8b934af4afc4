"""What is looked at in SDP, before a WebRTC implementation parses it and for what it does not do itself."""

from __future__ import annotations

import ipaddress
from typing import Protocol

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
    if media[0].split()[1:2] == ["0"]:
        raise ProtocolError("the peer sent a description of an association that it refuses, or ends")
    for needed in ("a=fingerprint:", "a=ice-ufrag:", "a=ice-pwd:"):
        if not any(line.startswith(needed) for line in lines):
            raise ProtocolError(f"the peer sent a description without {needed[2:-1]}")
    username, password = attribute(sdp, "ice-ufrag"), attribute(sdp, "ice-pwd")
    if not (4 <= len(username) <= 256 and 22 <= len(password) <= 256):
        raise ProtocolError("the peer sent a description with ICE credentials of impossible lengths")


def attribute(sdp: str, name: str) -> str:
    """The value of the first attribute ``name``, or nothing."""
    start = f"a={name}:"
    return next((line[len(start) :].strip() for line in sdp.splitlines() if line.startswith(start)), "")


def without_names(sdp: str) -> str:
    """``sdp`` without the candidates that are names, which browsers give in place of addresses of their LAN.

    Each would be looked up by multicast, for a second at a stranger's word, before there is an answer. Their
    owner reaches us all the same, and its checks then tell where from: so the list counts as unfinished.
    """
    lines = sdp.splitlines(keepends=True)
    kept = [line for line in lines if not (line.startswith("a=candidate:") and is_named(line[2:]))]
    if len(kept) < len(lines):
        kept = [line for line in kept if not line.startswith("a=end-of-candidates")]
    return "".join(kept)


def is_named(candidate: str) -> bool:
    """Whether ``candidate`` (``candidate:…``) has a name of mDNS in place of an address."""
    fields = candidate.split()
    return candidate.startswith("candidate:") and len(fields) > 4 and fields[4].endswith(".local")


def username_of(candidate: str) -> str | None:
    """The ``ufrag`` of the description that ``candidate`` (``candidate:…``) belongs to, if it says so."""
    words = candidate.split()
    return next(
        (value for name, value in zip(words[8::2], words[9::2], strict=False) if name == "ufrag"), None
    )


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
    """Read them from a description that `check_description` lets pass."""
    lines = sdp.splitlines()
    candidates = tuple(line[2:] for line in lines if line.startswith("a=candidate:"))
    complete = any(line.startswith("a=end-of-candidates") for line in lines)
    return IceParameters(attribute(sdp, "ice-ufrag"), attribute(sdp, "ice-pwd"), candidates, complete)


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


class Candidate(Protocol):
    """What is looked at of one; ``type`` is ``host``, ``srflx``, ``prflx`` or ``relay``."""

    type: str
    host: str


class CandidatePair(Protocol):
    @property
    def local_candidate(self) -> Candidate: ...

    @property
    def remote_candidate(self) -> Candidate: ...


def path_of(pair: CandidatePair | None) -> str:
    """As `Stream.path`. Whoever is public itself needs no hole, though it sees the other through a router."""
    if pair is None:
        return "direct"
    local, remote = pair.local_candidate, pair.remote_candidate
    if "relay" in (local.type, remote.type):
        return "relayed"
    if remote.type == "host" or _is_public(local.host):
        return "direct"
    return "hole-punched"


def _is_public(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_global
    except ValueError:
        return False
