import attrs
import pytest

from swarmcore.errors import InvalidStepError, SessionLostError
from swarmcore.server.output_cache import RECALLS_REMEMBERED, DedupCache, RecalledSteps
from swarmcore.wire.messages import Recall, Step


def step(number: int, start: int = 0) -> Step:
    return Step(number, (start,), (1,))


def test_a_repeated_step_finds_its_answer():
    ledger: DedupCache[str] = DedupCache(depth=2)
    assert ledger.repeated(step(0)) is None
    ledger.remember(step(0), "zero")
    assert ledger.repeated(step(0)) == "zero"
    assert ledger.repeated(step(1)) is None


def test_only_the_latest_steps_are_remembered():
    ledger: DedupCache[int] = DedupCache(depth=2)
    for number in range(4):
        ledger.remember(step(number), number)
    assert ledger.repeated(step(2)) == 2
    with pytest.raises(InvalidStepError, match="no longer remembered"):
        ledger.repeated(step(1))


def test_a_number_cannot_be_used_for_other_tokens():
    ledger: DedupCache[str] = DedupCache(depth=2)
    ledger.remember(step(0), "zero")
    with pytest.raises(InvalidStepError, match="other positions"):
        ledger.repeated(attrs.evolve(step(0), lengths=(2,)))


def test_a_failed_step_may_come_again():
    ledger: DedupCache[str] = DedupCache(depth=2)
    ledger.remember(step(0), "zero")
    ledger.remember(step(1), "one")
    ledger.forget(step(1))
    assert ledger.repeated(step(1)) is None
    assert ledger.repeated(step(0)) == "zero"


def test_steps_that_failed_together_may_all_come_again():
    ledger: DedupCache[str] = DedupCache(depth=4)
    ledger.remember(step(0), "zero")
    for number in (1, 2):
        ledger.remember(attrs.evolve(step(number), settled=1), "to be")
    for number in (1, 2):
        ledger.forget(step(number))
    assert ledger.repeated(step(1)) is None
    with pytest.raises(InvalidStepError, match="no longer remembered"):
        ledger.repeated(step(0))


def test_settled_steps_are_forgotten_and_a_step_in_the_future_settles_only_itself():
    ledger: DedupCache[str] = DedupCache(depth=4)
    for number in range(3):
        ledger.remember(attrs.evolve(step(number), settled=number), "answer")
        assert len(ledger) == 1
    ledger.remember(attrs.evolve(step(3), settled=10**18), "answer")
    assert len(ledger) == 0
    assert ledger.repeated(step(4)) is None


def test_what_was_sent_before_is_outdated():
    ledger: DedupCache[str] = DedupCache(depth=4)
    ledger.remember(attrs.evolve(step(1), attempt=1), "one")
    assert ledger.outdated(step(1))
    assert ledger.outdated(step(0)), "it was given up: a later one has come"
    assert not ledger.outdated(attrs.evolve(step(1), attempt=1))
    assert not ledger.outdated(step(2))
    ledger.repeated(attrs.evolve(step(1), attempt=3))
    assert ledger.outdated(attrs.evolve(step(1), attempt=2))


def test_a_step_whose_answer_was_dropped_is_not_computed_twice():
    ledger: DedupCache[str] = DedupCache(depth=4)
    ledger.remember(step(0), "large")
    ledger.remember(step(1), "small")
    assert ledger.answers == ["large", "small"]
    ledger.drop_answers(lambda answer: answer == "large")
    assert ledger.answers == ["small"]
    with pytest.raises(SessionLostError, match="had to make room"):
        ledger.repeated(step(0))
    assert ledger.repeated(step(1)) == "small"


def test_the_number_of_a_step_that_was_called_back_stays_used():
    ledger: DedupCache[str] = DedupCache(depth=4)
    for number in range(4):
        ledger.remember(step(number), str(number))
    ledger.recall(Recall(2, 9))
    assert ledger.answers == ["0", "1"]
    assert ledger.outdated(step(3))
    with pytest.raises(InvalidStepError, match="no longer remembered"):
        ledger.repeated(step(3))
    assert ledger.repeated(step(4)) is None


def test_recalls_are_of_steps_that_come_later_too_and_the_latest_are_remembered():
    recalled = RecalledSteps()
    for number in range(RECALLS_REMEMBERED + 1):
        recalled.add(Recall(2 * number, 2 * number + 1))
    assert step(2) in recalled and step(2 * RECALLS_REMEMBERED) in recalled
    assert step(3) not in recalled, "it was sent between two recalls"
    assert step(0) not in recalled, "it is so old that it is computed in vain"
    assert attrs.evolve(step(2), replay=True) not in recalled
    assert attrs.evolve(step(2), sources=(0,)) not in recalled
