"""The plain objects of a run: who coordinates, when a round is due, what the mean is, what comes of it."""

from __future__ import annotations

import math

import attrs
import pytest
import torch

from swarmcore.errors import DeltaError, InputError, ProtocolError, StaleRoundError
from swarmcore.training.local_steps import LocalStepsSettings
from swarmcore.training.local_steps.averaging import average
from swarmcore.training.local_steps.lineage import by_rank, is_better
from swarmcore.training.local_steps.pieces import encode
from swarmcore.training.local_steps.replica import KEPT_RESULTS, Replica, Result
from swarmcore.training.local_steps.round import Round
from swarmcore.types import PeerId
from swarmcore.wire.local_steps import Contribution, Lineage, RoundResult, RunTerms

A, B, C = (PeerId(name) for name in "ABC")
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


class TestAverage:
    def test_it_is_weighted_by_samples(self):
        mean, total = average([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])], [1, 3])
        assert mean.tolist() == [0.25, 0.75]
        assert total == 4

    def test_one_that_is_far_off_is_clipped(self):
        honest = [torch.tensor([1.0, 0.1]), torch.tensor([1.0, -0.1])]
        mean, _ = average([*honest, torch.tensor([0.0, -1e30])], [1, 1, 1])
        assert float(mean.norm()) < 2.5
        of_two, _ = average([honest[0], torch.tensor([0.0, -1e30])], [1, 1])
        assert float(of_two.norm()) < 3

    def test_samples_beyond_belief_do_not_outvote_the_others(self):
        mean, total = average([torch.ones(1), torch.ones(1), -torch.ones(1)], [10, 10, 10**9])
        assert total == 60
        assert mean.item() == pytest.approx(-1 / 3)

    def test_peers_that_have_learned_nothing_clip_nobody(self):
        mean, _ = average([torch.zeros(1), torch.zeros(1), torch.ones(1)], [1, 1, 1])
        assert mean.item() == pytest.approx(1 / 3)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_values_that_are_not_finite_are_refused(self, value: float):
        with pytest.raises(DeltaError, match="not finite"):
            average([torch.tensor([1.0]), torch.tensor([value])], [1, 1])


def replica(values: int = 3, momentum: float = 0.9) -> Replica:
    return Replica(RunTerms("run", values, "", 0.7, momentum), torch.zeros(values))


def result(of: Replica, delta: torch.Tensor, *contributions: Contribution) -> Result:
    contributions = contributions or (contribution(A),)
    record = RoundResult(of.lineage, contributions, sum(c.samples for c in contributions))
    return Result(record, tuple(encode(delta, "raw")))


class TestReplica:
    def test_the_outer_step_is_nesterovs(self):
        reference = torch.zeros(3, requires_grad=True)
        optimizer = torch.optim.SGD([reference], lr=0.7, momentum=0.9, nesterov=True)
        ours = replica()
        for seed in range(10):
            delta = torch.randn(3, generator=torch.Generator().manual_seed(seed))
            reference.grad = delta
            optimizer.step()
            ours.apply(result(ours, delta))
        torch.testing.assert_close(ours.parameters, reference.detach())

    def test_other_bytes_give_another_state(self):
        one, other = replica(), replica()
        assert one.lineage == other.lineage
        one.apply(result(one, torch.ones(3)))
        other.apply(result(other, torch.full((3,), 1.0000001)))
        assert one.lineage.round == other.lineage.round == 1
        assert one.lineage.state != other.lineage.state
        with pytest.raises(StaleRoundError, match="other parameters"):
            one.apply(result(other, torch.ones(3)))

    def test_a_result_that_is_not_finite_changes_nothing(self):
        ours = replica()
        before = ours.lineage
        with pytest.raises(DeltaError):
            ours.apply(result(ours, torch.tensor([1.0, math.nan, 0.0])))
        assert ours.lineage == before
        assert ours.parameters.tolist() == [0, 0, 0]

    @pytest.mark.parametrize("work", [0, 2])
    def test_a_result_cannot_claim_more_work_than_its_peers(self, work: int):
        ours = replica()
        claimed = result(ours, torch.ones(3))
        with pytest.raises(ProtocolError, match="samples"):
            ours.apply(attrs.evolve(claimed, record=attrs.evolve(claimed.record, work=work)))

    def test_the_last_results_lead_from_older_states(self):
        ours = replica()
        states = [ours.lineage.state]
        for _ in range(KEPT_RESULTS + 1):
            ours.apply(result(ours, torch.ones(3)))
            states.append(ours.lineage.state)
        assert ours.since(states[0]) is None
        assert len(ours.since(states[1]) or ()) == KEPT_RESULTS
        assert ours.since(states[-1]) == []
        assert ours.since("") is None

    def test_it_knows_whose_delta_is_included(self):
        ours = replica()
        ours.apply(result(ours, torch.ones(3), contribution(A, 7), contribution(B, 8)))
        ours.apply(result(ours, torch.ones(3), contribution(A, 9)))
        assert ours.included == {A: contribution(A, 9), B: contribution(B, 8)}

    def test_a_state_of_absurd_numbers_is_not_adopted(self):
        ours = replica()
        with pytest.raises(ProtocolError):
            ours.adopt(Lineage(1, "ff", 2**70), torch.ones(3), torch.ones(3), ())
        with pytest.raises(DeltaError):
            ours.adopt(Lineage(1, "ff", 1), torch.full((3,), math.inf), torch.ones(3), ())
        assert ours.parameters.tolist() == [0, 0, 0]


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
