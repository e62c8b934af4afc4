"""From the pair of ICE candidates in use to how the bytes travel."""

from __future__ import annotations

import ipaddress
from typing import Protocol


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
