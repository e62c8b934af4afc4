"""Who does not belong to a run, and what does not belong into it."""

from __future__ import annotations

import asyncio
import math

import attrs
import pytest
import torch
from training_run import Trainee, TrainingRun, exchange_all

from swarmcore.errors import (
    DeltaError,
    InputError,
    PeerNotAllowedError,
    RunMismatchError,
    StaleRoundError,
    SwarmError,
    TooManyCallsError,
)
from swarmcore.executor.torch.wire_tensors import to_wire
from swarmcore.registry.memory import MemoryRegistry
from swarmcore.training.local_steps import serving
from swarmcore.training.local_steps.contributions import contribute
from swarmcore.training.local_steps.coordinator import Round
from swarmcore.training.local_steps.member import RunMember
from swarmcore.training.local_steps.replica import Replica, Result, State
from swarmcore.training.local_steps.run_peers import RunPeers
from swarmcore.training.local_steps.vectors import Traffic, decode, encode, next_message
from swarmcore.types import Address, ServerInfo
from swarmcore.wire.local_steps import (
    LOCAL_STEPS_PROTOCOL,
    DeliverDelta,
    FetchState,
    GoTo,
    Lineage,
    Piece,
    RunTerms,
    StateFollows,
)

pytestmark = pytest.mark.virtual_time


async def test_a_liar_with_a_huge_delta_does_little_harm():
    async with TrainingRun(outer_lr=1.0, momentum=0.0) as run:
        *honest, liar = await run.joined(4)
        lying = asyncio.create_task(liar.exchange(torch.full((4,), -1e18), samples=10**9))
        await exchange_all(honest, 1.0)
        await lying
        run.assert_same()
        # Of weight 4 among three of 1, and 5 times as long.
        torch.testing.assert_close(honest[0].parameters, torch.full((4,), -(3 - 4 * 5) / 7))


async def test_a_delta_that_is_not_finite_is_refused():
    async with TrainingRun() as run:
        await run.joined(2)
        target = run.coordinator(0)
        liar = next(trainee for trainee in run.trainees if trainee is not target)
        poisoned = torch.tensor([1.0, math.nan, 0.0, 0.0])
        with pytest.raises(DeltaError, match="not finite"):
            await liar.exchange(poisoned)
        replica = liar.member.replica
        opening = DeliverDelta(replica.terms, replica.lineage, 1, 1, 5.0)
        with pytest.raises(DeltaError, match="not finite"):
            await liar.member._peers.deliver(target.peer, opening, encode(poisoned, "raw"))
        await exchange_all(run.trainees, 1.0)
        run.assert_same()
        assert {trainee.reports[-1].peers for trainee in run.trainees} == {2}


@pytest.mark.parametrize(
    ("claimed", "said"),
    [({"length": 1.0}, "has the norm 2, and not 1"), ({"samples": 2}, "signature is not its sender's")],
    ids=["length", "samples"],
)
async def test_a_delta_that_is_not_what_was_signed_is_refused(claimed: dict[str, float], said: str):
    async with TrainingRun() as run:
        one, other = await run.joined(2)
        replica, node = one.member.replica, one.member.node
        own = contribute(node.identity, replica.terms, replica.lineage, delivery=1, samples=1, length=2.0)
        opening = DeliverDelta(replica.terms, replica.lineage, 1, 1, 5.0, own.length, own.signature)
        with pytest.raises(DeltaError, match=said):
            await one.member._peers.deliver(
                other.peer, attrs.evolve(opening, **claimed), encode(torch.ones(4), "raw")
            )


async def test_one_delta_at_a_time():
    async with TrainingRun() as run:
        one, other = await run.joined(2)
        replica = one.member.replica
        opening = DeliverDelta(replica.terms, replica.lineage, 1, 1, 5.0)
        addresses = [Address.parse(str(address)) for address in other.member.node.addresses]
        async with await one.member.node.open(addresses, LOCAL_STEPS_PROTOCOL, opening):
            await asyncio.sleep(1)
            with pytest.raises(TooManyCallsError, match="another delta of yours"):
                await one.member._peers.deliver(other.peer, opening, encode(torch.ones(4), "raw"))
        await exchange_all(run.trainees, 1.0)
        assert one.reports[-1].peers == 2


