"""The compute thread: what waits together is done together, and the event loop goes on meanwhile."""

from __future__ import annotations

import asyncio
import threading
import time
from pathlib import Path

import pytest
import torch
from transformers import LogitsProcessorList

from swarmcore.checkpoint import open_checkpoint
from swarmcore.client.generation.compute import MAX_ROWS, ModelCompute
from swarmcore.client.generation.local_model import LocalParts
from swarmcore.client.generation.sampling import Choice, Sampler
from swarmcore.errors import ProtocolError, SessionLostError
from swarmcore.executor.torch.wire_tensors import to_wire


class Counted:
    """Local parts that note the size of every pass, and wait in it for leave to go on."""

    def __init__(self, parts: LocalParts) -> None:
        self.parts = parts
        self.heads: list[int] = []
        self.embeddings: list[int] = []
        self.threads: set[str] = set()
        self.leave = threading.Event()
        self.leave.set()

    def __getattr__(self, name: str):
        return getattr(self.parts, name)

    def embed(self, ids, positions):
        self.threads.add(threading.current_thread().name)
        self.embeddings.append(len(ids))
        assert self.leave.wait(10)
        return self.parts.embed(ids, positions)

    def scores(self, hidden):
        self.heads.append(len(hidden))
        assert self.leave.wait(10)
        return self.parts.scores(hidden)


@pytest.fixture
def counted(llama_folder: Path, tmp_path: Path) -> Counted:
    return Counted(LocalParts.load(open_checkpoint(str(llama_folder), cache_dir=tmp_path)))


@pytest.fixture
async def compute(counted: Counted):
    compute = ModelCompute(1)
    await compute.load(lambda: counted)
    yield compute
    counted.leave.set()
    await compute.close()


def rows(count: int):
    return to_wire("hidden", torch.randn(count, 64))


async def test_what_is_asked_in_one_turn_of_the_loop_is_one_pass(compute, counted):
    results = await asyncio.gather(*(compute.logits(rows(1)) for _ in range(16)))
    assert counted.heads == [16]
    assert all(result.shape == (1, 257) for result in results)
    await asyncio.gather(*(compute.embed([1, 2], [0, 1]) for _ in range(5)))
    assert counted.embeddings == [10]


async def test_what_comes_while_the_thread_is_busy_is_the_next_pass(compute, counted):
    counted.leave.clear()
    first = asyncio.create_task(compute.logits(rows(1)))
    while not counted.heads:
        await asyncio.sleep(0)
    others = [asyncio.create_task(compute.logits(rows(2))) for _ in range(7)]
    await asyncio.sleep(0)
    counted.leave.set()
    await asyncio.gather(first, *others)
    assert counted.heads == [1, 14]


async def test_the_loop_goes_on_while_the_thread_computes(compute, counted):
    counted.leave.clear()
    work = asyncio.create_task(compute.embed([1], [0]))
    for _ in range(100):
        await asyncio.sleep(0)
    assert not work.done()
    counted.leave.set()
    await work
    assert counted.threads == {"swarmcore-client_0"}


async def test_batched_results_are_those_of_each_alone(compute, counted):
    hidden = [torch.randn(n, 64) for n in (1, 3, 2)]
    together = await asyncio.gather(*(compute.logits(to_wire("hidden", h)) for h in hidden))
    for made, own in zip(together, hidden, strict=True):
        torch.testing.assert_close(made, counted.parts.logits(own), atol=1e-5, rtol=0)


async def test_a_pass_has_a_bound(compute, counted):
    await asyncio.gather(*(compute.logits(rows(20)) for _ in range(7)))
    assert counted.heads == [60, 60, 20]
    assert max(counted.heads) <= MAX_ROWS
    await compute.logits(rows(MAX_ROWS + 1))


async def test_16_generations_share_every_head_product(model, sessions, counted):
    model._compute._parts = counted
    barrier = asyncio.Barrier(16)

    async def together() -> None:
        await barrier.wait()

    sessions.stepped = together
    await asyncio.gather(
        *(model.generate(f"number {i}", max_new_tokens=6, speculation="off") for i in range(16))
    )
    assert counted.heads == [16] * 6


def returned(compute: ModelCompute, generation: str, *, away: float, due: float) -> None:
    """Let passes take a second, and a generation be back every ``away`` seconds, next in ``due`` seconds."""
    now = asyncio.get_running_loop().time() + due - away
    for turn in range(30, 0, -1):
        compute._window.passes.note(1, 1.0)
        compute._window.answered(generation, now - turn * away)
        compute._window.arrived(generation, now - (turn - 1) * away)
    compute._window.answered(generation, now)


