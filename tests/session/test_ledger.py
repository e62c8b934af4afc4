import attrs
import pytest

from swarmcore.errors import InvalidStepError
from swarmcore.session.ledger import StepLedger
from swarmcore.wire.messages import Step


def step(number: int, start: int = 0) -> Step:
    return Step(number, (start,), (1,))


def test_a_repeated_step_finds_its_answer():
    ledger: StepLedger[str] = StepLedger(depth=2)
    assert ledger.repeated(step(0)) is None
    ledger.remember(step(0), "zero")
    assert ledger.repeated(step(0)) == "zero"
    assert ledger.repeated(step(1)) is None


def test_only_the_latest_steps_are_remembered():
    ledger: StepLedger[int] = StepLedger(depth=2)
    for number in range(4):
        ledger.remember(step(number), number)
    assert ledger.repeated(step(2)) == 2
    with pytest.raises(InvalidStepError, match="no longer remembered"):
        ledger.repeated(step(1))


def test_a_number_cannot_be_used_for_other_tokens():
    ledger: StepLedger[str] = StepLedger(depth=2)
    ledger.remember(step(0), "zero")
    with pytest.raises(InvalidStepError, match="other positions"):
        ledger.repeated(attrs.evolve(step(0), lengths=(2,)))


def test_a_failed_step_may_come_again():
    ledger: StepLedger[str] = StepLedger(depth=2)
    ledger.remember(step(0), "zero")
    ledger.remember(step(1), "one")
    ledger.forget(step(1))
    assert ledger.repeated(step(1)) is None
    assert ledger.repeated(step(0)) == "zero"