async def test_who_does_not_read_what_it_fetches_gets_no_more_of_it(monkeypatch: pytest.MonkeyPatch):
    async def never_read(*_arguments: object) -> None:
        await asyncio.Future()

    async with TrainingRun() as run:
        one, other = await run.joined(2)
        monkeypatch.setattr(serving, "send", never_read)
        node, addresses = one.member.node, other.member.node.addresses
        opening = FetchState(one.member.replica.terms)
        channels = [
            await node.open(addresses, LOCAL_STEPS_PROTOCOL, opening) for _ in range(serving.MOST_FETCHES + 1)
        ]
        for channel in channels[:-1]:
            assert isinstance((await channel.receive()).record, StateFollows)
        with pytest.raises(TooManyCallsError, match="fetch parameters here already"):
            await channels[-1].receive()
        for channel in channels:
            channel.abort("the test is over")
        monkeypatch.undo()
        await asyncio.sleep(1)
        async with await node.open(addresses, LOCAL_STEPS_PROTOCOL, opening) as channel:
            assert isinstance((await channel.receive()).record, StateFollows)


def lie(liar: Trainee, factor: float, **claimed: object) -> None:
    """Have a peer that coordinates a round give another mean than that of the deltas, and other claims."""
    coordinator = liar.member._coordinator
    honest = coordinator._conclude

    async def conclude(round: Round[torch.Tensor]) -> Result | GoTo:
        state = liar.member.replica.state
        ended = await honest(round)
        if isinstance(ended, GoTo):
            return ended
        liar.member.replica.state = state
        mean = decode(ended.pieces) * factor
        return Result(attrs.evolve(ended.record, **claimed), tuple(encode(mean, "raw")))

    coordinator._conclude = conclude  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("factor", "claimed"),
    [(1e6, {}), (math.nan, {}), (1.0, {"work": 10**9}), (1.0, {"contributions": ()})],
    ids=["long", "nan", "work", "empty"],
)
async def test_a_coordinator_that_lies_is_left_out(
    factor: float, claimed: dict[str, object], caplog: pytest.LogCaptureFixture
):
    async with TrainingRun(outer_lr=1.0, momentum=0.0) as run:
        await run.joined(4)
        liar = run.coordinator(0)
        honest = [trainee for trainee in run.trainees if trainee is not liar]
        lie(liar, factor, **claimed)
        lying = asyncio.create_task(liar.exchange(torch.ones(4)))
        await exchange_all(honest, 1.0)
        lying.cancel()
        run.assert_same(honest)
        assert {(t.reports[-1].round, t.reports[-1].peers) for t in honest} == {(1, 3)}
        assert honest[0].parameters.tolist() == [-1] * 4
        assert all(trainee.member.alive == {t.peer for t in honest} for trainee in honest)
        assert f"{liar.peer} is left out from now on" in caplog.text
        with pytest.raises(PeerNotAllowedError, match="listened to no more"):
            await liar.member._peers.catch_up(honest[0].peer)


async def outsider(run: TrainingRun, target: Trainee, runs: tuple[str, ...], terms: RunTerms) -> RunPeers:
    """A peer that announces ``runs``, and speaks to ``target`` as if it were of the run."""
    node, _ = run.node()
    await node.start()
    registry = MemoryRegistry(node.peer, run.directory)
    await registry.announce(ServerInfo(node.peer, tuple(map(str, node.addresses)), runs=runs), 1e6)
    return RunPeers(node, registry, Replica(terms, State.first(terms, torch.zeros(terms.values))), Traffic())


RIGHT = RunTerms("test", 4, "", 0.7, 0.9)


