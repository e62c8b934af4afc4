"""A swarm under several clients, disturbed at random for as long as one likes: every text has to be right."""

from __future__ import annotations

import asyncio
import math
import random
import signal
import statistics
from collections import Counter
from collections.abc import Callable

import attrs

from swarmcore.bench.plain import PlainModel
from swarmcore.bench.swarms import start_fleet
from swarmcore.checkpoint import Checkpoint, open_checkpoint
from swarmcore.client.generation.model import RemoteModel
from swarmcore.client.session.options import SessionOptions
from swarmcore.client.swarm import connect
from swarmcore.errors import SwarmError
from swarmcore.session.steps import JournalMode
from swarmcore.testing.fleet import Fleet, Member
from swarmcore.types import PeerId, Progress, Span

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "def fibonacci(n):\n    ",
    "There are two ways to cross a river:",
    "Water boils at",
    " ".join(f"{number} sheep," for number in range(60)),
)

CACHE_TOKENS = 8192

LONGEST_CALM = 1.5
"""Most seconds between two disturbances."""

LONGEST_FREEZE = 6.0
"""Seconds; a client gives up on a silent server after some four."""

QUIET_TIMEOUT = 30.0
"""Seconds after the last session in which the servers must have forgotten all of them."""


@attrs.define
class SoakReport:
    """What happened."""

    seed: int
    seconds: float = 0.0
    texts: int = 0
    abandoned: int = 0
    """Texts that their client left in the middle, on purpose."""
    disturbances: Counter[str] = attrs.field(factory=Counter)
    failovers: list[float] = attrs.field(factory=list)
    """Seconds that each took, from its being noticed."""
    faults: list[str] = attrs.field(factory=list)
    """Texts that were wrong, generations that failed, what servers did not forget: none of it may be."""

    def __str__(self) -> str:
        disturbances = ", ".join(f"{count} {what}" for what, count in sorted(self.disturbances.items()))
        recovery = ""
        if self.failovers:
            median, longest = statistics.median(self.failovers), max(self.failovers)
            recovery = f" (median {median:.2f} s, longest {longest:.2f} s)"
        return "\n".join(
            [
                f"{self.texts} texts in {self.seconds:.0f} s, {self.abandoned} more abandoned, "
                f"seed {self.seed}",
                f"{disturbances or 'no disturbances'}; {len(self.failovers)} failovers{recovery}",
                *(f"FAULT: {fault}" for fault in self.faults),
                "all texts are those of plain Transformers" if not self.faults else "",
            ]
        ).rstrip()


