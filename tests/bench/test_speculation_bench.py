"""What the benchmark of drafts makes of its rounds."""

from __future__ import annotations

import pytest

from swarmcore.bench.speculation import FIXED, SpeculationResult, _Decoded, _result, speculation_table


def a_round(plain: float, auto: float, best: float, tokens: list[int]) -> list[_Decoded]:
    fixed = [_Decoded(best if place == 2 else plain, [1, 2], 3.0, 0.5) for place in range(len(FIXED))]
    return [_Decoded(plain, [1, 2], 1.0, 0.0), _Decoded(auto, tokens, 2.5, 0.75), *fixed]


@pytest.mark.parametrize(("tokens", "same"), [([1, 2], True), ([1, 3], False)])
def test_gains_are_medians_of_rounds_and_texts_are_compared(tokens: list[int], same: bool) -> None:
    rounds = [a_round(10, 20, 40, [1, 2]), a_round(5, 20, 15, tokens), a_round(20, 20, 60, [1, 2])]
    assert _result("edit", rounds) == SpeculationResult(
        text="edit",
        plain=10,
        auto=2.0,
        fixed=3.0,
        best=f"{FIXED[2].length} x {FIXED[2].depth}",
        tokens_per_step=2.5,
        accepted=0.75,
        same=same,
    )
    assert speculation_table([_result("edit", rounds)]).row_count == 1
