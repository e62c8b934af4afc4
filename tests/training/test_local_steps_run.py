"""Whole runs in memory, on virtual time: what peers agree on, whatever happens to them."""

from __future__ import annotations

import asyncio

import pytest
import torch
from training_run import DEADLINE, Trainee, TrainingRun, exchange_all

from swarmcore.registry.memory import MemoryDirectory
from swarmcore.testing.faulty import Faults
from swarmcore.wire.local_steps import PIECE_VALUES

pytestmark = pytest.mark.virtual_time


class Quadratic:
    """Each peer pulls toward a target of its own; the best is the mean of all."""

    def __init__(self, index: int, values: int = 4) -> None:
        away = torch.randn(values, generator=torch.Generator().manual_seed(index))
        self.target = 5 * away / away.norm()  # as far for all, so that nobody's delta is clipped
        self.samples = index + 1

    def train(self, parameters: torch.Tensor, steps: int = 10, lr: float = 0.05) -> torch.Tensor:
        for _ in range(steps):
            parameters = parameters - lr * (parameters - self.target)
        return parameters


async def test_a_quadratic_problem_converges_as_in_one_process():
    problems = [Quadratic(index) for index in range(4)]
    start = torch.zeros(4)
    reference = start.clone().requires_grad_()
    outer = torch.optim.SGD([reference], lr=0.7, momentum=0.5, nesterov=True)
    total = sum(problem.samples for problem in problems)
    async with TrainingRun(momentum=0.5) as run:
        trainees = [await run.join(start) for _ in problems]
        for number in range(1, 31):
            for trainee, problem in zip(trainees, problems, strict=True):
                trainee.parameters = problem.train(trainee.parameters)
            await asyncio.gather(
                *(
                    trainee.exchange(samples=problem.samples)
                    for trainee, problem in zip(trainees, problems, strict=True)
                )
            )
            run.assert_same()
            at = reference.detach()
            reference.grad = torch.stack(
                [(at - problem.train(at)) * (problem.samples / total) for problem in problems]
            ).sum(0)
            outer.step()
            torch.testing.assert_close(trainees[0].parameters, reference.detach())
            assert {(t.reports[-1].round, t.reports[-1].samples) for t in trainees} == {(number, total)}
    best = sum(problem.target * problem.samples for problem in problems) / total
    assert torch.dist(trainees[0].parameters, best) < 1e-3


@pytest.mark.parametrize(("codec", "off"), [("int8", 0.02), ("int8+zstd", 0.02), ("topk0.25", 0.3)])
async def test_lossy_codecs_give_all_the_same_bits(codec: str, off: float):
    problems = [Quadratic(index, 512) for index in range(3)]
    async with TrainingRun(codec=codec, momentum=0.0) as run:
        trainees = await run.joined(3, 512)
        for _ in range(60):
            for trainee, problem in zip(trainees, problems, strict=True):
                trainee.parameters = problem.train(trainee.parameters)
            await exchange_all(trainees)
        run.assert_same()
        best = sum(problem.target for problem in problems) / 3
        assert torch.dist(trainees[0].parameters, best) < off * torch.linalg.vector_norm(best)
        assert sum(t.member.traffic.sent for t in trainees) < 0.45 * 60 * 2 * 2 * 4 * 512


async def test_vectors_of_several_pieces():
    async with TrainingRun(outer_lr=1.0, momentum=0.0) as run:
        trainees = await run.joined(2, PIECE_VALUES + 10)
        await exchange_all(trainees, 1.0)
        run.assert_same()
        assert bool((trainees[0].parameters == -1).all())
        late = await run.join(torch.zeros(PIECE_VALUES + 10))
        assert bool((late.parameters == -1).all())


async def test_who_hears_of_a_result_first_may_go_on_at_once():
    async with TrainingRun(outer_lr=1.0, momentum=0.0) as run:
        trainees = await run.joined(4)
        for index, trainee in enumerate(trainees):
            trainee.transport.faults = Faults(delay=0.001 + 0.05 * index)

        async def train(trainee: Trainee) -> None:
            for _ in range(12):
                await trainee.exchange(torch.ones(4))

        began = asyncio.get_running_loop().time()
        await asyncio.gather(*map(train, trainees))
        assert asyncio.get_running_loop().time() - began < 12 * 2.5
        run.assert_same()
        assert {(t.reports[-1].round, t.reports[-1].peers) for t in trainees} == {(12, 4)}


async def test_alone_a_peer_goes_on_by_itself():
    async with TrainingRun(outer_lr=1.0, momentum=0.0) as run:
        (alone,) = await run.joined(1)
        report = await alone.exchange(torch.ones(4))
        assert (report.round, report.peers, report.included, report.seconds) == (1, 1, True, 0)
        assert alone.parameters.tolist() == [-1] * 4


