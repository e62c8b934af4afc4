"""How a registry gossips."""

from __future__ import annotations

import attrs

from swarmcore.registry.gossip.records import RecordLimits

CAPACITY = 10_000


@attrs.frozen(kw_only=True)
class GossipOptions:
    """Settings of `GossipRegistry` and, as far as they concern a reader, of `WatchingRegistry`."""

    fanout: int = 3
    """Random members to which news goes at once."""
    interval: float = 5.0
    """Seconds, a quarter more or less, between comparisons with a random member. Those of a swarm agree."""
    timeout: float = 10.0
    """Most seconds for a call to a member."""
    heartbeat_members: int = 2
    """Members ahead on the ring to which a channel is held open; 0 leaves death to be noticed by others."""
    heartbeat_interval: float = 0.5
    """Seconds between signs of life on these channels; silence of four to five of them raises a suspicion.

    0 sends none: a host that hangs is then noticed by the transport's own keep-alive, if it has one.
    """
    probe_timeout: float = 1.5
    """Seconds that a suspect has to answer."""
    broadcast_load_below: int = 100
    """Members of a swarm up to which news of a server's load is pushed; in a larger one it travels with
    anti-entropy."""
    limits: RecordLimits = attrs.field(factory=RecordLimits)
    """What a record may claim."""
    capacity: int = CAPACITY
    """Most peers whose records are held."""

    def broadcasts_refresh(self, ttl: float) -> bool:
        """Whether records of this ttl are pushed even when they change nothing.

        Comparisons bring news to all of 10,000 members in some 12 intervals; a refresh, issued at a third of
        the ttl, has two thirds of it left for that.
        """
        return ttl < 20 * self.interval
