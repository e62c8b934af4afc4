from __future__ import annotations

import pytest
import torch

from swarmcore.errors import InputError, InvalidStepError
from swarmcore.executor.torch.device import DTYPES, choose_dtype, parse_device
from swarmcore.executor.torch.wire_tensors import to_torch, to_wire
from swarmcore.wire.tensors import Tensor


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_round_trip_shares_memory(dtype: torch.dtype) -> None:
    values = torch.randn(3, 5).to(dtype)
    back = to_torch(to_wire("hidden", values))
    assert torch.equal(back, values) and back.data_ptr() == values.data_ptr()


def test_rows_that_are_not_contiguous() -> None:
    values = torch.randn(4, 6)
    assert torch.equal(to_torch(to_wire("hidden", values.t())), values.t())


def test_read_only_and_unaligned_buffers() -> None:
    values = torch.randn(2, 3)
    raw = bytes(to_wire("hidden", values).data)
    assert torch.equal(to_torch(Tensor("hidden", "float32", (2, 3), memoryview(raw))), values)
    shifted = memoryview(bytearray(b"x" + raw))[1:]
    assert torch.equal(to_torch(Tensor("hidden", "float32", (2, 3), shifted)), values)


def test_empty() -> None:
    assert to_torch(to_wire("hidden", torch.empty(0, 4))).shape == (0, 4)


def test_integers_are_refused() -> None:
    with pytest.raises(InvalidStepError, match="int64"):
        to_torch(Tensor("hidden", "int64", (1,), memoryview(bytearray(8))))


def test_devices() -> None:
    assert parse_device("cpu") == torch.device("cpu")
    for name in ("gpu", "cuda:", "cuda:x", "CPU", ""):
        with pytest.raises(InputError, match="use cpu, cuda"):
            parse_device(name)
    with pytest.raises(InputError, match="is not there"):
        parse_device("cuda:999")


@pytest.mark.parametrize(
    ("own", "chosen"),
    [
        (None, torch.bfloat16),
        (torch.float32, torch.float32),
        (torch.float16, torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        ("torch.float32", torch.float32),
    ],
)
def test_auto_dtype_on_cpu(own: object, chosen: torch.dtype) -> None:
    config = type("Config", (), {"dtype": own})()
    assert choose_dtype("auto", config, torch.device("cpu")) == chosen


def test_named_dtypes() -> None:
    for name, dtype in DTYPES.items():
        assert choose_dtype(name, None, torch.device("cpu")) == dtype
    with pytest.raises(InputError, match="use auto, float32"):
        choose_dtype("int3", None, torch.device("cpu"))
