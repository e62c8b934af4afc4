"""Sessions whose rows are encoded by link: as many bytes as a link is fast for, and the same results.

The codec stands for int8: it is as short, but lossless within a process, so that results can be compared.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from itertools import count

import attrs
import pytest
from memory_swarm import Run, Server, Swarm, befall, quiet, swarm_of

from swarmcore.errors import UnknownCodecError
from swarmcore.routing import step_codec
from swarmcore.routing.step_codec import StepCodecs
from swarmcore.testing.executor import hidden_states
from swarmcore.testing.faulty import Faults
from swarmcore.wire import tensors
from swarmcore.wire.messages import Step

pytestmark = pytest.mark.virtual_time

SLOW = 12_000.0
"""Bytes a second."""
LONG = 120
OPTIONS = {"codec": "auto", "chunk_rows": 4096}


@attrs.define
class ShortCodec:
    """As short as int8; what it stands for stays here."""

    kept: dict[bytes, bytes] = attrs.Factory(dict)
    encoded: Counter[int] = attrs.Factory(Counter)
    """Times that so many rows were encoded."""
    _numbers: Iterator[int] = attrs.Factory(count)

    def encode(self, data: memoryview, dtype: str, shape: tuple[int, ...]) -> memoryview:
        self.encoded[shape[0]] += 1
        size = self.encoded_nbytes(dtype, shape)
        key = next(self._numbers).to_bytes(size, "big")
        self.kept[key] = bytes(data)
        return memoryview(key)

    def decode(self, data: memoryview, dtype: str, shape: tuple[int, ...]) -> memoryview:
        return memoryview(self.kept[bytes(data)])

    def encoded_nbytes(self, dtype: str, shape: tuple[int, ...]) -> int:
        return shape[0] * shape[1] + 2


@pytest.fixture
def codec(monkeypatch: pytest.MonkeyPatch) -> ShortCodec:
    codec = ShortCodec()
    monkeypatch.setattr(tensors, "_codecs", {"int8": codec})
    monkeypatch.setattr(step_codec, "SPREAD_NBYTES", 1024)  # for rows of 16 bytes
    return codec


def slow_down(sender: Server, receiver: Server, rate: float = SLOW) -> None:
    sender.transport.faults_toward[receiver.peer] = Faults(delay=0.01, rate=rate)


async def prompt_seconds(swarm: Swarm, **options: object) -> float:
    """What the prompt of a new session takes; a few tokens follow it."""
    session = await swarm.open(**options)
    run, loop = Run.of(session), asyncio.get_running_loop()
    start = loop.time()
    await run.step(LONG)
    seconds = loop.time() - start
    for _ in range(3):
        await run.step(1)
    await session.close()
    await quiet(swarm)
    return seconds


@pytest.mark.parametrize("journal", ["client", "servers"])
async def test_only_the_slow_link_has_shorter_rows(codec: ShortCodec, journal: str) -> None:
    async with swarm_of("0:4", "4:8", "8:12", delay=0.01) as swarm:
        first, second, third = swarm.servers
        slow_down(first, second)
        raw = await prompt_seconds(swarm, journal=journal, chunk_rows=4096)
        before = await prompt_seconds(swarm, journal=journal, **OPTIONS)
        assert before == pytest.approx(raw, rel=0.05), "nothing is known of the links"
        assert not codec.encoded
        links, now = swarm.planner.codecs, asyncio.get_running_loop().time()
        assert links.seconds_per_byte((first.peer, second.peer), now) == pytest.approx(1 / SLOW, rel=0.1)
        for link in ((None, first.peer), (second.peer, third.peer), (third.peer, None)):
            assert links.seconds_per_byte(link, now) < 1e-6
        after = await prompt_seconds(swarm, journal=journal, **OPTIONS)
        assert after < 0.5 * raw
        assert codec.encoded == {LONG: 1}, "the prompt, and once: single tokens are not worth it"


@pytest.mark.parametrize("place", range(4))
async def test_each_link_is_measured_by_who_receives(codec: ShortCodec, place: int) -> None:
    async with swarm_of("0:4", "4:8", "8:12", delay=0.01) as swarm:
        transports = [swarm.client_transport, *(server.transport for server in swarm.servers)]
        peers = [*(server.peer for server in swarm.servers), swarm.client.peer]
        transports[place].faults_toward[peers[place]] = Faults(delay=0.01, rate=SLOW)
        links = [(None, peers[0]), (peers[0], peers[1]), (peers[1], peers[2]), (peers[2], None)]
        for _ in range(2):
            session = await swarm.open(**OPTIONS)
            run = Run.of(session)
            await run.step(LONG, reply="all")
            await run.step(1)
            await session.close()
        now = asyncio.get_running_loop().time()
        codecs = [swarm.planner.codecs.codec(link, "float32", (LONG, 4), now) for link in links]
        assert codecs == ["int8" if number == place else "raw" for number in range(4)]
        assert codec.encoded == {LONG: 1}


@pytest.mark.parametrize("kind", ["kill", "restart", "break"])
@pytest.mark.parametrize("stage", range(3))
@pytest.mark.parametrize("journal", ["client", "servers"])
async def test_failovers_while_rows_are_shorter(
    codec: ShortCodec, journal: str, stage: int, kind: str
) -> None:
    async with swarm_of("0:4", "4:8", "8:12", delay=0.01) as swarm:
        slow_down(swarm.servers[0], swarm.servers[1])
        slow_down(swarm.servers[1], swarm.servers[2])
        await prompt_seconds(swarm, **OPTIONS)
        session = await swarm.open(journal=journal, **OPTIONS)
        run = Run.of(session)
        await run.step(LONG)
        assert codec.encoded[LONG] == 2
        await befall(swarm, session, kind, stage)
        await run.step(1)
        await run.step(LONG // 2, starts=[LONG - 10])
        under_way = asyncio.create_task(run.step(LONG // 2))
        await asyncio.sleep(0.05)
        await befall(swarm, session, kind, (stage + 1) % 3)
        await under_way
        assert session.failovers >= 1
        await session.close()
        await quiet(swarm)


@pytest.mark.parametrize("stage", range(3))
@pytest.mark.parametrize("journal", ["client", "servers"])
async def test_failovers_before_anything_is_known_of_links(
    codec: ShortCodec, journal: str, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with servers of earlier versions, that never say how long a step was under way."""
    monkeypatch.setattr(StepCodecs, "arrived", lambda *measured: None)
    async with swarm_of("0:4", "4:8", "8:12", delay=0.01) as swarm:
        session = await swarm.open(journal=journal, **OPTIONS)
        run = Run.of(session)
        await run.step(LONG)
        await befall(swarm, session, "kill", stage)
        await run.step(1)
        assert session.failovers == 1
        assert not codec.encoded
        await session.close()
        await quiet(swarm)