@attrs.define(kw_only=True)
class Soak:
    """What to do. `report` is kept up to date, also when `run` is cancelled."""

    model: str
    seconds: float
    """Until `run` ends by itself; 0: never."""
    seed: int
    threads: int = 1
    stages: int = 3
    replicas: int = 2
    clients: int = 3
    tokens: int = 48
    """Of a text."""
    report: SoakReport = attrs.field(init=False)

    def __attrs_post_init__(self) -> None:
        self.report = SoakReport(self.seed)

    async def run(
        self, *, progress: Progress | None = None, remark: Callable[[str], None] = lambda text: None
    ) -> None:
        """Start a swarm, disturb it, stop it. Cancelled, it stops everything that it started."""
        checkpoint = await asyncio.to_thread(open_checkpoint, self.model, progress=progress)
        remark("asking the model without a swarm")
        expected = await asyncio.to_thread(self._plain_texts, checkpoint)
        remark(f"starting {self.stages * self.replicas} servers")
        async with start_fleet(
            checkpoint,
            self.stages,
            self.replicas,
            dtype="float32",
            threads=self.threads,
            cache_tokens=CACHE_TOKENS,
        ) as fleet:
            clients = [_Client(self, fleet, checkpoint, expected, number) for number in range(self.clients)]
            disturber = _Disturber(self, fleet)
            remark(f"seed {self.seed}; Ctrl-C ends it")
            clock = asyncio.get_running_loop().time
            began = clock()
            try:
                async with asyncio.TaskGroup() as group:
                    for client in clients:
                        group.create_task(client.run())
                    disturbing = group.create_task(disturber.run())
                    await asyncio.sleep(self.seconds or math.inf)
                    disturbing.cancel()
                    for client in clients:
                        client.stopping = True
            finally:
                self.report.seconds = clock() - began
                disturber.thaw()
            await fleet.settle()
            await self._quiet(fleet)

    def _plain_texts(self, checkpoint: Checkpoint) -> dict[str, str]:
        plain = PlainModel(checkpoint, "float32", self.threads)
        return {prompt: plain.text(prompt, self.tokens) for prompt in PROMPTS}

    async def _quiet(self, fleet: Fleet) -> None:
        """Give the servers time to forget all sessions; those that keep one are a fault."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + QUIET_TIMEOUT
        async with connect(*fleet.addresses) as swarm:
            await fleet.seen_by(swarm)
            while True:
                servers = [(await swarm.info(peer)).server for peer in fleet.members]
                busy = [s for s in servers if s.sessions or s.cache_tokens_free < s.cache_tokens]
                if not busy or loop.time() > deadline:
                    break
                await asyncio.sleep(0.2)
        for server in busy:
            used = server.cache_tokens - server.cache_tokens_free
            self.report.faults.append(f"{server} has {server.sessions} sessions and {used} tokens left")


class _Client:
    """Generates one text after the other, and compares."""

    def __init__(
        self, soak: Soak, fleet: Fleet, checkpoint: Checkpoint, expected: dict[str, str], number: int
    ) -> None:
        self.stopping = False
        self._soak = soak
        self._report = soak.report
        self._fleet = fleet
        self._folder = str(checkpoint.folder)
        self._expected = expected
        self._name = f"client {number}"
        self._rng = random.Random(f"{soak.seed} {self._name}")
        self._journal: JournalMode = ("client", "servers")[number % 2]

    async def run(self) -> None:
        options = SessionOptions(
            journal=self._journal,
            on_failover=lambda failover: self._report.failovers.append(failover.seconds),
        )
        async with connect(*self._fleet.addresses) as swarm:
            model = await swarm.load_model(
                self._folder, dtype="float32", threads=self._soak.threads, session_options=options
            )
            while not self.stopping:
                try:
                    await self._generate(model)
                except SwarmError as exc:
                    self._report.faults.append(f"{self._name}: {type(exc).__name__}: {exc}")
                    await asyncio.sleep(1.0)

    async def _generate(self, model: RemoteModel) -> None:
        match self._rng.choices(("one", "batch", "abandoned"), (6, 2, 1))[0]:
            case "one":
                prompt = self._rng.choice(PROMPTS)
                self._compare(prompt, await model.generate(prompt, max_new_tokens=self._soak.tokens))
            case "batch":
                prompts = self._rng.sample(PROMPTS, 3)
                texts = await model.generate_batch(prompts, max_new_tokens=self._soak.tokens)
                for prompt, text in zip(prompts, texts, strict=True):
                    self._compare(prompt, text)
            case _:
                left = self._rng.randrange(self._soak.tokens)
                async with model.generate(self._rng.choice(PROMPTS), max_new_tokens=left + 1) as generation:
                    async for _ in generation:
                        if generation.new_tokens >= left:
                            break
                self._report.abandoned += 1

    def _compare(self, prompt: str, text: str) -> None:
        self._report.texts += 1
        if text != self._expected[prompt]:
            self._report.faults.append(
                f"{self._name}: {prompt!r} went on with {text!r}, not {self._expected[prompt]!r}"
            )


class _Disturber:
    """Kills, freezes, adds and removes servers; of each span it leaves one that works."""

    def __init__(self, soak: Soak, fleet: Fleet) -> None:
        self._fleet = fleet
        self._done = soak.report.disturbances
        self._rng = random.Random(f"{soak.seed} disturber")
        self._frozen: dict[PeerId, Member] = {}

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self._rng.uniform(0.0, LONGEST_CALM))
            span = self._rng.choice(self._fleet.spans)
            match self._rng.choices(("kill", "kill two", "freeze", "join", "leave"), (4, 1, 2, 1, 2))[0]:
                case "kill":
                    self._kill(span)
                case "kill two":
                    for both in self._rng.sample(self._fleet.spans, min(2, len(self._fleet.spans))):
                        self._kill(both)
                case "freeze":
                    self._freeze(span)
                case "join":
                    self._join(span)
                case _:
                    self._leave(span)

    def thaw(self) -> None:
        """Let all go on that are frozen."""
        for member in self._frozen.values():
            member.process.signal(signal.SIGCONT)
        self._frozen.clear()

    def _victim(self, span: Span) -> Member | None:
        """One of those that work, if it is not the only one."""
        working = [member for member in self._fleet.holding(span) if member.peer not in self._frozen]
        return self._rng.choice(working) if len(working) > 1 else None

    def _kill(self, span: Span) -> None:
        if (victim := self._victim(span)) is not None:
            self._fleet.kill(victim.peer)
            self._fleet.start_soon(span)
            self._done["kill -9"] += 1

    def _freeze(self, span: Span) -> None:
        if (victim := self._victim(span)) is not None:
            self._frozen[victim.peer] = victim
            victim.process.signal(signal.SIGSTOP)
            asyncio.get_running_loop().call_later(
                self._rng.uniform(0.1, LONGEST_FREEZE), self._thaw_one, victim
            )
            self._done["SIGSTOP"] += 1

    def _thaw_one(self, member: Member) -> None:
        if self._frozen.pop(member.peer, None) is not None:
            member.process.signal(signal.SIGCONT)

    def _join(self, span: Span) -> None:
        if len(self._fleet.holding(span)) <= self._fleet.replicas:
            self._fleet.start_soon(span)
            self._done["join"] += 1

    def _leave(self, span: Span) -> None:
        if (victim := self._victim(span)) is not None:
            self._fleet.leave(victim.peer)
            if len(self._fleet.holding(span)) < self._fleet.replicas:
                self._fleet.start_soon(span)
            self._done["leave"] += 1
