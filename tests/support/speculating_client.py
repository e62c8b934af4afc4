"""A client that speculates over a chain of made-up servers, on made-up time: what its decisions are worth."""

from __future__ import annotations

import random
from collections import deque

import attrs

from swarmcore.client.speculation.control import Plan, SpeculationController
from swarmcore.generation_settings import Speculation


@attrs.frozen
class World:
    """A chain, and how well drafts agree with the model."""

    acceptance: float
    round_trip: float = 0.1
    """Seconds on the way through the whole chain and back."""
    stages: int = 3
    stage_seconds: float = 0.01
    """What a step of one row takes in each server."""
    growth: float = 0.03
    """How much longer it takes for each further row, as a share of that."""
    stated: float | None = None
    """What drafters say of their tokens, where that is not `acceptance`."""
    seed: int = 0


@attrs.define
class _Chunk:
    rows: int
    lead: bool
    sent: float
    alone: bool
    likely: float
    back: float = 0.0


@attrs.define
class _Chain:
    """Servers that compute one chunk after the other."""

    world: World
    work: list[list[tuple[float, float, _Chunk]]] = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.work = [[] for _ in range(self.world.stages)]

    def send(self, chunk: _Chunk, now: float) -> None:
        world = self.world
        hop = world.round_trip / (world.stages + 1)
        at = now + hop
        for stage in self.work:
            begin = max(at, stage[-1][1] if stage else 0.0)
            end = begin + world.stage_seconds * (1 + world.growth * (chunk.rows - 1))
            stage.append((begin, end, chunk))
            at = end + hop
        chunk.back = at

    def recall(self, chunks: list[_Chunk], now: float) -> None:
        """What has not begun where the message arrives is dropped."""
        arrives = now + self.world.round_trip / (self.world.stages + 1)
        for stage in self.work:
            while stage and stage[-1][2] in chunks and stage[-1][0] > arrives:
                stage.pop()


def tokens_a_second(world: World, speculation: Speculation | None, tokens: int = 400) -> float:
    """Of a text, decoded with these settings or, with None, plainly."""
    rng = random.Random(world.seed)
    stated = world.acceptance if world.stated is None else world.stated
    settings = speculation or Speculation(length=0)
    controller = SpeculationController(settings, stages=world.stages)
    controller.max_in_flight = 8
    chain, window = _Chain(world), deque[_Chunk]()
    now, made, plan = 0.0, 0, Plan(0, 1)
    before: _Chunk | None = None

    def send(rows: int, lead: bool, likely: float) -> None:
        window.append(chunk := _Chunk(rows, lead, now, not window, likely))
        chain.send(chunk, now)

    while made < tokens:
        if not window:
            plan = Plan(0, 1)
            if controller.ready:
                wanted = settings.max_tokens
                plan = controller.plan([stated] * wanted)
            send(1 + plan.length, True, stated**plan.length)
        while len(window) < plan.depth:
            ahead = 1.0
            for chunk in window:
                ahead *= chunk.likely
            count = controller.behind([stated] * settings.max_tokens, ahead, plan.length)
            if count == 0 or now > window[0].back:
                break
            send(count, False, stated**count)
        done = window.popleft()
        now = max(now, done.back)
        if done.alone:
            controller.measured(done.rows, done.back - done.sent)
        elif before is not None and done.sent - before.sent < done.back - before.back:
            controller.followed(done.rows, done.back - before.back)
        before = done
        right = 0
        # A row for each token of the chunk; of the last it tells whether what is behind the chunk is right.
        while right < done.rows and rng.random() < world.acceptance and (right < done.rows - 1 or window):
            right += 1
        made += min(right + 1, done.rows)
        if right < done.rows and window:
            chain.recall(list(window), now)
            controller.recalled()
            window.clear()
    return made / now
