"""What drafts bring: texts decoded plainly, as measurements decide, and with fixed settings, in turns."""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import attrs
from rich.table import Table

from swarmcore.bench.link_pump import LEFT
from swarmcore.bench.long_link import Link, LongLink, long_link
from swarmcore.bench.swarms import start_swarm
from swarmcore.checkpoint import Checkpoint, open_checkpoint
from swarmcore.client.generation.model import RemoteModel
from swarmcore.client.speculation.counts import SpeculationCounts
from swarmcore.client.swarm import connect
from swarmcore.errors import InputError, RemoteFaultError
from swarmcore.generation_settings import Speculation
from swarmcore.tasks import deadline_after
from swarmcore.testing.processes import peer_environment
from swarmcore.types import Progress

FILE = """\
def total(items):
    result = 0
    for item in items:
        result = result + item.price * item.count
    return result


def average(items):
    if not items:
        return 0
    return total(items) / len(items)


def largest(items):
    best = None
    for item in items:
        if best is None or item.price > best.price:
            best = item
    return best
"""
REPORT = (
    "The harbour was closed for three days after the storm, and the ferries did not run. Two of the four "
    "cranes on the northern quay had lost their cables, and a barge with timber lay across the mouth of the "
    "inner basin until the tugs came from Vlissingen on Thursday evening. Nobody was hurt. The harbour "
    "master says that the lights at the pier head will be mended this month, and that until then pilots "
    "are to come in by daylight only, one ship at a time, and to keep clear of the sandbank off the old fort."
)
PROMPTS = {
    "edit": f"Here is a file:\n{FILE}\nHere is the same file once more:\n{FILE[:60]}",
    "quotation": f"{REPORT}\n\nThe same report once more, word for word:\n\n{REPORT[:40]}",
    "chat": "Question: What is a good way to learn to cook? Answer:",
    "random": "qz 81 vlk; 7 #p ow wyx 29 jjt, e 6 umb nn 40 fh ~ 3 kd 958 x lo bb 17 rr z tq 5 hy",
}
SAMPLED: dict[str, dict[str, Any]] = {"random": {"temperature": 2.0, "seed": 7}}
"""Of texts that are not greedy: small models would soon repeat themselves, and leave much to draft."""
FIXED = (
    *(Speculation(length=length, depth=1) for length in (4, 8, 16)),
    *(Speculation(length=length, depth=4) for length in (4, 8)),
)
WAYS: tuple[str | Speculation, ...] = ("off", "auto", *FIXED)
_TOKEN_TIMEOUT = 5.0
"""Seconds that a token may take on average until the client is given up."""


@attrs.frozen
class SpeculationResult:
    """What was measured of one kind of text."""

    text: str
    plain: float
    """Tokens a second of plain decoding; the median of the rounds."""
    auto: float
    """How many times that it is where all is decided by measurement."""
    fixed: float
    """The same of the best fixed setting."""
    best: str
    tokens_per_step: float
    """Where all is decided by measurement."""
    accepted: float
    same: bool
    """Whether all texts were those of plain decoding."""


