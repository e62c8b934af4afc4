"""Codecs give back what they were given, and nothing that was only claimed is allocated."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import attrs
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from swarmcore.errors import InputError, InternalError, ProtocolError, UnknownCodecError
from swarmcore.wire import tensors
from swarmcore.wire.limits import Limits
from swarmcore.wire.tensors import Tensor, TensorHeader, check_headers, codec_names, register_codec


class Halves:
    """Drops every second byte, and gives back the rest twice."""

    def encode(self, data: memoryview, dtype: str, shape: tuple[int, ...]) -> memoryview:
        return memoryview(bytes(data[::2]))

    def decode(self, data: memoryview, dtype: str, shape: tuple[int, ...]) -> memoryview:
        return memoryview(bytes(byte for byte in data for _ in range(2)))

    def encoded_nbytes(self, dtype: str, shape: tuple[int, ...]) -> int:
        return shape[0] // 2


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tensors, "_codecs", {})
    register_codec("halves", Halves())
    yield


def raw(data: bytes) -> Tensor:
    return Tensor("t", "uint8", (len(data),), memoryview(data))


def compressed(data: bytes, size: int) -> Tensor:
    return Tensor("t", "uint8", (size,), memoryview(data), codec="raw+zstd")


@given(st.binary(max_size=5000))
def test_zstd_round_trip(data: bytes) -> None:
    sent = raw(data).encode("raw+zstd")
    assert sent.codec == "raw+zstd"
    received = sent.decode()
    assert received == raw(data)
    assert bytes(received.data) == data


def test_raw_is_handed_through() -> None:
    tensor = raw(b"abc")
    assert tensor.decode() is tensor
    assert tensor.encode("raw").data is tensor.data


def test_registered_codecs_with_and_without_zstd(halves: None) -> None:
    assert codec_names() == ["raw", "halves"]
    for codec in "halves", "halves+zstd":
        received = raw(b"aabbcc").encode(codec).decode()
        assert bytes(received.data) == b"aabbcc"
        assert received.codec == "raw"
    with pytest.raises(InputError, match="already encoded"):
        raw(b"aabb").encode("halves").encode("raw+zstd")
    with pytest.raises(ProtocolError, match="holds 3 bytes"):
        attrs.evolve(raw(b"aabb").encode("halves"), data=memoryview(b"abc")).decode()


def test_a_codec_that_breaks_its_word_is_a_bug(halves: None) -> None:
    with pytest.raises(InternalError, match="halves"):
        Tensor("t", "uint8", (7,), memoryview(b"abc"), codec="halves").decode()


@pytest.mark.parametrize("codec", ["int3", "", "+zstd", "raw+", "raw+gzip", "raw+zstd+zstd", "int3+zstd"])
def test_unknown_codecs_are_named(codec: str) -> None:
    with pytest.raises(UnknownCodecError):
        Tensor("t", "uint8", (3,), memoryview(b"abc"), codec=codec).decode()
    with pytest.raises(UnknownCodecError):
        raw(b"abc").encode(codec)


def test_damaged_frames_are_refused() -> None:
    frame = zstandard.compress(b"abc" * 100)
    for damaged in b"", b"x", frame[:-1], frame[:3], frame + b"x", bytes([frame[0] ^ 1]) + frame[1:]:
        with pytest.raises(ProtocolError):
            compressed(damaged, 300).decode()
    for wrong_size in 0, 299, 301:
        with pytest.raises(ProtocolError):
            compressed(frame, wrong_size).decode()


def bomb(claimed: int, *, window_log: int) -> bytes:
    """A valid frame of ``claimed`` zeros that asks for a window of ``2**window_log`` bytes."""
    parameters = zstandard.ZstdCompressionParameters(window_log=window_log, write_content_size=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj(size=claimed)
    return compressor.compress(bytes(claimed)) + compressor.flush()


def test_zstd_bombs_are_refused_before_memory_is_spent() -> None:
    no_size = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(2**20))
    wide = bytearray(zstandard.ZstdCompressor().compress(bytes(2**10)))
    two = zstandard.compress(bytes(1000)) + zstandard.compress(bytes(2**24))
    skippable = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"
    # Magic, descriptor, a window of 2 GiB, 4096 bytes of content, an empty last block.
    huge_window = bytes.fromhex("28b52ffdc0a80010000000000000010000")
    # Magic, descriptor, 200 MiB of content in one segment, an empty last block.
    claims = bytes.fromhex("28b52ffda00000800c010000")
    cases = [
        (no_size, 2**20),
        (bytes(wide), 2**9),
        (two, 1000),
        (two, 1000 + 2**24),
        (skippable, 4),
        (skippable, 0),
        (huge_window, 2**12),
        (claims, 200 * 2**20),
        (bomb(2**22, window_log=10), 2**10),
    ]
    tracemalloc.start()
    try:
        for frame, size in cases:
            with pytest.raises(ProtocolError, match=r"compressed tensor|a frame of 12 bytes"):
                compressed(frame, size).decode()
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_an_honest_frame_of_zeros_is_let_through() -> None:
    assert compressed(zstandard.compress(bytes(2**24)), 2**24).decode().data.nbytes == 2**24


def test_encoded_tensors_are_hardly_larger_than_what_they_hold():
    check_headers([TensorHeader("t", "float32", (100,), "int8", 1824)], Limits())
    with pytest.raises(ProtocolError, match="no codec"):
        check_headers([TensorHeader("t", "float32", (100,), "int8", 1825)], Limits())
