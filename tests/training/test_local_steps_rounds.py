"""The plain objects of a run: who coordinates, when a round is due, what the mean is, what comes of it."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import attrs
import pytest
import torch

from swarmcore.errors import DeltaError, InputError, ProtocolError, StaleRoundError
from swarmcore.identity import Identity
from swarmcore.training.local_steps import LocalStepsSettings
from swarmcore.training.local_steps.contributions import average, contribute, norm, shares
from swarmcore.training.local_steps.coordinator import Round
from swarmcore.training.local_steps.replica import KEPT_RESULTS, Replica, Result, State, by_rank, is_better
from swarmcore.training.local_steps.vectors import encode
from swarmcore.types import PeerId
from swarmcore.wire.local_steps import Contribution, Lineage, RoundResult, RunTerms

IDENTITIES = [Identity.from_seed(bytes([seed]) * 32) for seed in range(3)]
A, B, C = (identity.peer for identity in IDENTITIES)
START = Lineage(0, "00", 0)


def contribution(peer: PeerId, delivery: int = 1, samples: int = 1) -> Contribution:
    return Contribution(peer, delivery, samples)


class TestRound:
    def test_it_is_due_when_all_have_delivered(self):
        round = Round[str](START, {A, B})
        assert not round.is_due(1e9)
        round.deliver(contribution(A), "a", now=0, patience=5)
        assert not round.is_due(4.9)
        round.deliver(contribution(B), "b", now=3, patience=5)
        assert round.is_due(3)
        assert [delivery.values for delivery in round.deliveries] == ["a", "b"]

    def test_it_is_due_when_the_first_has_waited_long_enough(self):
        round = Round[str](START, {A, B, C})
        round.deliver(contribution(B), "b", now=1, patience=50)
        round.deliver(contribution(A), "a", now=2, patience=5)
        assert round.ends == 7
        assert round.is_due(7)
        assert round.missing == {C}

    def test_who_delivers_again_replaces_its_delta_and_waits_no_longer(self):
        round = Round[str](START, {A, B})
        round.deliver(contribution(A, 1), "old", now=0, patience=5)
        round.deliver(contribution(A, 2), "new", now=4, patience=5)
        assert [delivery.values for delivery in round.deliveries] == ["new"]
        assert round.ends == 5

    def test_it_does_not_wait_for_those_who_have_gone(self):
        round = Round[str](START, {A, B})
        round.deliver(contribution(A), "a", now=0, patience=5)
        round.see({A})
        assert round.is_due(1)


class TestRank:
    def test_every_round_has_another_order_and_all_take_their_turn(self):
        peers = [PeerId(f"peer {n}") for n in range(4)]
        firsts = [by_rank("run", number, peers)[0] for number in range(200)]
        assert all(25 < firsts.count(peer) < 80 for peer in peers)

    def test_a_newcomer_changes_nothing_among_the_others(self):
        peers = [PeerId(f"peer {n}") for n in range(5)]
        for number in range(20):
            before = by_rank("run", number, peers[:4])
            assert [peer for peer in by_rank("run", number, peers) if peer != peers[4]] == before

    def test_of_two_lineages_the_one_with_more_work_goes_on(self):
        assert is_better(Lineage(1, "00", 10), Lineage(9, "ff", 9))
        assert is_better(Lineage(1, "01", 10), Lineage(1, "00", 10))
        assert not is_better(START, START)


def mean_of(deltas: list[torch.Tensor], samples: list[int]) -> tuple[torch.Tensor, int]:
    factors, total = shares([norm(delta, "it") for delta in deltas], samples)
    return average(deltas, factors), total


class TestAverage:
    def test_it_is_weighted_by_samples(self):
        mean, total = mean_of([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])], [1, 3])
        assert mean.tolist() == [0.25, 0.75]
        assert total == 4

    def test_one_that_is_far_off_is_clipped(self):
        honest = [torch.tensor([1.0, 0.1]), torch.tensor([1.0, -0.1])]
        mean, _ = mean_of([*honest, torch.tensor([0.0, -1e30])], [1, 1, 1])
        assert float(mean.norm()) < 2.5
        of_two, _ = mean_of([honest[0], torch.tensor([0.0, -1e30])], [1, 1])
        assert float(of_two.norm()) < 3

    def test_samples_beyond_belief_do_not_outvote_the_others(self):
        mean, total = mean_of([torch.ones(1), torch.ones(1), -torch.ones(1)], [10, 10, 10**9])
        assert total == 60
        assert mean.item() == pytest.approx(-1 / 3)

    def test_peers_that_have_learned_nothing_clip_nobody(self):
        mean, _ = mean_of([torch.zeros(1), torch.zeros(1), torch.ones(1)], [1, 1, 1])
        assert mean.item() == pytest.approx(1 / 3)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_values_that_are_not_finite_are_refused(self, value: float):
        with pytest.raises(DeltaError, match="the delta has values that are not finite"):
            norm(torch.tensor([1.0, value]), "the delta")


TERMS = RunTerms("run", 3, "layout", 0.7, 0.9)


def beginning() -> State:
    return State.first(TERMS, torch.zeros(3))


def contributed(before: Lineage, who: int, delta: torch.Tensor, **claimed: Any) -> Contribution:
    """What that peer would sign of its delta, or claims instead."""
    claim = {"delivery": 1, "samples": 1, "length": float(delta.norm())}
    return contribute(IDENTITIES[who], TERMS, before, **{**claim, **claimed})


def result(before: State, delta: torch.Tensor, *contributions: Contribution, work: int = 0) -> Result:
    """``delta`` as the mean of a round."""
    contributions = contributions or (contributed(before.lineage, 0, delta),)
    work = work or sum(c.samples for c in contributions)
    return Result(RoundResult(before.lineage, contributions, work), tuple(encode(delta, "raw")))


class TestState:
    def test_the_outer_step_is_nesterovs(self):
        reference = torch.zeros(3, requires_grad=True)
        optimizer = torch.optim.SGD([reference], lr=0.7, momentum=0.9, nesterov=True)
        ours = beginning()
        for seed in range(10):
            delta = torch.randn(3, generator=torch.Generator().manual_seed(seed))
            reference.grad = delta
            optimizer.step()
            ours = ours.after(result(ours, delta), TERMS)
        torch.testing.assert_close(ours.parameters, reference.detach())

    def test_other_bytes_give_another_state(self):
        begun = beginning()
        assert begun.lineage == beginning().lineage
        one = begun.after(result(begun, torch.ones(3)), TERMS)
        other = begun.after(result(begun, torch.full((3,), 1.0000001)), TERMS)
        assert one.lineage.round == other.lineage.round == 1
        assert one.lineage.state != other.lineage.state
        with pytest.raises(StaleRoundError, match="other parameters"):
            one.after(result(other, torch.ones(3)), TERMS)

    def test_it_knows_whose_delta_is_included(self):
        ours, ones = beginning(), torch.ones(3)
        both = [contributed(ours.lineage, who, ones, delivery=7 + who) for who in (0, 1)]
        ours = ours.after(result(ours, ones, *both), TERMS)
        ours = ours.after(result(ours, ones, contributed(ours.lineage, 0, ones, delivery=9)), TERMS)
        assert ours.has(A, 9)
        assert ours.has(B, 8)
        assert not ours.has(A, 7)
        assert not ours.has(C, 9)

    def test_a_state_of_absurd_numbers_is_none(self):
        with pytest.raises(ProtocolError):
            State.of(Lineage(1, "ff", 2**70), torch.ones(3), torch.ones(3), ())
        with pytest.raises(DeltaError):
            State.of(Lineage(1, "ff", 1), torch.full((3,), math.inf), torch.ones(3), ())


class TestWhatACoordinatorCannotClaim:
    """Of two peers with deltas as long as 1, so that their mean is no longer."""

    def refused(self, match: str, *claims: Contribution, delta: float = 0.5, work: int = 0) -> None:
        ours = beginning()
        with pytest.raises((ProtocolError, DeltaError), match=match):
            ours.after(result(ours, torch.tensor([delta, 0, 0]), *claims, work=work), TERMS)

    def claim(self, who: int, **claimed: Any) -> Contribution:
        return contributed(beginning().lineage, who, torch.tensor([1.0, 0, 0]), **claimed)

    def test_what_its_members_did_deliver_is_taken(self):
        ours = beginning()
        for length in (0.0, 1.0, 1.05):  # a codec may have made it a little longer
            mean = torch.tensor([length, 0, 0])
            assert ours.after(result(ours, mean, self.claim(0), self.claim(1)), TERMS).lineage.work == 2

    @pytest.mark.parametrize("delta", [1.2, -1.2, 1e30])
    def test_a_mean_that_is_longer_than_its_deltas(self, delta: float):
        self.refused("1 at most", self.claim(0), self.claim(1), delta=delta)

    def test_a_delta_of_its_own_that_is_longer_than_the_others_is_clipped(self):
        claims = (self.claim(0), self.claim(1), self.claim(2, length=1e9))
        self.refused("2.33333 at most", *claims, delta=3.0)

    @pytest.mark.parametrize("delta", [math.nan, math.inf])
    def test_values_that_are_not_finite(self, delta: float):
        self.refused("not finite", self.claim(0), delta=delta)

    @pytest.mark.parametrize(
        "forged", [{"length": 1e9}, {"samples": 4}, {"delivery": 2}, {"peer": C}], ids=str
    )
    def test_what_another_has_not_signed(self, forged: dict[str, Any]):
        self.refused("did not sign", self.claim(0), attrs.evolve(self.claim(1), **forged))

    def test_what_was_signed_for_another_round(self):
        later = beginning()
        later = later.after(result(later, torch.ones(3)), TERMS)
        self.refused("did not sign", contributed(later.lineage, 1, torch.ones(3)))

    def test_one_delta_twice(self):
        self.refused("several of one peer", self.claim(0), self.claim(0))

    @pytest.mark.parametrize("work", [1, 3, 2**60])
    def test_other_samples_than_its_members_have(self, work: int):
        self.refused("of its contributions 2 count", self.claim(0), self.claim(1), work=work)

    @pytest.mark.parametrize("claimed", [{"samples": 2**41}, {"samples": 0}, {"length": math.inf}], ids=str)
    def test_numbers_out_of_range(self, claimed: dict[str, Any]):
        self.refused("did not sign", self.claim(0, **claimed), work=1)


class TestReplica:
    async def test_a_result_that_is_refused_changes_nothing(self):
        ours = Replica(TERMS, beginning())
        before = ours.state
        with pytest.raises(DeltaError):
            poisoned = torch.tensor([1.0, math.nan, 0.0])
            await ours.apply(result(before, poisoned, contributed(before.lineage, 0, torch.ones(3))))
        assert ours.state is before
        assert ours.last is None

    async def test_a_result_may_come_twice(self):
        ours = Replica(TERMS, beginning())
        once = result(ours.state, torch.ones(3))
        await asyncio.gather(ours.apply(once), ours.apply(once))
        assert ours.lineage == once.lineage
        assert ours.lineage.round == 1

    async def test_the_last_results_lead_from_older_states(self):
        ours = Replica(TERMS, beginning())
        states = [ours.lineage.state]
        for _ in range(KEPT_RESULTS + 1):
            await ours.apply(result(ours.state, torch.ones(3)))
            states.append(ours.lineage.state)
        assert ours.since(states[0]) is None
        assert len(ours.since(states[1]) or ()) == KEPT_RESULTS
        assert ours.since(states[-1]) == []
        assert ours.since("") is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"run": ""},
        {"run": "a\nb"},
        {"run": "x" * 101},
        {"every": 0},
        {"outer_lr": 0.0},
        {"momentum": 1.0},
        {"deadline": math.nan},
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(wrong: dict[str, object]):
    with pytest.raises(InputError):
        LocalStepsSettings(**{"run": "run", **wrong})  # type: ignore[arg-type]