@attrs.frozen(kw_only=True)
class SpeculationBench:
    """What to measure."""

    model: str
    draft: str | None = None
    executor: str = "auto"
    weights: str = "auto"
    dtype: str = "float32"
    threads: int = 1
    servers: int = 3
    delay: float = 0.0
    """Milliseconds one way, from each server of the chain to the next, and to and from the client."""
    rate: float | None = None
    """Megabits per second of each link."""
    tokens: int = 96
    """Of each text, after the first one."""
    rounds: int = 3
    clients: int = 1
    """Texts that are generated at once; speeds are those of all together."""
    texts: tuple[str, ...] = tuple(PROMPTS)

    async def run(
        self, *, progress: Progress | None = None, remark: Callable[[str], None] = lambda text: None
    ) -> list[SpeculationResult]:
        """Start the servers, measure, stop them. Raise `UnavailableError` where no link can be emulated,
        `InputError` for texts that there are not."""
        if unknown := set(self.texts) - set(PROMPTS):
            raise InputError(f"no text is called {', '.join(unknown)}; expected {', '.join(PROMPTS)}")
        checkpoint = await asyncio.to_thread(open_checkpoint, self.model, progress=progress)
        remark(f"starting {self.servers} servers")
        if not self.delay and self.rate is None:
            async with self._servers(checkpoint) as address:
                return [_told(result, remark) async for result in self.measure(address)]
        async with (
            long_link(Link(delay=self.delay, rate=self.rate)) as network,
            self._servers(checkpoint, network) as address,
        ):
            remark("measuring over the link")
            # It can reach no hub from there.
            gguf = checkpoint.gguf
            here = str(checkpoint.folder if gguf is None else gguf.files[0].path)
            settings = json.dumps(attrs.asdict(self) | {"model": here})
            command = ("-m", "swarmcore.bench.speculation", settings, address)
            client = await network.run(LEFT, *command, env=peer_environment())
            assert client.stdout is not None
            timeout = 60 + self.tokens * self.clients * len(WAYS) * (self.rounds + 1) * _TOKEN_TIMEOUT
            too_late = f"the benchmark's client did nothing for {timeout:.0f} s"
            results = []
            for _ in self.texts:
                async with deadline_after(timeout, too_late):
                    line = await client.stdout.readline()
                if not line:
                    break
                results.append(_told(SpeculationResult(**json.loads(line)), remark))
            async with deadline_after(timeout, too_late):
                if await client.wait():
                    raise RemoteFaultError("the benchmark's client ended early; its message is above")
            return results

    def _servers(
        self, checkpoint: Checkpoint, network: LongLink | None = None
    ) -> AbstractAsyncContextManager[str]:
        return start_swarm(
            checkpoint,
            self.servers,
            dtype=self.dtype,
            threads=self.threads,
            model=self.model,
            executor=self.executor,
            weights=self.weights,
            network=network,
        )

    async def measure(self, address: str) -> AsyncIterator[SpeculationResult]:
        """Over the swarm that is found at ``address``, text by text."""
        async with connect(address) as swarm:
            model = await swarm.load_model(
                self.model,
                dtype=self.dtype,
                threads=self.threads,
                executor="ggml" if self.executor == "ggml" else "torch",
                draft=self.draft,
            )
            await swarm.wait_for_blocks(model.info, timeout=60)

            for name in self.texts:
                rounds = []
                for _ in range(self.rounds + 1):
                    rounds.append([await self._decode(model, name, way) for way in WAYS])
                yield _result(name, rounds[1:])

    async def _decode(self, model: RemoteModel, name: str, speculation: str | Speculation) -> _Decoded:
        generations = [
            model.generate(
                PROMPTS[name],
                max_new_tokens=self.tokens + 1,
                min_new_tokens=self.tokens + 1,
                speculation=speculation,
                **SAMPLED.get(name, {}),
            )
            for _ in range(self.clients)
        ]
        await asyncio.gather(*generations)
        rate, counts = 0.0, SpeculationCounts()
        for generation in generations:
            assert generation.first_token_seconds is not None
            rate += self.tokens / (generation.seconds - generation.first_token_seconds)
            counts.add(generation.speculation)
        return _Decoded(rate, generations[0].tokens, counts.tokens_per_step, counts.acceptance or 0.0)


def _told(result: SpeculationResult, remark: Callable[[str], None]) -> SpeculationResult:
    remark(
        f"{result.text}: {result.plain:.1f} tokens/s, {result.auto:.2f} times that by measurements, "
        f"{result.fixed:.2f} with {result.best}"
    )
    return result


@attrs.frozen
class _Decoded:
    rate: float
    tokens: list[int]
    tokens_per_step: float
    accepted: float


def _result(text: str, rounds: Sequence[Sequence[_Decoded]]) -> SpeculationResult:
    gains = [
        statistics.median(each[way].rate / each[0].rate for each in rounds) for way in range(len(rounds[0]))
    ]
    best = max(range(2, len(gains)), key=lambda way: gains[way])
    fixed = FIXED[best - 2]
    return SpeculationResult(
        text=text,
        plain=statistics.median(each[0].rate for each in rounds),
        auto=gains[1],
        fixed=gains[best],
        best=f"{fixed.length} x {fixed.depth}",
        tokens_per_step=statistics.median(each[1].tokens_per_step for each in rounds),
        accepted=statistics.median(each[1].accepted for each in rounds),
        same=all(decoded.tokens == each[0].tokens for each in rounds for decoded in each),
    )


def speculation_table(results: Sequence[SpeculationResult]) -> Table:
    """The figures as people read them."""
    table = Table(title="tokens a second with drafts, times those of plain decoding")
    for name in (
        "text",
        "plain",
        "auto",
        "tokens a step",
        "accepted",
        "best fixed",
        "drafts x steps",
        "same texts",
    ):
        table.add_column(name, justify="left" if name in ("text", "drafts x steps") else "right")
    for each in results:
        table.add_row(
            each.text,
            f"{each.plain:.1f}",
            f"{each.auto:.2f}",
            f"{each.tokens_per_step:.2f}",
            f"{each.accepted:.0%}",
            f"{each.fixed:.2f}",
            each.best,
            "yes" if each.same else "no",
        )
    return table


async def _print(bench: SpeculationBench, address: str) -> None:
    """A line of JSON for each text, for the process that started the servers."""
    async for result in bench.measure(address):
        sys.stdout.write(json.dumps(attrs.asdict(result)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _settings, _address = sys.argv[1:]
    _given = json.loads(_settings)
    asyncio.run(_print(SpeculationBench(**_given | {"texts": tuple(_given["texts"])}), _address))
