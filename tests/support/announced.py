"""Swarms as a view shows them, small and random, for tests of what is decided on one."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random
from typing import Any

import attrs

from swarmcore.registry.base import SwarmView
from swarmcore.types import ModelInfo, PeerId, Rtt, ServerInfo, Span

MODEL = ModelInfo("tiny", "f" * 32, blocks=12, hidden_size=8)
WHOLE = Span(0, 12)


def peer(number: int) -> PeerId:
    return PeerId(f"peer{number}")


def server(number: int, start: int, end: int, **fields: Any) -> ServerInfo:
    """One that is online, with room, and takes 10 ms a block."""
    settings: dict[str, Any] = {
        "model": MODEL,
        "cache_tokens": 1000,
        "cache_tokens_free": 1000,
        "decode_rps": 100 / (end - start),
        **fields,
    }
    return ServerInfo(peer=peer(number), addresses=(), span=Span(start, end), **settings)


def rtts(seconds: dict[int, float]) -> tuple[Rtt, ...]:
    """As a server publishes them, by number."""
    return tuple(Rtt(peer(number), value) for number, value in seconds.items())


def view(*servers: ServerInfo, revision: int = 0) -> SwarmView:
    return SwarmView({s.peer: s for s in servers}, revision)


def random_server(random: Random, number: int, blocks: int, peers: Iterable[int]) -> ServerInfo:
    """Any span, any speed, or none measured; round trips published to some of ``peers``."""
    start = random.randrange(blocks)
    end = random.randint(start + 1, blocks)
    published = [p for p in peers if p != number and random.random() < 0.4]
    return server(
        number,
        start,
        end,
        model=attrs.evolve(MODEL, blocks=blocks),
        state="online" if random.random() < 0.9 else random.choice(["joining", "draining"]),
        cache_tokens_free=random.choice([0, 50, 1000]),
        decode_rps=random.choice([0.0, random.uniform(1, 100)]),
        queue_seconds=random.choice([0.0, random.uniform(0, 0.2)]),
        rtts=rtts({p: random.uniform(0.001, 0.2) for p in published}),
    )
