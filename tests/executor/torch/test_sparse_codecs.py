"""Codecs that keep the largest entries: what comes back, how large it is, and what hostile bytes do."""

from __future__ import annotations

from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmcore.errors import InputError, ProtocolError
from swarmcore.executor.torch import codecs as _codecs  # noqa: F401  (registers the int8 codec)
from swarmcore.executor.torch.device import DTYPES
from swarmcore.executor.torch.sparse_codecs import (
    OUTLIERS,
    SCALED,
    SHARES,
    MixedCodec,
    TopKCodec,
    block_size,
)
from swarmcore.executor.torch.wire_tensors import to_torch, to_wire
from swarmcore.routing.link_codec import LADDERS
from swarmcore.wire.tensors import Tensor, codec_names

TOPK = [f"topk{share}" for share in SHARES]
MIXED = ["mixed1", "mixed2", "mixed3", "mixed4"]
CODECS = TOPK + MIXED
BLOCK = 256

dtypes = st.sampled_from(sorted(DTYPES))
shapes = st.one_of(
    st.lists(st.integers(0, 40), min_size=1, max_size=3).map(tuple),
    st.sampled_from([(255,), (256,), (257,), (3, 576), (2, 300, 256)]),
)


def hidden_states(rows: int = 64, width: int = 576, *, seed: int = 1) -> torch.Tensor:
    """Normal, with two huge channels and a huge first token, as a pretrained model has them."""
    values = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    values[:, [5, 77]] *= 50
    values[0] *= 300
    return values


def blocks(values: torch.Tensor) -> torch.Tensor:
    flat, size = values.float().flatten(), block_size(tuple(values.shape))
    return torch.nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)


def codec_of(name: str) -> TopKCodec | MixedCodec:
    return TopKCodec(float(name[4:])) if name.startswith("topk") else MixedCodec(int(name[5:]))


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(CODECS), dtypes, shapes, st.integers(0, 2**31), st.sampled_from([1e-30, 1.0, 1e4]))
def test_shape_size_and_largest_entries_survive(
    codec: str, dtype: str, shape: tuple[int, ...], seed: int, scale: float
) -> None:
    values = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DTYPES[dtype])
    wire = to_wire("hidden", values, codec)
    assert wire.data.nbytes == codec_of(codec).encoded_nbytes(dtype, shape)
    decoded = to_torch(wire)
    assert decoded.shape == values.shape and decoded.dtype == values.dtype and decoded.isfinite().all()
    given, got = blocks(values), blocks(decoded)
    made = codec_of(codec)
    size = given.shape[1]
    kept = made.kept(size) if isinstance(made, TopKCodec) else OUTLIERS * size // SCALED
    where = given.abs().topk(kept, 1).indices
    exact, back = given.gather(1, where), got.gather(1, where)
    step = given.abs().amax(1, keepdim=True) * 2.0**-17 + 1e-38
    if dtype == "float16":
        step += 2.0**-24
    assert ((back - exact).abs() <= 0.07 * exact.abs() + step).all()
    if codec in TOPK:
        assert (got.count_nonzero(1) <= kept).all()


ERRORS = {
    "topk0.5": 0.28,
    "topk0.25": 0.54,
    "topk0.1": 0.76,
    "topk0.05": 0.86,
    "topk0.02": 0.94,
    "topk0.01": 0.98,
    "mixed4": 0.080,
    "mixed3": 0.155,
    "mixed2": 0.30,
    "mixed1": 0.55,
}
"""Of the ordinary channels of ordinary tokens, relative."""


@pytest.mark.parametrize("codec", CODECS)
def test_error_beside_huge_channels(codec: str) -> None:
    values = hidden_states()
    decoded = to_torch(to_wire("hidden", values, codec))
    ordinary = [channel for channel in range(576) if channel not in (5, 77)]
    error = (decoded - values)[1:, ordinary].norm() / values[1:, ordinary].norm()
    assert 0.85 * ERRORS[codec] < error < ERRORS[codec]
    huge = (decoded - values)[:, [5, 77]].norm() / values[:, [5, 77]].norm()
    assert huge < (0.05 if codec in TOPK else 0.004)


def test_bits_of_each_value_are_those_the_ladders_name() -> None:
    for ladder in LADDERS.values():
        bits = [rung.bits for rung in ladder]
        assert bits == sorted(bits, reverse=True)
        for rung in ladder:
            wire = to_wire("hidden", hidden_states(64, 512), rung.codec)
            assert 8 * wire.data.nbytes / (64 * 512) == pytest.approx(rung.bits)


def test_names_are_registered() -> None:
    assert set(CODECS) <= set(codec_names())


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("many", [1, 200])
def test_what_is_not_finite_does_not_become_finite(codec: str, bad: float, many: int) -> None:
    values = torch.ones(3 * BLOCK)
    values[BLOCK : BLOCK + many] = bad
    decoded = to_torch(to_wire("hidden", values, codec)).view(3, BLOCK)
    assert decoded[1].isnan().any()
    assert decoded[0].isfinite().all() and decoded[2].isfinite().all()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_extremes_stay_finite(codec: str, dtype: torch.dtype) -> None:
    limits = torch.finfo(dtype)
    values = torch.full((2, BLOCK), limits.max, dtype=dtype)
    values[0, ::2] = -limits.max
    values[1] = limits.smallest_normal
    decoded = to_torch(to_wire("hidden", values, codec))
    assert decoded.isfinite().all()
    assert decoded[0].abs().max() >= 0.9 * limits.max
    assert decoded[1].abs().max() <= 1.5 * limits.smallest_normal