# --- peers that come late, come and go --------------------------------------------------------------------


async def test_a_straggler_is_not_waited_for_past_the_deadline_and_loses_nothing():
    async with TrainingRun(outer_lr=1.0, momentum=0.0) as run:
        *quick, slow = await run.joined(4)

        async def train_slowly() -> None:
            await asyncio.sleep(60)
            await slow.exchange(torch.tensor([0.0, 0, 0, 3]))

        straggling = asyncio.create_task(train_slowly())
        await exchange_all(quick, 1.0)
        for trainee in quick:
            assert DEADLINE <= trainee.reports[-1].seconds < DEADLINE + 0.5
            assert trainee.reports[-1].peers == 3
        await asyncio.sleep(80)
        await exchange_all(quick, 1.0)
        await straggling
        run.assert_same()
        assert slow.reports[-1].included
        assert slow.reports[-1].peers == 4
        # Its delta came early for the second round, which it did not end.
        assert slow.reports[-1].seconds > DEADLINE
        assert slow.parameters.tolist() == [-1.75, -1.75, -1.75, -2.5]


async def test_a_straggler_may_be_the_coordinator():
    async with TrainingRun() as run:
        await run.joined(4)
        slow = run.coordinator(0)
        quick = [trainee for trainee in run.trainees if trainee is not slow]
        await exchange_all(quick, 1.0)
        assert {(t.reports[-1].round, t.reports[-1].peers) for t in quick} == {(1, 3)}
        run.assert_same()


async def test_a_peer_far_behind_fetches_the_parameters():
    async with TrainingRun() as run:
        *quick, slow = await run.joined(3)
        for _ in range(6):
            await exchange_all(quick, 1.0)
        coming = asyncio.create_task(slow.exchange(torch.ones(4)))
        await asyncio.sleep(1)
        await exchange_all(quick, 1.0)
        await coming
        run.assert_same()
        assert slow.reports[-1].peers == 3


async def test_a_late_joiner_has_the_current_parameters_and_momentum():
    async with TrainingRun() as run:
        first = await run.joined(2)
        for _ in range(7):
            await exchange_all(first, 1.0)
        late = await run.join(torch.full((4,), 9.0))
        assert torch.equal(late.parameters, first[0].parameters)
        run.assert_same()
        await exchange_all(run.trainees, 1.0)
        run.assert_same()
        assert late.reports[-1].peers == 3


async def test_two_that_begin_at_once_end_up_with_one_beginning():
    async with TrainingRun() as run:
        one, other = await run.member(torch.zeros(4)), await run.member(torch.ones(4))
        run.trainees += [one, other]
        await asyncio.gather(one.member.join(), other.member.join())
        await exchange_all(run.trainees, 1.0)
        run.assert_same()
        assert one.reports[-1].included
        assert other.reports[-1].included


async def test_who_leaves_is_not_waited_for():
    async with TrainingRun() as run:
        trainees = await run.joined(3)
        await exchange_all(trainees, 1.0)
        run.trainees.remove(trainees[2])
        leaving = asyncio.create_task(exchange_all(trainees[:2], 1.0))
        await asyncio.sleep(1)
        await trainees[2].member.leave()
        await leaving
        run.assert_same()
        assert all(trainee.reports[-1].seconds < 1.6 for trainee in trainees[:2])


async def test_the_coordinator_may_leave_in_the_middle_of_a_round():
    async with TrainingRun() as run:
        await run.joined(3)
        leaver = run.coordinator(0)
        run.trainees.remove(leaver)
        exchanging = asyncio.create_task(exchange_all(run.trainees, 1.0))
        await asyncio.sleep(1)
        await leaver.member.leave()
        await exchanging
        run.assert_same()
        assert {trainee.reports[-1].peers for trainee in run.trainees} == {2}


async def test_everybody_but_one_may_die():
    async with TrainingRun() as run:
        trainees = await run.joined(3)
        await exchange_all(trainees, 1.0)
        before = trainees[2].parameters
        for trainee in trainees[:2]:
            await run.kill(trainee)
        report = await trainees[2].exchange(torch.ones(4))
        assert (report.round, report.peers) == (2, 1)
        late = await run.join(torch.zeros(4))
        run.assert_same()
        assert not torch.equal(late.parameters, before)


# --- the coordinator dies ---------------------------------------------------------------------------------

MOMENTS = [0.0025 * n for n in range(1, 33)]  # messages are under way for 10 to 16 ms


