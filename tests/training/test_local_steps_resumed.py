"""What was stopped half-way: exchanges that were cancelled, and peers that come back from a saved state."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Sequence
from functools import partial
from typing import Any

import attrs
import pytest
import torch
from training_run import MemoryPlaces

from swarmcore.errors import CheckpointError, DeltaError, InputError, RunMismatchError
from swarmcore.identity import Identity
from swarmcore.training import LocalSteps, RoundReport
from swarmcore.training.local_steps.replica import by_rank

pytestmark = pytest.mark.virtual_time

VALUES = 300


@attrs.define
class Peer:
    """A vector that is trained, with the optimiser that trains it."""

    parameter: torch.nn.Parameter
    optimizer: torch.optim.AdamW
    chance: torch.Generator
    steps: LocalSteps

    async def train(self, count: int) -> RoundReport | None:
        report = None
        for _ in range(count):
            target = torch.randn(VALUES, generator=self.chance)
            loss = (self.parameter.float() - target).square().mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            report = await self.steps.step(samples=4)
        return report


def peer(places: MemoryPlaces, seed: int, dtype: torch.dtype = torch.float32, **settings: Any) -> Peer:
    parameter = torch.nn.Parameter(torch.zeros(VALUES, dtype=dtype))
    settings = {"run": "r", "every": 4, "network": partial(places.open, seed), **settings}
    return Peer(
        parameter,
        torch.optim.AdamW([parameter], lr=0.05),
        torch.Generator().manual_seed(seed),
        LocalSteps([parameter], **settings),
    )


def on_disk(state: dict[str, Any]) -> dict[str, Any]:
    """There and back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


async def both(one: Peer, other: Peer, count: int) -> None:
    await asyncio.gather(one.train(count), other.train(count))


