"""Which drafter a pool chooses, by what each has been worth."""

from __future__ import annotations

import asyncio
import random

import pytest
import torch
from scripted_drafters import VOCABULARY, ScriptedSource, counting

from swarmcore.client.speculation.drafting import Drafting
from swarmcore.client.speculation.guarded import GuardedSource
from swarmcore.client.speculation.pool import DrafterPool


def test_agreement_is_that_of_late() -> None:
    pool = DrafterPool()
    before = pool.agreement("a").rate
    for _ in range(40):
        pool.agreed("a", 4, 4)
    assert pool.agreement("a").rate > 0.9 > before
    for _ in range(100):
        pool.agreed("a", 4, 0)
    assert pool.agreement("a").rate < 0.25
    assert (pool.agreement("a").proposed, pool.agreement("a").accepted) == (260, 160)


def test_a_token_after_a_wrong_one_is_not_judged() -> None:
    pool = DrafterPool()
    pool.agreed("a", 8, 2)
    assert (pool.agreement("a").proposed, pool.agreement("a").accepted) == (3, 2)


def test_what_a_drafter_says_of_itself_is_believed_until_it_turns_out_otherwise() -> None:
    pool = DrafterPool()
    assert pool.likely("boaster", 2, [0.9, 0.1]) == pytest.approx([0.9, 0.1])
    for _ in range(200):
        pool.agreed("boaster", 1, 0, [0.9])
    assert pool.likely("boaster", 1, [0.9])[0] < 0.2
    assert pool.likely("boaster", 1, [0.1]) == pytest.approx([0.1])


def test_a_slow_drafter_is_asked_where_steps_are_slower() -> None:
    pool = DrafterPool()
    pool.answered("model", 8, 8, 0.32)
    for _ in range(50):
        pool.agreed("model", 8, 6)
    for seconds, tokens in ((1.0, 8), (0.2, 4), (0.02, 0)):
        pool.step_seconds = seconds
        assert pool.worth_asking("model", 8, pool.value(())) == tokens


def test_what_a_proposal_costs_is_what_it_is_long() -> None:
    pool = DrafterPool(step_seconds=0.1)
    for _ in range(50):
        pool.agreed("model", 2, 1)
        pool.answered("model", 8, 2, 0.08)  # it stops by itself when it is in doubt
    assert pool.agreement("model").length == pytest.approx(2)
    pool.answered("model", 2, 2, 0.08)
    assert pool.agreement("model").length == pytest.approx(2)  # it might have gone on
    assert pool.agreement("model").seconds == pytest.approx(0.04)
    pool.answered("model", 2, 2, 4.0, steady=False)  # with a long prompt before it
    assert pool.agreement("model").seconds == pytest.approx(0.04)
    pool.answered("model", 2, 2, 0.04, steady=False)
    assert pool.agreement("model").seconds < 0.04


def test_a_drafter_that_is_not_worth_it_is_asked_now_and_then_and_less_and_less() -> None:
    pool = DrafterPool()
    best = pool.value([1.0] * 8)
    asked = [round for round in range(2000) if pool.worth_asking("model", 4, best)]
    assert asked == [15, 47, 111, 239, 495, 1007, 1519]
    pool.chosen("model")
    assert [bool(pool.worth_asking("model", 4, best)) for _ in range(16)] == [False] * 15 + [True]


def drafting_of(*sources: ScriptedSource, pool: DrafterPool | None = None) -> tuple[Drafting, DrafterPool]:
    pool = pool or DrafterPool()
    return Drafting([GuardedSource(each, VOCABULARY).drafter() for each in sources], pool), pool


async def test_the_drafter_that_agrees_is_chosen_whichever_that_is() -> None:
    wrong = ScriptedSource(lambda text, k: [7] * k, name="wrong", threaded=False)
    right = ScriptedSource(counting, name="right", threaded=False)
    for sources in ((wrong, right), (right, wrong)):
        drafting, pool = drafting_of(*sources)
        drafting.append([1])
        names = []
        for token in range(2, 60):
            names.append((await drafting.propose([], 4)).drafter)
            drafting.append([token])
        assert set(names[20:]) == {"right"}
        assert pool.agreement("right").rate > 0.9 > 0.2 > pool.agreement("wrong").rate


async def test_when_the_text_changes_so_does_the_choice() -> None:
    up = ScriptedSource(counting, name="up", threaded=False)
    down = ScriptedSource(
        lambda text, k: [(text[-1] - 1 - step) % VOCABULARY for step in range(k)], name="down", threaded=False
    )
    drafting, _ = drafting_of(up, down)
    text = [*range(50), *range(48, -1, -1)]
    chosen = []
    for token in text:
        drafting.append([token])
        chosen.append((await drafting.propose([], 3)).drafter)
    assert set(chosen[20:50]) == {"up"} and set(chosen[85:]) == {"down"}


async def test_proposals_behind_what_is_ahead_are_judged_only_where_that_came_about() -> None:
    drafting, pool = drafting_of(ScriptedSource(counting, name="up", threaded=False))
    drafting.append([1])
    assert (await drafting.propose([2, 3], 2)).tokens == (4, 5)
    assert (await drafting.propose([8, 9], 2)).tokens == (10, 11)
    drafting.append([2, 3, 4])
    drafting.append([6, 7])
    assert (pool.agreement("up").proposed, pool.agreement("up").accepted) == (2, 1)


async def test_text_that_came_while_a_proposal_was_made_judges_it() -> None:
    drafting, pool = drafting_of(ScriptedSource(counting, name="up"))
    drafting.append([1])
    asked = asyncio.create_task(drafting.propose([], 3))
    await asyncio.sleep(0)
    drafting.append([2, 3])
    assert (await asked).tokens == (2, 3, 4)
    drafting.append([4])
    assert (pool.agreement("up").proposed, pool.agreement("up").accepted) == (3, 3)
    drafting.close()


async def test_a_slow_drafter_that_turns_out_better_takes_over_and_a_bad_one_is_left_alone() -> None:
    chance = random.Random(0)
    for script, taken in ((counting, True), (lambda text, k: [7] * k, False)):
        drafting, _ = drafting_of(
            ScriptedSource(
                lambda text, k: [(text[-1] + 1 + (chance.random() < 0.5)) % VOCABULARY],
                name="fast",
                threaded=False,
            ),
            ScriptedSource(script, name="slow"),
        )
        drafting.append([1])
        chosen = []
        for token in range(2, 300):
            chosen.append((await drafting.propose([], 4, wait=60)).drafter)
            drafting.append([token % VOCABULARY])
        assert chosen[-100:].count("slow") >= 98 if taken else chosen[-100:].count("fast") >= 95
        drafting.close()


async def test_with_nobody_to_ask_there_is_no_proposal() -> None:
    drafting, _ = drafting_of()
    drafting.append([1])
    assert (await drafting.propose([], 4)).tokens == ()
    assert not drafting.wants_hidden


async def test_rows_go_to_those_that_want_them() -> None:
    plain, reading = (ScriptedSource(counting, threaded=False) for _ in range(2))
    reading.wants_hidden = True
    drafting, _ = drafting_of(plain, reading)
    assert drafting.wants_hidden
    rows = torch.ones(2, 3)
    drafting.append([1, 2])
    drafting.observe(0, rows)
    assert reading.made[0].observed == [(0, rows)] and plain.made[0].observed == []
    drafting.close()
