"""What drafts bring: texts decoded plainly, as measurements decide, and with fixed settings, in turns."""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
from asyncio.subprocess import PIPE
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from typing import Any

import attrs
from rich.table import Table

from swarmcore.bench.link_pump import LEFT, RIGHT
from swarmcore.bench.long_link import Link, LongLink, long_link
from swarmcore.bench.swarms import serve_options, start_swarm
from swarmcore.checkpoint import open_checkpoint
from swarmcore.client.swarm import connect
from swarmcore.errors import RemoteFaultError
from swarmcore.generation_settings import Speculation
from swarmcore.testing.processes import ServerProcess, peer_environment
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
PROMPTS = {
    "edit": f"Here is a file:\n{FILE}\nHere is the same file once more:\n{FILE[:60]}",
    "quotation": "The report says: the harbour was closed for three days after the storm, and the ferries "
    "did not run. Asked what the report says, the clerk read it out: the harbour was closed",
    "chat": "Question: What is a good way to learn to cook? Answer:",
    "random": "qz 81 vlk; 7 #p ow wyx 29 jjt, e 6 umb nn 40 fh ~ 3 kd 958 x lo bb 17 rr z tq 5 hy",
}
SAMPLED: dict[str, dict[str, Any]] = {"random": {"temperature": 2.0, "seed": 7}}
"""Texts that are not greedy: small models soon repeat themselves then, and there is much to draft."""
FIXED = (
    *(Speculation(length=length, depth=1) for length in (4, 8, 16)),
    *(Speculation(length=length, depth=4) for length in (4, 8)),
)
WAYS: tuple[str | Speculation, ...] = ("off", "auto", *FIXED)
_TIMEOUT = 1200.0


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

    async def run(
        self, *, progress: Progress | None = None, remark: Callable[[str], None] = lambda text: None
    ) -> list[SpeculationResult]:
        """Start the servers, measure, stop them. Raise `UnavailableError` where no link can be emulated."""
        checkpoint = await asyncio.to_thread(open_checkpoint, self.model, progress=progress)
        remark(f"starting {self.servers} servers")
        if not self.delay and self.rate is None:
            swarm = start_swarm(
                checkpoint,
                self.servers,
                dtype=self.dtype,
                threads=self.threads,
                model=self.model,
                executor=self.executor,
                weights=self.weights,
            )
            async with swarm as address:
                return await self.measure(address)
        async with long_link(Link(delay=self.delay, rate=self.rate)) as network, AsyncExitStack() as stack:
            joining: tuple[str, ...] = ()
            for place, span in enumerate(checkpoint.info.span.split(self.servers)):
                # In turns on the one and on the other side: each way from one to the next is over the link.
                host = LEFT if place % 2 else RIGHT
                server = await self._serve(network, host, str(span), joining)
                await stack.enter_async_context(server)
                joining = joining or ("--bootstrap", server.address)
            remark("measuring over the link")
            settings = json.dumps(attrs.asdict(self) | {"model": str(checkpoint.folder)})
            command = ("-m", "swarmcore.bench.speculation", settings, joining[1])
            client = await network.run(LEFT, *command, env=peer_environment())
            output, _ = await asyncio.wait_for(client.communicate(), _TIMEOUT)
            if client.returncode:
                raise RemoteFaultError("the benchmark's client ended early; its message is above")
            return [SpeculationResult(**each) for each in json.loads(output)]

    async def _serve(
        self, network: LongLink, host: str, blocks: str, joining: Sequence[str]
    ) -> ServerProcess:
        arguments = (
            *("serve", "--model", self.model, "--blocks", blocks),
            *serve_options(self.dtype, self.threads),
            *("--executor", self.executor, "--weights", self.weights),
            *("--listen", f"{network.address(host)}:0", *joining),
        )
        process = await network.run(
            host,
            "-m",
            "swarmcore",
            *arguments,
            "--json",
            "--exit-with-stdin",
            stderr=PIPE,
            env=peer_environment(),
        )
        return await ServerProcess.supervise(process, arguments)

    async def measure(self, address: str) -> list[SpeculationResult]:
        """Over the swarm that is found at ``address``."""
        async with connect(address) as swarm:
            model = await swarm.load_model(
                self.model, dtype=self.dtype, threads=self.threads, draft=self.draft
            )
            await swarm.wait_for_blocks(model.info, timeout=60)

            async def decode(name: str, speculation: str | Speculation) -> _Decoded:
                generation = model.generate(
                    PROMPTS[name],
                    max_new_tokens=self.tokens + 1,
                    min_new_tokens=self.tokens + 1,
                    speculation=speculation,
                    **SAMPLED.get(name, {}),
                )
                await generation
                assert generation.first_token_seconds is not None
                counts = generation.speculation
                return _Decoded(
                    self.tokens / (generation.seconds - generation.first_token_seconds),
                    generation.tokens,
                    counts.tokens_per_step,
                    counts.acceptance or 0.0,
                )

            results = []
            for name in PROMPTS:
                rounds = []
                for _ in range(self.rounds + 1):
                    rounds.append([await decode(name, way) for way in WAYS])
                results.append(_result(name, rounds[1:]))
            return results


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


if __name__ == "__main__":
    _settings, _address = sys.argv[1:]
    found = asyncio.run(SpeculationBench(**json.loads(_settings)).measure(_address))
    sys.stdout.write(json.dumps([attrs.asdict(each) for each in found]))