@pytest.mark.parametrize(
    ("width", "size"), [(4096, 256), (576, 192), (640, 128), (704, 64), (100, 256), (8, 256)]
)
def test_blocks_do_not_reach_into_the_next_row_where_rows_allow(width: int, size: int) -> None:
    assert block_size((10, width)) == size


@pytest.mark.parametrize("codec", CODECS)
def test_rows_are_encoded_each_by_itself(codec: str) -> None:
    values = hidden_states(3)
    together = to_torch(to_wire("hidden", values, codec))
    apart = [to_torch(to_wire("hidden", row, codec)) for row in values]
    assert torch.equal(together, torch.stack(apart))


@pytest.mark.parametrize("codec", CODECS)
def test_zeros_stay_zeros(codec: str) -> None:
    values = torch.zeros(5, 100)
    assert torch.equal(to_torch(to_wire("hidden", values, codec)), values)


@pytest.mark.parametrize("codec", CODECS)
def test_large_tensors_are_converted_piece_by_piece(codec: str) -> None:
    values = torch.randn(150, 1001, generator=torch.Generator().manual_seed(2))  # several chunks
    whole = to_torch(to_wire("hidden", values, codec)).flatten()
    tail = values.flatten()[512 * BLOCK :]
    assert len(tail) % 64  # so that it is in blocks of the same size
    assert torch.equal(whole[512 * BLOCK :], to_torch(to_wire("hidden", tail, codec)))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(CODECS), dtypes, st.integers(1, 600), st.randoms(use_true_random=False))
def test_any_bytes_decode_or_are_refused(codec: str, dtype: str, count: int, rng: Random) -> None:
    size = codec_of(codec).encoded_nbytes(dtype, (count,))
    data = memoryview(rng.randbytes(size))
    wire = Tensor("hidden", dtype, (count,), data, codec)
    try:
        decoded = to_torch(wire)
    except ProtocolError:
        return
    assert decoded.shape == (count,)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(CODECS), st.randoms(use_true_random=False))
def test_a_sound_tensor_with_some_bytes_changed_decodes_or_is_refused(codec: str, rng: Random) -> None:
    values = hidden_states(4)
    wire = to_wire("hidden", values, codec)
    data = bytearray(wire.data)
    for _ in range(rng.randrange(1, 8)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    try:
        decoded = to_torch(Tensor("hidden", "float32", (4, 576), memoryview(data), codec))
    except ProtocolError:
        return
    assert decoded.shape == values.shape


@pytest.mark.parametrize(
    ("codec", "place"), [("topk0.5", 2), ("topk0.25", 2), ("topk0.1", 3), ("topk0.01", 3), ("mixed3", 18)]
)
def test_places_out_of_order_are_refused(codec: str, place: int) -> None:
    wire = to_wire("hidden", torch.randn(BLOCK), codec)
    data = bytearray(wire.data)
    # A bitmap with all bits of a byte set marks too many; a place after a smaller one is out of order.
    data[place : place + 2] = b"\xff\xff"
    with pytest.raises(ProtocolError, match=r"bitmap|ascending"):
        Tensor("hidden", "float32", (BLOCK,), memoryview(data), codec).decode()


@pytest.mark.parametrize(
    ("codec", "encoded"),
    [
        # scale 64/448, places 61 to 63, 62 to 64 over the scale
        ("topk0.05", "123e 3d3e3f 7e7e7e"),
        # scale, bitmap of the last 16, 49 to 64 over the scale
        ("topk0.25", "123e 000000000000ffff 7b7b7b7b7c7c7c7c7c7d7d7d7d7e7e7e"),
        # 63 and 64, their places, the scale 35.75; all others are above zero
        ("mixed1", "7c428042 3e3f 0f42 ffffffffffffff3f"),
        # those from 34 on have the level above
        ("mixed2", "7c428042 3e3f 0f42 00000000feffffff ffffffffffffff3f"),
    ],
)
def test_encoded_form(codec: str, encoded: str) -> None:
    values = torch.arange(1, 65).float()
    assert to_wire("hidden", values, codec).data.hex() == encoded.replace(" ", "")


@pytest.mark.parametrize("codec", CODECS)
def test_a_wrong_number_of_bytes_is_refused(codec: str) -> None:
    wire = to_wire("hidden", torch.randn(BLOCK), codec)
    for data in (wire.data[:-1], memoryview(bytes(wire.data) + b"\0"), memoryview(b"")):
        with pytest.raises(ProtocolError, match="bytes"):
            Tensor("hidden", "float32", (BLOCK,), data, codec).decode()


@pytest.mark.parametrize("codec", [TopKCodec(0.1), MixedCodec(2)])
def test_integers_are_refused(codec: TopKCodec | MixedCodec) -> None:
    with pytest.raises(InputError, match="take float32"):
        codec.encode(memoryview(bytes(8)), "int64", (1,))
    with pytest.raises(ProtocolError, match="take float32"):
        codec.encoded_nbytes("int64", (1,))
