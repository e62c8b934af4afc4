from __future__ import annotations

import contextlib
import struct
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swarmcore.errors import ProtocolError
from swarmcore_transports.framed.frames import (
    MAX_PART,
    FrameReader,
    FrameType,
    encode_frame,
    message_header,
    split_message,
)


class Record:
    """Writes down what a reader finds."""

    def __init__(self) -> None:
        self.found: list[object] = []
        self.parts: list[int] = []

    def frame_received(self, kind: FrameType, value: int, body: bytes) -> None:
        self.found.append((kind, value, body))

    def part_announced(self, length: int, *, total: int | None) -> None:
        self.parts.append(length)

    def message_received(self, message: memoryview) -> None:
        self.found.append(bytes(message))


def feed(reader: FrameReader, data: bytes, cuts: list[int]) -> None:
    """Give ``data`` to the reader, at most ``cuts[i]`` bytes at the i-th time, over and over."""
    position = turn = 0
    while position < len(data):
        buffer = reader.get_buffer()
        assert len(buffer)
        count = min(len(buffer), len(data) - position, cuts[turn % len(cuts)])
        buffer[:count] = data[position : position + count]
        del buffer
        reader.received(count)
        position += count
        turn += 1


def encode(buffers: tuple[bytes, ...], part: int) -> list[bytes]:
    total = sum(map(len, buffers))
    if not total:
        return [message_header(0)]
    return [b"".join(frame) for _, frame in split_message(buffers, total, part)]


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 60_000), min_size=1, max_size=5),
    part=st.sampled_from([1000, 8 * 1024, 20_000, MAX_PART]),
    cuts=st.lists(st.integers(1, 70_000), min_size=1, max_size=5),
    between=st.sampled_from([FrameType.CREDIT, FrameType.HEARTBEAT]),
)
def test_frames_survive_any_cutting(sizes: list[int], part: int, cuts: list[int], between: FrameType) -> None:
    messages = [bytes((n + i) % 251 for n in range(size)) for i, size in enumerate(sizes)]
    stream = b""
    for message in messages:
        for frame in encode((message[:10], message[10:]), part):
            stream += frame + encode_frame(between, value=7)
    stream += encode_frame(FrameType.ABORT, b"reason")
    record = Record()
    feed(FrameReader(record, 2**20), stream, cuts)
    assert [found for found in record.found if isinstance(found, bytes)] == messages
    assert record.found.count((between, 7, b"")) == sum(len(encode((message,), part)) for message in messages)
    assert record.found[-1] == (FrameType.ABORT, 0, b"reason")


def test_an_abort_between_two_parts_is_read() -> None:
    (first, _) = encode((bytes(40_000),), 20_000)
    record = Record()
    feed(FrameReader(record, 2**20), first + encode_frame(FrameType.ABORT, b"no more"), [7])
    assert record.found == [(FrameType.ABORT, 0, b"no more")]


def test_a_claimed_length_allocates_little() -> None:
    reader = FrameReader(Record(), 64 * 2**20)
    tracemalloc.start()
    try:
        feed(reader, struct.pack("<BII", FrameType.MESSAGE, MAX_PART, 64 * 2**20) + bytes(1000), [10**6])
        reader.get_buffer()
        assert tracemalloc.get_traced_memory()[1] < 2 * MAX_PART
    finally:
        tracemalloc.stop()


def test_the_first_byte_of_a_long_message_takes_no_memory_for_the_rest() -> None:
    reader = FrameReader(Record(), 64 * 2**20)
    tracemalloc.start()
    try:
        feed(reader, struct.pack("<BII", FrameType.MESSAGE, 1, 64 * 2**20) + bytes(1), [10**6])
        reader.get_buffer()
        assert tracemalloc.get_traced_memory()[1] < 8192
    finally:
        tracemalloc.stop()


def test_a_big_message_is_whole() -> None:
    message = bytes(range(256)) * (5 * 2**20 // 256) + b"tail"
    record = Record()
    feed(FrameReader(record, 8 * 2**20), b"".join(encode((message,), MAX_PART)), [100_001])
    assert record.found == [message]


@pytest.mark.parametrize(
    ("frame", "complaint"),
    [
        (struct.pack("<BII", FrameType.MESSAGE, 10, 1001), "above the limit"),
        (struct.pack("<BII", FrameType.MESSAGE, 11, 10), "part of 11"),
        (struct.pack("<BII", FrameType.MESSAGE, 0, 10), "part of 0"),
        (struct.pack("<BII", FrameType.MORE, 10, 0), "part without a message"),
        (struct.pack("<BII", FrameType.HEARTBEAT, 5, 0), "with 5 bytes"),
        (struct.pack("<BII", FrameType.ABORT, 10_000, 0), "claims 10000"),
        (struct.pack("<BII", 99, 0, 0), "unknown kind 99"),
        (struct.pack("<BII", 0, 0, 0), "unknown kind 0"),
        (encode((bytes(900),), 500)[0] + encode_frame(FrameType.END), "in the middle of a message"),
        (encode((bytes(900),), 500)[0] + message_header(1), "inside another"),
    ],
)
def test_broken_frames_are_refused(frame: bytes, complaint: str) -> None:
    for cut in (1, 10**6):
        with pytest.raises(ProtocolError, match=complaint):
            feed(FrameReader(Record(), 1000), frame, [cut])


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400), st.integers(1, 50))
def test_random_bytes_never_crash_the_reader(data: bytes, cut: int) -> None:
    with contextlib.suppress(ProtocolError):
        feed(FrameReader(Record(), 1000), data, [cut])
