"""How a registry uses the DHT."""

from __future__ import annotations

import attrs

from swarmcore.registry.gossip.options import CAPACITY
from swarmcore.registry.gossip.records import RecordLimits


@attrs.frozen(kw_only=True)
class DhtOptions:
    """Settings of `DhtRegistry`. Those of one swarm may differ but for ``limits``."""

    replicas: int = 8
    """Nodes that hold a record and an entry of an index: those nearest to its key."""
    read_width: int = 3
    """Of these, nodes that have to answer before a look-up ends."""
    parallel: int = 4
    """Nodes asked at a time by one look-up."""
    lookups: int = 6
    """Look-ups at a time."""
    timeout: float = 4.0
    """Most seconds for a node to be dialled and to answer."""
    lookup_timeout: float = 20.0
    """Most seconds for a look-up; what it has found by then counts."""
    refresh: float = 15.0
    """Seconds between looks at the indices; a client sees a newcomer as late as this."""
    reread: float = 100.0
    """Seconds after which the record of a peer in the view is read again; at most a third of its ttl."""
    upkeep: float = 30.0
    """Seconds between looks at who is nearest to this peer's own keys now; those that lack them get them."""
    limits: RecordLimits = attrs.field(factory=RecordLimits)
    """What a record may claim."""
    capacity: int = CAPACITY
    """Most records held: as many in the view, and as many stored for others."""
