"""Hand-made loops: token ids in, logits out."""

from __future__ import annotations

import pytest
import torch

from swarmcore.errors import InputError, SessionLostError


def expected(plain, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return plain(torch.tensor([tokens])).logits[0, -1]


async def test_logits_are_those_of_the_whole_model(model, plain):
    async with model.session(sequences=3) as session:
        logits = await session.step([[1, 2, 3], [7], [30, 40]])
        assert logits.shape == (3, 257)
        assert logits.dtype == torch.float32
        for row, tokens in zip(logits, ([1, 2, 3], [7], [30, 40]), strict=True):
            torch.testing.assert_close(row, expected(plain, tokens), atol=1e-4, rtol=0)
        logits = await session.step([[4], [], [50, 60]])
        assert logits.shape == (2, 257), "a row for each sequence that got tokens"
        torch.testing.assert_close(logits[1], expected(plain, [30, 40, 50, 60]), atol=1e-4, rtol=0)
        assert session.tokens == ((1, 2, 3, 4), (7,), (30, 40, 50, 60))
        assert session.positions == (4, 1, 4)


async def test_rollback_takes_tokens_back(model, plain):
    async with model.session(sequences=2) as session:
        await session.step([[1, 2, 3, 4], [5, 6]])
        session.rollback([2, 1])
        assert session.tokens == ((1, 2), (5,))
        logits = await session.step([[9], [8]])
        torch.testing.assert_close(logits[0], expected(plain, [1, 2, 9]), atol=1e-4, rtol=0)
        torch.testing.assert_close(logits[1], expected(plain, [5, 8]), atol=1e-4, rtol=0)
        session.rollback(0)
        assert session.positions == (0, 0)


async def test_beams_are_copies_of_one_another(model, plain):
    async with model.session(sequences=3) as session:
        await session.step([[1, 2, 3], [4, 5], [6]])
        logits = await session.step([[7], [8], [9]], sources=[1, 1, 0])
        assert session.tokens == ((4, 5, 7), (4, 5, 8), (1, 2, 3, 9))
        for row, tokens in zip(logits, session.tokens, strict=True):
            torch.testing.assert_close(row, expected(plain, list(tokens)), atol=1e-4, rtol=0)
        for sources in ([0], [0, 1, 3], [-1, 0, 0]):
            with pytest.raises(InputError, match="sources"):
                await session.step([[1], [1], [1]], sources=sources)
        assert session.positions == (3, 3, 4)


@pytest.mark.parametrize("positions", [3, -1, [1], [1, 9]])
async def test_rollback_beyond_what_is_cached_is_refused(model, positions):
    async with model.session(sequences=2) as session:
        await session.step([[1, 2], [3, 4]])
        with pytest.raises(InputError, match=r"\(2, 2\)"):
            session.rollback(positions)
        assert session.positions == (2, 2)


@pytest.mark.parametrize("ids", [[[1]], [[], []], [[257], [1]], [[-1], [1]], [[1] * 257, [1]]])
async def test_bad_steps_change_nothing(model, sessions, ids):
    async with model.session(sequences=2) as session:
        with pytest.raises(InputError):
            await session.step(ids)
        assert session.positions == (0, 0)
        assert sessions.opened[0].sent == []


async def test_a_failed_step_leaves_the_session_where_it_was(model, sessions, plain):
    async with model.session() as session:
        await session.step([[1, 2]])

        async def fail() -> None:
            raise SessionLostError("gone")

        sessions.opened[0].stepped = fail
        with pytest.raises(SessionLostError):
            await session.step([[3]])
        assert session.tokens == ((1, 2),)
        sessions.opened[0].stepped = None
        logits = await session.step([[4]])
        torch.testing.assert_close(logits[0], expected(plain, [1, 2, 4]), atol=1e-4, rtol=0)


async def test_a_session_is_opened_by_entering_it(model, sessions):
    session = model.session()
    assert not sessions.opened
    with pytest.raises(SessionLostError, match="async with"):
        await session.step([[1]])
    async with session:
        assert repr(session) == "<ModelSession  · pos 0>"
    assert repr(session) == "<ModelSession  · closed>"
    with pytest.raises(SessionLostError, match="make another"):
        await session.open()
    await session.close()


async def test_a_session_has_a_sequence_at_least(model):
    with pytest.raises(InputError, match="1 or more"):
        model.session(sequences=0)


async def test_steps_go_behind_each_other_and_are_called_back(model, plain):
    text, drafted = [1, 2, 3], [4, 5, 6, 7]
    async with model.session() as session:
        await session.step([text])
        first = await session.send([drafted])
        behind = await session.send([[8, 9]])
        assert session.tokens == ((*text, *drafted, 8, 9),)
        logits = await session.receive(first)
        for row, end in zip(logits, range(4, 8), strict=True):
            torch.testing.assert_close(row, expected(plain, (text + drafted)[:end]), atol=1e-4, rtol=0)
        await session.recall(behind)
        session.rollback(5)
        assert session.tokens == ((1, 2, 3, 4, 5),)
        logits = await session.step([[10, 11]], reply="all")
        for row, more in zip(logits, ([10], [10, 11]), strict=True):
            torch.testing.assert_close(row, expected(plain, [1, 2, 3, 4, 5, *more]), atol=1e-4, rtol=0)
