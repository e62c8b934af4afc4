"""What a drafter does wrong costs its drafts and a line in the log: never an error, never a wait."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from scripted_drafters import VOCABULARY, ScriptedSource, counting

from swarmcore.client.speculation.guarded import NOTHING, GuardedSource, Proposal


@pytest.fixture(params=[True, False], ids=["threaded", "inline"])
def threaded(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@asynccontextmanager
async def guarding(source: ScriptedSource, **options: float) -> AsyncIterator[GuardedSource]:
    guarded = GuardedSource(source, VOCABULARY, **options)
    try:
        yield guarded
    finally:
        guarded.close()
        guarded.close()
        assert await asyncio.to_thread(source.closed.wait, 10)


async def test_proposals_and_texts_go_through_in_their_order(threaded: bool) -> None:
    source = ScriptedSource(counting, threaded=threaded)
    async with guarding(source) as guarded:
        drafter = guarded.drafter()
        drafter.append([1, 2, 3])
        assert await drafter.propose([], 3) == Proposal(
            "scripted",
            (
                4,
                5,
                6,
            ),
        )
        asked = asyncio.create_task(drafter.propose([4, 5], 2))
        await asyncio.sleep(0)
        drafter.append([7])  # does not come between the question and its answer
        assert await asked == Proposal(
            "scripted",
            (
                6,
                7,
            ),
        )
        assert await drafter.propose([], 1) == Proposal("scripted", (8,))
        assert await drafter.propose([], 0) == NOTHING
        drafter.close()
        assert await drafter.propose([], 1) == NOTHING
        assert guarded.late == guarded.fallbacks.total() == 0
    made = source.made[0]
    assert made.closed
    assert len(made.threads) == 1
    assert (made.threads == {threading.get_ident()}) is not threaded


async def test_sequences_that_ask_at_the_same_time_share_a_pass() -> None:
    source = ScriptedSource(counting)
    async with guarding(source) as guarded:
        drafters = [guarded.drafter() for _ in range(4)]
        for place, drafter in enumerate(drafters):
            drafter.append([10 * place])
        proposals = await asyncio.gather(*(drafter.propose([], 1) for drafter in drafters))
    assert [each.tokens for each in proposals] == [(1,), (11,), (21,), (31,)]
    assert max(source.batches) >= 3  # the first may have gone off alone


def _raises(text: list[int], k: int) -> list[int]:
    raise RuntimeError("no idea")


FAULTS: dict[str, tuple[Callable[[list[int], int], Any], str]] = {
    "raises": (_raises, "raised"),
    "too many": (lambda text, k: [1] * (k + 1), "wrong"),
    "outside the vocabulary": (lambda text, k: [1, VOCABULARY], "wrong"),
    "below the vocabulary": (lambda text, k: [-1], "wrong"),
    "no list": (lambda text, k: 7, "wrong"),
    "no numbers": (lambda text, k: ["a"], "wrong"),
    "fractions": (lambda text, k: [1.0], "wrong"),
    "endless": (lambda text, k: iter(int, 1), "wrong"),
    "none": (lambda text, k: None, "wrong"),
}


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_drafter_that_fails_is_set_aside_and_logged_once(
    fault: str, threaded: bool, caplog: pytest.LogCaptureFixture
) -> None:
    script, reason = FAULTS[fault]
    source = ScriptedSource(script, threaded=threaded)
    async with guarding(source) as guarded:
        drafter, other = guarded.drafter(), guarded.drafter()
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                drafter.append([1])
                assert await drafter.propose([], 2) == NOTHING
            assert await other.propose([], 2) == NOTHING
        assert drafter.set_aside and other.set_aside
        assert guarded.fallbacks == {reason: 2}
    assert len(caplog.records) == 1 and "scripted" in caplog.text


@pytest.mark.parametrize("probabilities", [[0.5], [0.5, 2.0], [0.5, float("nan")], ["a", "b"], 3])
async def test_probabilities_that_are_none_are_a_fault_too(probabilities: Any) -> None:
    source = ScriptedSource(counting, threaded=False)
    async with guarding(source) as guarded:
        drafter = guarded.drafter()
        source.made[0].probabilities = probabilities
        assert await drafter.propose([], 2) == NOTHING
        assert guarded.fallbacks == {"wrong": 1}


async def test_one_bad_sequence_of_a_batch_does_not_harm_the_others() -> None:
    def script(text: list[int], k: int) -> list[int]:
        return counting(text, k) if text[0] < 50 else _raises(text, k)

    async with guarding(ScriptedSource(script)) as guarded:
        drafters = [guarded.drafter() for _ in range(3)]
        for drafter, first in zip(drafters, (1, 60, 2), strict=True):
            drafter.append([first])
        proposals = await asyncio.gather(*(drafter.propose([], 1) for drafter in drafters))
        assert [list(each.tokens) for each in proposals] == [[2], [], [3]]
        assert [drafter.set_aside for drafter in drafters] == [False, True, False]


async def test_a_drafter_that_does_not_answer_is_not_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    release = threading.Event()
    source = ScriptedSource(lambda text, k: counting(text, k) if release.wait(60) else [])
    async with guarding(source, patience=0.2) as guarded:
        drafter = guarded.drafter()
        drafter.append([1])
        assert await drafter.propose([], 1, wait=0.01) == NOTHING
        # Nor is it asked again while it is at it.
        assert await drafter.propose([], 1, wait=0.01) == NOTHING
        assert guarded.late == 2 and not drafter.set_aside and not caplog.records
        while not guarded.busy(0.2):
            await asyncio.sleep(0.02)
        drafter.append([2])
        assert drafter.set_aside and guarded.drafter().set_aside
        assert await drafter.propose([], 1) == NOTHING
        assert guarded.fallbacks == {"silent": 1} and len(caplog.records) == 1
        assert drafter.failure == "a call has not returned for 0.2 s" and drafter.late == 2
        release.set()


async def test_a_question_that_is_given_up_is_not_answered() -> None:
    release, asked_for = threading.Event(), list[int]()

    def script(text: list[int], k: int) -> list[int]:
        asked_for.append(k)
        return counting(text, k) if release.wait(60) else []

    source = ScriptedSource(script)
    async with guarding(source) as guarded:
        drafter = guarded.drafter()
        drafter.append([1])
        first, given_up, last = (asyncio.create_task(drafter.propose([], k, wait=60)) for k in (1, 2, 3))
        while not asked_for:
            await asyncio.sleep(0.001)
        given_up.cancel()
        await asyncio.wait([given_up])
        release.set()
        assert (await first).tokens == (2,) and (await last).tokens == (2, 3, 4)
    assert asked_for == [1, 3]


async def test_a_late_drafter_is_of_use_again_when_it_has_caught_up() -> None:
    release = threading.Event()
    source = ScriptedSource(lambda text, k: counting(text, k) if release.wait(60) else [])
    async with guarding(source) as guarded:
        drafter = guarded.drafter()
        drafter.append([1])
        assert await drafter.propose([], 1, wait=0.01) == NOTHING
        drafter.append([2, 3])
        release.set()
        assert await drafter.propose([], 2, wait=60) == Proposal(
            "scripted",
            (
                4,
                5,
            ),
        )
        assert not guarded.fallbacks


async def test_what_waits_when_it_is_closed_is_done_or_answered() -> None:
    release = threading.Event()
    source = ScriptedSource(lambda text, k: counting(text, k) if release.wait(60) else [])
    async with guarding(source) as guarded:
        first, second = guarded.drafter(), guarded.drafter()
        asked = asyncio.create_task(first.propose([], 1, wait=60))
        await asyncio.sleep(0)
        also_asked = asyncio.create_task(second.propose([], 1, wait=60))
        await asyncio.sleep(0)
        second.close()
        guarded.close()
        assert await also_asked == NOTHING
        release.set()
        assert await asked == Proposal("scripted", (0,))
        assert await first.propose([], 1) == NOTHING
    assert source.made[1].closed


async def test_a_source_that_makes_no_drafter_is_done_without(caplog: pytest.LogCaptureFixture) -> None:
    class Empty(ScriptedSource):
        def drafter(self, *, owner: str = "") -> Any:
            raise MemoryError("no room")

    async with guarding(Empty(counting)) as guarded:
        drafter = guarded.drafter()
        drafter.append([1])
        assert await drafter.propose([], 1) == NOTHING
        assert guarded.fallbacks == {"raised": 1} and len(caplog.records) == 1


async def test_text_that_a_drafter_cannot_take_sets_it_aside(threaded: bool) -> None:
    source = ScriptedSource(counting, threaded=threaded)
    async with guarding(source) as guarded:
        drafter = guarded.drafter()
        source.made[0].text = ()  # type: ignore[assignment]
        drafter.append([1])
        drafter.append([1])
        assert await drafter.propose([], 1) == NOTHING
        assert guarded.fallbacks == {"raised": 1}


def test_a_process_ends_while_a_drafter_never_does() -> None:
    # The thread of it is not waited for; nor does it keep anything but itself alive.
    source = ScriptedSource(lambda text, k: threading.Event().wait() and [])

    async def ask() -> None:
        assert await GuardedSource(source, VOCABULARY).drafter().propose([], 1, wait=0.01) == NOTHING

    asyncio.run(ask())
    gc.collect()
    thread = next(each for each in threading.enumerate() if each.name == "swarmcore-draft-scripted")
    assert thread.daemon