@pytest.mark.parametrize(
    ("runs", "terms", "error", "said"),
    [
        ((), RIGHT, PeerNotAllowedError, "only peers that announce the run 'test'"),
        (("other",), RIGHT, PeerNotAllowedError, "only peers that announce the run 'test'"),
        (
            ("other",),
            RunTerms("other", 4, "", 0.7, 0.9),
            RunMismatchError,
            "in the run 'test', not in 'other'",
        ),
        (("test",), RunTerms("test", 5, "", 0.7, 0.9), DeltaError, "trains 4 values"),
        (("test",), RunTerms("test", 4, "ff", 0.7, 0.9), DeltaError, "same names, shapes and order"),
        (("test",), RunTerms("test", 4, "", 0.1, 0.9), RunMismatchError, "outer_lr=0.7"),
    ],
    ids=["stranger", "of-another-run", "another-runs-delta", "size", "layout", "outer-lr"],
)
async def test_who_does_not_belong_is_told_why(
    runs: tuple[str, ...], terms: RunTerms, error: type[SwarmError], said: str
):
    async with TrainingRun() as run:
        (target,) = await run.joined(1)
        peers = await outsider(run, target, runs, terms)
        opening = DeliverDelta(terms, target.member.replica.lineage, 1, 1, 5.0)
        with pytest.raises(error, match=said) as refused:
            await peers.deliver(target.peer, opening, encode(torch.zeros(terms.values), "raw"))
        assert refused.value.origin == target.peer
        with pytest.raises(error, match=said):
            await peers.catch_up(target.peer)
        (answer,) = (await peers.ask([target.peer])).values()
        assert isinstance(answer, error)
        assert target.member.replica.lineage.round == 0


async def test_a_delta_of_an_older_round_is_refused():
    async with TrainingRun() as run:
        await run.joined(2)
        one, other = run.trainees
        opening = DeliverDelta(one.member.replica.terms, one.member.replica.lineage, 1, 1, 5.0)
        await exchange_all(run.trainees, 1.0)
        with pytest.raises(StaleRoundError, match=r"a delta of round 0 .* at round 1"):
            await one.member._peers.deliver(other.peer, opening, encode(torch.ones(4), "raw"))


async def test_a_state_that_is_claimed_and_not_there_is_refused():
    async with TrainingRun() as run:
        one, other = await run.joined(2)
        claimed = Lineage(9, "ff" * 32, 10**6)
        opening = DeliverDelta(one.member.replica.terms, claimed, 1, 1, 5.0)
        with pytest.raises(StaleRoundError):
            await one.member._peers.deliver(other.peer, opening, encode(torch.ones(4), "raw"))
        assert other.member.replica.lineage.round == 0


@pytest.mark.parametrize(
    ("record", "values"),
    [
        (Piece(1), torch.zeros(4)),
        (Piece(0), torch.zeros(5)),
        (Piece(0), torch.zeros(2, 2)),
        (Piece(0), torch.zeros(4, dtype=torch.bfloat16)),
    ],
    ids=["place", "size", "shape", "dtype"],
)
async def test_a_piece_without_a_place_is_refused(record: Piece, values: torch.Tensor):
    async with TrainingRun() as run:
        one, other = await run.joined(2)
        replica = one.member.replica
        addresses = [Address.parse(str(address)) for address in other.member.node.addresses]
        opening = DeliverDelta(replica.terms, replica.lineage, 1, 1, 5.0)
        channel = await one.member.node.open(addresses, LOCAL_STEPS_PROTOCOL, opening)
        async with channel:
            await channel.send(record, to_wire("values", values))
            with pytest.raises(DeltaError, match="a piece at"):
                await next_message(channel)


async def test_a_peer_that_fits_with_nobody_is_told_when_it_joins():
    async with TrainingRun() as run:
        await run.joined(2)
        with pytest.raises(DeltaError, match="trains 4 values"):
            await run.join(torch.zeros(7))
        with pytest.raises(RunMismatchError, match=r"momentum=0\.9"):
            await run.join(torch.zeros(4), momentum=0.5)
        assert len(run.trainees[0].member.alive) == 2


async def test_a_peer_that_cannot_be_reached_may_not_take_part():
    async with TrainingRun() as run:
        (first,) = await run.joined(1)
        node, _ = run.node(listen=False)
        await node.start()
        with pytest.raises(InputError, match="reachable"):
            registry = MemoryRegistry(node.peer, run.directory)
            RunMember(node, registry, run.settings, first.member.replica)


async def test_it_says_how_it_is(caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", logger="swarmcore.training")
    async with TrainingRun() as run:
        trainees = await run.joined(2)
        await exchange_all(trainees, 1.0)
        assert "'test' round 1" in repr(trainees[0].member)
        assert "2 peers>" in repr(trainees[0].member)
        said = [r.getMessage() for r in caplog.records if "round 1: 2 peers, 2 samples" in r.getMessage()]
        assert len(said) == 2  # one from each