@pytest.mark.parametrize("codec", ["raw", "int8", "topk0.1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
async def test_a_peer_goes_on_with_the_same_bits(codec: str, dtype: torch.dtype) -> None:
    async def run(*, stops: bool) -> Sequence[torch.Tensor]:
        places = MemoryPlaces()
        mine, theirs = (peer(places, seed, dtype, codec=codec) for seed in (1, 2))
        async with theirs.steps:
            async with mine.steps:
                await both(mine, theirs, 10)  # two rounds, and two steps of the next
                saved = on_disk({"steps": mine.steps.state_dict(), "optimizer": mine.optimizer.state_dict()})
                if not stops:
                    await both(mine, theirs, 10)
                    return mine.parameter.detach(), theirs.parameter.detach()
            again = peer(places, 1, dtype, codec=codec)
            again.chance.set_state(mine.chance.get_state())
            again.steps.load_state_dict(saved["steps"])
            async with again.steps:
                again.optimizer.load_state_dict(saved["optimizer"])
                assert repr(again.steps) == "<LocalSteps 'r' round 2 step 2/4 2 peers>"
                await both(again, theirs, 10)
                return again.parameter.detach(), theirs.parameter.detach()

    through, stopped = await run(stops=False), await run(stops=True)
    assert torch.equal(through[0], stopped[0])
    assert torch.equal(through[1], stopped[1])


async def test_a_run_goes_on_after_all_have_been_stopped() -> None:
    places = MemoryPlaces()
    mine, theirs = peer(places, 1), peer(places, 2)
    async with mine.steps, theirs.steps:
        await both(mine, theirs, 8)
        older = on_disk(theirs.steps.state_dict())
        await both(mine, theirs, 4)
        saved = on_disk(mine.steps.state_dict())
    mine, theirs = peer(places, 1), peer(places, 2)
    mine.steps.load_state_dict(saved)
    theirs.steps.load_state_dict(older)
    async with theirs.steps, mine.steps:  # the one with less work is there first
        assert (theirs.steps.round, mine.steps.round) == (2, 3)
        await both(mine, theirs, 8)
        assert theirs.steps.round == mine.steps.round == 5
        assert torch.equal(mine.parameter, theirs.parameter)


async def test_who_comes_back_late_keeps_what_it_had_not_exchanged() -> None:
    places = MemoryPlaces()
    mine, theirs = peer(places, 1), peer(places, 2)
    async with theirs.steps:
        async with mine.steps:
            await both(mine, theirs, 4)
            await mine.train(2)
            saved = on_disk(mine.steps.state_dict())
            learned = saved["own"] - saved["base"]
        await theirs.train(4 * 6)
        mine = peer(places, 1)
        mine.steps.load_state_dict(saved)
        async with mine.steps:
            assert mine.steps.round == theirs.steps.round == 7
            assert learned.any()
            torch.testing.assert_close(mine.parameter.detach() - learned, theirs.parameter.detach())
            assert repr(mine.steps) == "<LocalSteps 'r' round 7 step 2/4 2 peers>"


async def test_what_was_exchanged_after_saving_is_not_brought_again() -> None:
    places = MemoryPlaces()
    mine, theirs = peer(places, 1), peer(places, 2)
    async with theirs.steps:
        async with mine.steps:
            await both(mine, theirs, 6)
            saved = on_disk(mine.steps.state_dict())
            assert not torch.equal(saved["own"], saved["base"])
            await both(mine, theirs, 2)
        mine = peer(places, 1)
        mine.steps.load_state_dict(saved)
        async with mine.steps:
            assert repr(mine.steps) == "<LocalSteps 'r' round 2 step 0/4 2 peers>"
            assert torch.equal(mine.parameter, theirs.parameter)


async def test_what_is_not_of_this_run_is_not_loaded() -> None:
    places = MemoryPlaces()
    mine = peer(places, 1)
    with pytest.raises(InputError, match="enter"):
        mine.steps.state_dict()
    async with mine.steps:
        saved = mine.steps.state_dict()
        with pytest.raises(InputError, match="before you enter"):
            mine.steps.load_state_dict(saved)
    with pytest.raises(RunMismatchError, match="in the run 's', not in 'r'"):
        peer(places, 1, run="s").steps.load_state_dict(saved)
    with pytest.raises(RunMismatchError, match=r"momentum=0\.5"):
        peer(places, 1, momentum=0.5).steps.load_state_dict(saved)
    with pytest.raises(DeltaError, match=f"trains 7 values .* not {VALUES}"):
        LocalSteps([torch.nn.Parameter(torch.zeros(7))], run="r").load_state_dict(saved)
    for wrong, match in (
        ({"format": 2}, "format 2"),
        ({"velocity": torch.zeros(3)}, "velocity"),
        ({"lineage": {}}, "state_dict"),
    ):
        with pytest.raises(CheckpointError, match=match):
            peer(places, 1).steps.load_state_dict({**saved, **wrong})
    with pytest.raises(CheckpointError, match="state_dict"):
        peer(places, 1).steps.load_state_dict({})


# --- an exchange that is cancelled ------------------------------------------------------------------------


class Axes:
    """Three peers, each of which learns 1 in a place of its own; messages take 10 ms and more."""

    def __init__(self) -> None:
        places = MemoryPlaces()
        self.parameters = [torch.nn.Parameter(torch.zeros(4)) for _ in range(3)]
        self.seeds = (1, 2, 3)
        self.networks = [partial(places.open, seed, 0.008 + 0.002 * seed) for seed in self.seeds]
        self.steps = [self.local_steps(index) for index in range(3)]

    def local_steps(self, index: int) -> LocalSteps:
        return LocalSteps(
            [self.parameters[index]],
            run="r",
            every=1,
            outer_lr=1.0,
            momentum=0.0,
            deadline=5.0,
            network=self.networks[index],
        )

    async def learn(self, index: int, place: int | None = None) -> RoundReport | None:
        if place is not None:
            with torch.no_grad():
                self.parameters[index][place] -= 1
        return await self.steps[index].step()

    async def all_learn_nothing(self) -> None:
        await asyncio.gather(*(self.learn(index) for index in range(3)))

    def assert_once(self, *places: int) -> None:
        """What was learned there is in, with the weight that it had in one round."""
        assert all(torch.equal(self.parameters[0], other) for other in self.parameters[1:])
        for place in places:
            value = float(self.parameters[0][place].detach())
            assert min(abs(value + part) for part in (1, 1 / 2, 1 / 3)) < 1e-6, f"{value} at {place}"


@pytest.mark.parametrize("index", range(3))  # one of them coordinates
@pytest.mark.parametrize("moment", [0.004 * n for n in range(1, 21)])
async def test_what_a_cancelled_exchange_brought_is_counted_once(index: int, moment: float) -> None:
    axes = Axes()
    async with axes.steps[0], axes.steps[1], axes.steps[2]:
        tasks = [asyncio.create_task(axes.learn(one, one)) for one in range(3)]
        await asyncio.sleep(moment)
        tasks[index].cancel()
        await asyncio.sleep(0)
        others = [one for one in range(3) if one != index]
        await asyncio.gather(axes.learn(index, 3), *tasks, return_exceptions=True)
        late = asyncio.gather(*(axes.learn(one) for one in others))
        await asyncio.gather(late, axes.learn(index))
        await axes.all_learn_nothing()
        axes.assert_once(0, 1, 2, 3)


async def test_what_arrived_after_all_does_not_take_the_next_deltas_place() -> None:
    axes = Axes()
    async with axes.steps[0], axes.steps[1], axes.steps[2]:
        first = by_rank("r", 0, axes.steps[0].peers)[0]
        index = next(
            i for i, seed in enumerate(axes.seeds) if Identity.from_seed(bytes([seed]) * 32).peer == first
        )
        others = [one for one in range(3) if one != index]
        coordinating = asyncio.create_task(axes.learn(index, index))
        await asyncio.sleep(0.1)
        coordinating.cancel()
        await asyncio.gather(*(axes.learn(one, one) for one in others))
        reports = await asyncio.gather(axes.learn(index, 3), *(axes.learn(one) for one in others))
        assert [(r.round, r.peers, r.included) for r in reports if r] == [(2, 3, True)] * 3
        axes.assert_once(0, 1, 2, 3)


async def test_a_delta_that_was_under_way_is_saved() -> None:
    axes = Axes()
    async with axes.steps[1], axes.steps[2]:
        async with axes.steps[0]:
            begun = asyncio.create_task(axes.learn(0, 0))
            await asyncio.sleep(0.2)  # delivered, and the others are not there yet
            with pytest.raises(InputError, match="under way"):
                axes.steps[0].state_dict()
            begun.cancel()
            await asyncio.wait([begun])
            saved = on_disk(axes.steps[0].state_dict())
            await asyncio.gather(axes.learn(1, 1), axes.learn(2, 2))
        stranger = LocalSteps(
            [axes.parameters[0]], run="r", outer_lr=1.0, momentum=0.0, network=axes.networks[1]
        )
        stranger.load_state_dict(saved)
        with pytest.raises(InputError, match="use that identity"):
            async with stranger:
                pass
        axes.steps[0] = axes.local_steps(0)
        axes.steps[0].load_state_dict(saved)
        async with axes.steps[0]:
            await axes.all_learn_nothing()
            await axes.all_learn_nothing()
            axes.assert_once(0, 1, 2)