async def test_a_server_of_an_earlier_version_sends_raw_rows(
    codec: ShortCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with swarm_of("0:4", "4:12", delay=0.01) as swarm:
        slow_down(*swarm.servers)
        await prompt_seconds(swarm, **OPTIONS)
        monkeypatch.setattr(Step, "output_codec", property(lambda step: step.codec))
        await prompt_seconds(swarm, **OPTIONS)
        assert not codec.encoded


@pytest.mark.parametrize("stage", [0, 1])
async def test_a_server_that_does_not_know_the_codec_gets_raw_rows(
    codec: ShortCodec, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with swarm_of("0:4", "4:12", delay=0.01) as swarm:
        slow_down(*swarm.servers)
        await prompt_seconds(swarm, **OPTIONS)
        engine = swarm.servers[stage].engine
        known, refused = engine.step, 0

        def step(session: str, starts: object, lengths: object, hidden: object, **options: object) -> object:
            nonlocal refused
            if "int8" in (options["codec"], hidden.codec):  # type: ignore[attr-defined]
                refused += 1
                raise UnknownCodecError("tensor codec 'int8' is not known here")
            return known(session, starts, lengths, hidden, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(engine, "step", step)
        await prompt_seconds(swarm, **OPTIONS)
        assert refused == 1
        await prompt_seconds(swarm, **OPTIONS)
        assert refused == 1
        assert not swarm.failovers


async def test_a_server_that_never_knows_a_codec_is_an_error(
    codec: ShortCodec, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with swarm_of("0:12") as swarm:

        def step(*arguments: object, **options: object) -> object:
            raise UnknownCodecError("tensor codec 'raw' is not known here")

        monkeypatch.setattr(swarm.servers[0].engine, "step", step)
        session = await swarm.open(**OPTIONS)
        with pytest.raises(UnknownCodecError, match="'raw' is not known"):
            await session.step(hidden_states([[1.0] * 4]), [1])
        await session.close()
