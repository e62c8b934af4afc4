"""When a live session moves to a better chain."""

from __future__ import annotations

from typing import Any

from announced import peer

from swarmcore.session.move_policy import MovePolicy

BETTER = (peer(1), peer(2))


def should_move(policy: MovePolicy, now: float, **changed: Any) -> bool:
    """Half the time of a token saved on a hundred tokens, for a replay of one second."""
    given = {"current": 0.2, "better": 0.1, "target": BETTER, "tokens": 100, "replay": 1.0, **changed}
    return policy.should_move(now, **given)


def test_it_moves_once_the_gain_has_held() -> None:
    policy = MovePolicy(0)
    assert [should_move(policy, now) for now in (100, 105, 110)] == [False, False, True]


def test_a_gain_that_comes_and_goes_moves_nobody() -> None:
    policy = MovePolicy(0)
    looks = [should_move(policy, 100 + 6 * n, better=0.1 if n % 2 else 0.2) for n in range(20)]
    assert not any(looks)


def test_another_target_begins_anew() -> None:
    policy = MovePolicy(0)
    looks = [should_move(policy, 100 + 6 * n, target=(peer(n % 2),)) for n in range(20)]
    assert not any(looks)


def test_a_small_gain_moves_nobody_and_neither_does_a_replay_that_costs_more_than_is_left_to_save() -> None:
    for changed in ({"better": 0.16}, {"replay": 11.0}, {"tokens": 5}):
        policy = MovePolicy(0)
        assert not any(should_move(policy, now, **changed) for now in (100, 120, 140))
    policy = MovePolicy(0)
    assert [should_move(policy, now, replay=9.9) for now in (100, 120)] == [False, True]


def test_moves_keep_their_distance() -> None:
    policy = MovePolicy(0)
    assert not any(should_move(policy, now) for now in (10, 30, 50))
    assert should_move(policy, 60)
    policy.moved(60)
    assert [should_move(policy, now) for now in (70, 90, 119, 121)] == [False, False, False, True]