def greedy() -> Choice:
    return Choice(Sampler([1], LogitsProcessorList(), greedy=True))


async def test_a_generation_that_is_about_to_come_is_waited_for(compute, counted):
    returned(compute, "other", away=20.0, due=0.2)
    first = asyncio.create_task(compute.next_tokens(rows(1), [greedy()], [0], "one"))
    for _ in range(20):
        await asyncio.sleep(0)
    assert counted.heads == []
    tokens, embedded = await compute.next_tokens(rows(1), [greedy()], [0], "other")
    assert len(tokens) == len(embedded) == 1
    await first
    assert counted.heads == [2]


async def test_one_that_has_ended_is_not_waited_for(compute, counted):
    with compute.generating("other"):
        returned(compute, "other", away=20.0, due=0.2)
    first = asyncio.create_task(compute.next_tokens(rows(1), [greedy()], [0], "one"))
    while not counted.heads:
        await asyncio.sleep(0)
    await first


async def test_other_work_is_not_held_back(compute, counted):
    returned(compute, "other", away=3600.0, due=0.5)
    waits = asyncio.create_task(compute.next_tokens(rows(1), [greedy()], [0], "one"))
    await asyncio.sleep(0)
    await compute.logits(rows(2))
    await waits
    assert counted.heads == [3]


async def test_closing_ends_the_wait(compute, counted):
    returned(compute, "other", away=3600.0, due=0.5)
    waits = asyncio.create_task(compute.next_tokens(rows(1), [greedy()], [0], "one"))
    await asyncio.sleep(0)
    await compute.close()
    with pytest.raises(SessionLostError, match="closed"):
        await waits
    assert counted.heads == []


async def test_cancelled_work_is_not_done(compute, counted):
    counted.leave.clear()
    first = asyncio.create_task(compute.logits(rows(1)))
    while not counted.heads:
        await asyncio.sleep(0)
    second = asyncio.create_task(compute.logits(rows(3)))
    third = asyncio.create_task(compute.logits(rows(5)))
    await asyncio.sleep(0)
    first.cancel()
    second.cancel()
    counted.leave.set()
    await third
    assert counted.heads == [1, 5]
    assert first.cancelled()


async def test_bad_hidden_states_hurt_their_own_caller_only(compute):
    good, bad, worse = await asyncio.gather(
        compute.logits(rows(1)),
        compute.logits(to_wire("hidden", torch.randn(1, 63))),
        compute.logits(to_wire("hidden", torch.randn(64))),
        return_exceptions=True,
    )
    assert good.shape == (1, 257)
    assert isinstance(bad, ProtocolError)
    assert isinstance(worse, ProtocolError)


async def test_waiting_work_fails_when_it_is_closed(compute, counted):
    counted.leave.clear()
    first = asyncio.create_task(compute.logits(rows(1)))
    while not counted.heads:
        await asyncio.sleep(0)
    waiting = asyncio.create_task(compute.logits(rows(1)))
    await asyncio.sleep(0)
    closing = asyncio.create_task(compute.close())
    await asyncio.sleep(0)
    counted.leave.set()
    await closing
    assert (await first).shape == (1, 257)
    with pytest.raises(SessionLostError):
        await waiting
    with pytest.raises(SessionLostError):
        await compute.embed([1], [0])


class SlowerWithThreads:
    """Each further thread of torch makes its logits take 5 ms longer."""

    dtype = torch.float32
    hidden_size = 64

    def __init__(self):
        self.tried = []

    def logits(self, hidden):
        threads = torch.get_num_threads()
        if threads not in self.tried:
            self.tried.append(threads)
        time.sleep(0.005 * threads)


async def test_the_head_gets_as_many_threads_as_make_it_fastest():
    chosen, given = ModelCompute(), ModelCompute(3)
    parts = SlowerWithThreads()
    try:
        await chosen.run(torch.set_num_threads, 4)
        await chosen.load(lambda: parts)
        assert parts.tried == [4, 2, 1]
        assert await chosen.run(torch.get_num_threads) == 1
        await given.load(lambda: parts)
        assert await given.run(torch.get_num_threads) == 3
    finally:
        await chosen.close()
        await given.close()
