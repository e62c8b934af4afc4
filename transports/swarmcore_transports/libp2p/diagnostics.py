"""Why this peer is not reached as well as it could be, in words for whoever runs it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from swarmcore_transports.libp2p.multiaddrs import host_of
from swarmcore_transports.own_addresses import loopback_note, loopback_only

if TYPE_CHECKING:
    from swarmcore_transports.libp2p.host import Host


def standing_notes(host: Host, mapping: str) -> list[str]:
    """What to tell of ``host``, which listens; ``mapping`` is why its router lets nobody in, if it says so.

    Only reads, so that it may be called in any thread.
    """
    found = []
    found_elsewhere = host.own.of("relayed") or host.own.of("verified")
    if not found_elsewhere and loopback_only(map(host_of, host.own.all())):
        found.append(loopback_note(map(host_of, host.bound())))
    outside = host.dial_back.standing
    why = "; ".join(reason for reason in (outside, mapping) if reason)
    if not host.own.public:
        if host.own.of("relayed"):
            found.append(f"reached through relays only: {why}")
        elif outside.startswith("not reachable"):
            relays = host.relays.refusal or "no peer that it knows relays"
            found.append(f"reached by nobody outside, nor through a relay ({relays}): {why}")
    reasons = Counter(host.hole_puncher.given_up())
    found += [f"{count} of its peers stay relayed: {reason}" for reason, count in reasons.most_common(1)]
    return found
