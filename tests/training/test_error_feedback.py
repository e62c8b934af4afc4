"""Error feedback: what is dropped comes later."""

from __future__ import annotations

import pytest
import torch

from swarmcore.errors import UnknownCodecError
from swarmcore.executor.torch import sparse_codecs as _sparse  # noqa: F401  (registers topk and mixed)
from swarmcore.executor.torch.wire_tensors import to_torch
from swarmcore.training.local_steps.vectors import ErrorFeedback

CODECS = ["topk0.01", "topk0.1", "mixed1", "mixed4"]


def deltas(count: int, *shape: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_arrived_and_what_is_left_make_up_the_whole(codec: str, dtype: torch.dtype) -> None:
    residuals = ErrorFeedback()
    sent = arrived = torch.zeros(16, 64)
    for delta in deltas(20, 16, 64):
        sent = sent + delta.to(dtype).float()
        arrived = arrived + to_torch(residuals.encode("delta", delta.to(dtype), codec)).float()
        assert torch.allclose(arrived + residuals["delta"], sent, atol=1e-3)


@pytest.mark.parametrize("codec", CODECS)
def test_a_constant_gradient_arrives_in_full_though_each_tensor_holds_little_of_it(codec: str) -> None:
    (gradient,) = deltas(1, 16, 64)
    residuals = ErrorFeedback()
    steps = 400
    arrived = sum(to_torch(residuals.encode("w", gradient, codec)) for _ in range(steps)) / steps
    alone = to_torch(ErrorFeedback().encode("w", gradient, codec))
    assert (arrived - gradient).norm() < 0.15 * gradient.norm()
    assert (arrived - gradient).norm() < (alone - gradient).norm()


def test_tensors_that_did_not_arrive_are_sent_again() -> None:
    (delta,) = deltas(1, 300)
    residuals = ErrorFeedback()
    residuals.returned(residuals.encode("delta", delta, "topk0.05"))
    assert torch.allclose(residuals["delta"], delta, atol=1e-6)


def test_another_shape_and_values_that_are_not_finite_leave_nothing_behind() -> None:
    residuals = ErrorFeedback()
    residuals.encode("w", torch.full((64,), torch.nan), "topk0.1")
    assert not residuals["w"].any()
    residuals.encode("w", torch.randn(64), "topk0.1")
    shorter = residuals.encode("w", torch.ones(32), "raw")
    assert torch.equal(to_torch(shorter), torch.ones(32))


def test_a_codec_that_is_not_known_changes_nothing() -> None:
    residuals = ErrorFeedback()
    residuals.encode("w", torch.ones(64), "topk0.1")
    left = residuals["w"].clone()
    with pytest.raises(UnknownCodecError):
        residuals.encode("w", torch.ones(64), "zip")
    assert torch.equal(residuals["w"], left)


def test_goes_on_from_a_checkpoint() -> None:
    first, second = deltas(2, 8, 64)
    residuals, resumed = ErrorFeedback(), ErrorFeedback()
    residuals.encode("w", first, "mixed2")
    resumed.load_state_dict(residuals.state_dict())
    assert bytes(resumed.encode("w", second, "mixed2").data) == bytes(
        residuals.encode("w", second, "mixed2").data
    )
    residuals.forget()
    with pytest.raises(KeyError):
        residuals["w"]