@pytest.mark.parametrize("moment", MOMENTS)
async def test_the_coordinator_dies_at_any_moment(moment: float):
    async with TrainingRun(outer_lr=1.0, momentum=0.0) as run:
        trainees = await run.joined(4)
        for index, trainee in enumerate(trainees):  # so that no two messages arrive at once
            trainee.transport.faults = Faults(delay=0.01 + 0.002 * index)
        victim = run.coordinator(0)
        deltas = {trainee.peer: row for trainee, row in zip(trainees, torch.eye(4), strict=True)}
        tasks = {t.peer: asyncio.create_task(t.exchange(deltas[t.peer])) for t in trainees}
        await asyncio.sleep(moment)
        tasks.pop(victim.peer).cancel()
        await run.kill(victim)
        await asyncio.gather(*tasks.values())
        run.assert_same()
        assert all(trainee.reports[-1].seconds < 2 * DEADLINE for trainee in run.trainees)
        for trainee in run.trainees:
            # Its delta went in once: with the weight that it had in one round, of 3 or 4 peers or fewer.
            (value,) = trainee.parameters[deltas[trainee.peer] == 1].tolist()
            assert min(abs(value + 1 / peers) for peers in (1, 2, 3, 4)) < 1e-6
        await exchange_all(run.trainees, 1.0)
        run.assert_same()
        assert all(trainee.reports[-1].peers == 3 for trainee in run.trainees)


async def test_a_result_that_one_peer_has_got_counts():
    async with TrainingRun() as run:
        trainees = await run.joined(4)
        victim = run.coordinator(0)
        lucky, *others = [trainee for trainee in trainees if trainee is not victim]
        for other in others:  # the results for them are on their way for a while
            victim.transport.faults_toward[other.peer] = Faults(delay=1.0)
        tasks = [asyncio.create_task(t.exchange(torch.ones(4))) for t in trainees]
        while not lucky.reports:
            await asyncio.sleep(0.01)
        state = lucky.state
        await run.kill(victim)
        await asyncio.gather(*(task for task, t in zip(tasks, trainees, strict=True) if t is not victim))
        assert {trainee.state for trainee in run.trainees} == {state}
        assert all(trainee.reports[-1].peers == 4 for trainee in others)


async def test_a_coordinator_that_hangs_is_passed_over():
    async with TrainingRun() as run:
        await run.joined(3)
        stuck = run.coordinator(0)
        others = [trainee for trainee in run.trainees if trainee is not stuck]
        stuck.transport.partition(*(other.peer for other in others))
        await exchange_all(others, 1.0)
        run.assert_same(others)
        assert {trainee.reports[-1].peers for trainee in others} == {2}
        assert all(trainee.reports[-1].seconds < 6 * DEADLINE for trainee in others)


# --- the network falls apart ------------------------------------------------------------------------------


@pytest.mark.parametrize("seen", [True, False], ids=["seen", "unseen"])
async def test_after_a_partition_the_side_with_more_work_goes_on(seen: bool):
    """The registry may still show those on the other side, or not."""
    async with TrainingRun(outer_lr=1.0, momentum=0.0) as run:
        trainees = await run.joined(5)
        large, small = trainees[:3], trainees[3:]
        for group, others in ((large, small), (small, large)):
            for trainee in group:
                trainee.transport.partition(*(other.peer for other in others))
                if not seen:
                    trainee.registry._directory = MemoryDirectory()
        if not seen:
            for group in (large, small):
                directory = MemoryDirectory()
                for trainee in group:
                    trainee.registry._directory = directory
                for trainee in group:
                    info = run.directory._view.servers[trainee.peer]
                    await trainee.registry.announce(info, 1e6)
        await asyncio.gather(exchange_all(large, 1.0), exchange_all(small, 5.0))
        await asyncio.gather(exchange_all(large, 1.0), exchange_all(small, 5.0))
        run.assert_same(large)
        assert small[0].state != large[0].state
        for trainee in trainees:
            trainee.transport.heal()
            trainee.registry._directory = run.directory
        await exchange_all(trainees, 1.0)
        await exchange_all(trainees, 1.0)
        run.assert_same()
        assert trainees[0].reports[-1].peers == 5
        # A round of deltas of 1 takes 1 off: in none of the rounds that count are deltas of 5.
        assert trainees[0].parameters.tolist() == [-float(trainees[0].reports[-1].round)] * 4


# --- peers that do not mean well, or do not fit -----------------------------------------------------------


async def test_a_peer_that_moves_is_found_where_it_is():
    async with TrainingRun(outer_lr=1.0, momentum=0.0) as run:
        one, other = await run.joined(2)
        one.transport.inner.move("there")
        one.transport.break_connections()
        await asyncio.sleep(0.01)
        assert other.registry.view().servers[one.peer].addresses == (f"memory://there/{one.peer}",)
        await exchange_all([one, other], 1.0)
        run.assert_same()
        assert one.reports[-1].peers == 2
