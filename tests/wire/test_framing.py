"""What goes into a message comes out of it, and what is not a message is refused."""

from __future__ import annotations

import math
import struct
from typing import Any

import attrs
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcore.errors import InvalidStepError, MessageTooLargeError, ProtocolError
from swarmcore.types import ServerInfo, Span
from swarmcore.wire.failure import to_failure
from swarmcore.wire.framing import (
    decode_header,
    decode_message,
    decode_record,
    encode_message,
    encode_record,
    kinds_of,
)
from swarmcore.wire.limits import Limits
from swarmcore.wire.messages import Hop, InfoReply, Ping, Pong, Step, StepFailed, StepOutput
from swarmcore.wire.tensors import ITEM_BYTES, Tensor

LIMITS = Limits(max_message=2**20, max_header=2**16, max_tensors=8, max_decoded=2**20)
KINDS = kinds_of(Ping, Pong, Step, StepOutput, StepFailed, InfoReply)

text = st.text(max_size=20)
counts = st.integers(0, 2**40)
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
hops = st.builds(Hop, peer=text, addresses=st.tuples(text, text), session=text, start=counts, end=counts)
records = st.one_of(
    st.builds(Ping, st.binary(max_size=100)),
    st.builds(
        Step,
        step=counts,
        starts=st.lists(counts, max_size=4).map(tuple),
        lengths=st.lists(counts, max_size=4).map(tuple),
        chain=st.lists(hops, max_size=3).map(tuple),
        deadline=st.floats(0, 1e6),
    ),
    st.builds(
        StepFailed,
        step=counts,
        failure=st.builds(
            lambda message, details: to_failure(InvalidStepError(message, **details)),
            text,
            st.dictionaries(text.filter(lambda name: name != "message"), plain, max_size=3),
        ),
    ),
)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(sorted(ITEM_BYTES)))
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    size = math.prod(shape) * ITEM_BYTES[dtype]
    return Tensor(draw(text), dtype, shape, memoryview(draw(st.binary(min_size=size, max_size=size))))


def joined(buffers: list[Any]) -> memoryview:
    return memoryview(bytearray().join(buffers))


@given(records, st.lists(tensors(), max_size=4))
def test_messages_round_trip(record: Any, sent: list[Tensor]) -> None:
    data = joined(encode_message(record, sent, LIMITS))
    message = decode_message(data, KINDS, LIMITS)
    assert message.record == record
    assert message.kind == type(record).__name__
    assert message.tensors == tuple(sent)
    assert [bytes(t.data) for t in message.tensors] == [bytes(t.data) for t in sent]


@given(st.text(max_size=128), st.floats(0, 1e9) | st.none())
def test_the_opening_names_method_and_timeout(method: str, timeout: float | None) -> None:
    data = joined(encode_message(Ping(b"x"), (), LIMITS, method=method, timeout=timeout))
    header = decode_header(data, LIMITS)
    assert (header.kind, header.method, header.timeout) == ("Ping", method, timeout)
    assert decode_message(data, KINDS, LIMITS).record == Ping(b"x")


def test_tensor_data_is_neither_copied_nor_misaligned() -> None:
    values = bytearray(1000)
    sent = [Tensor("a", "uint8", (3,), memoryview(b"abc")), Tensor("b", "uint8", (1000,), memoryview(values))]
    buffers = encode_message(Ping(), sent, LIMITS)
    assert buffers[-1].obj is values  # type: ignore[union-attr]
    data = joined(buffers)
    received = decode_message(data, KINDS, LIMITS).tensor("b").data
    assert received.obj is data.obj
    received[0] = 77
    assert bytes(data).index(77) % 64 == 0
    with pytest.raises(ProtocolError, match="lacks its tensor 'c'"):
        decode_message(data, KINDS, LIMITS).tensor("c")


def test_wider_buffers_travel_as_bytes() -> None:
    words = memoryview(bytearray(16)).cast("I")
    data = joined(encode_message(Ping(), [Tensor("w", "int32", (4,), words)], LIMITS))
    assert decode_message(data, KINDS, LIMITS).tensor("w").data.nbytes == 16


def test_a_hot_header_is_small() -> None:
    step = StepOutput(step=1000, blocks_done=30)
    hidden = Tensor("hidden", "bfloat16", (1, 2048), memoryview(bytes(4096)))
    assert sum(map(len, encode_message(step, [hidden], LIMITS))) - 4096 <= 128


def test_a_message_above_the_limit_is_not_sent() -> None:
    big = Tensor("t", "uint8", (2**20,), memoryview(bytes(2**20)))
    with pytest.raises(MessageTooLargeError, match="smaller pieces"):
        encode_message(Ping(), [big], LIMITS)
    with pytest.raises(MessageTooLargeError, match="header"):
        encode_message(Ping(bytes(2**16)), [], LIMITS)


def test_records_may_grow_and_unknown_kinds_are_refused() -> None:
    @attrs.frozen
    class NewerPing:
        payload: bytes
        fresh: dict[str, list[int]]

    newer = encode_record(NewerPing(b"x", {"a": [1]}))
    assert decode_record(newer, Ping) == Ping(b"x")
    assert decode_record(b"\x80", Ping) == Ping()
    header = msgspec.msgpack.encode(["Ping", msgspec.Raw(newer), [], "", None, "a later field", {"and": 1}])
    data = memoryview(struct.pack("<I", len(header)) + header)
    assert decode_message(data, KINDS, LIMITS).record == Ping(b"x")
    with pytest.raises(ProtocolError, match="'Ping' has no place here; expected Pong"):
        decode_message(data, kinds_of(Pong), LIMITS)


def message_with(header: Any, rest: bytes = b"") -> memoryview:
    encoded = msgspec.msgpack.encode(header)
    start = struct.pack("<I", len(encoded)) + encoded
    return memoryview(start + bytes(-len(start) % 64 if rest else 0) + rest)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0",
        b"\xff\xff\xff\xff",
        b"\x05\0\0\0abc",
        struct.pack("<I", 2**16 + 1) + bytes(2**17),
        message_with({"kind": "Ping"}),
        message_with(["Ping"]),
        message_with(["Ping", b"not a map"]),
        message_with(["P" * 200, {}]),
        message_with(["Ping", {"payload": "text"}]),
        message_with(["Ping", {}], b"left over"),
        message_with(["Ping", {}, [["t", "uint8", [3], "raw", 3]]], b"ab"),
        message_with(["Ping", {}, [["t", "uint8", [3], "raw", 3]]], b"abcd"),
        message_with(["Ping", {}, [["t", "uint8", [3], "raw", 4]]], b"abcd"),
        message_with(["Ping", {}, [["t", "uint8", [-3], "raw", -3]]]),
        message_with(["Ping", {}, [["t", "complex", [3], "raw", 3]]], b"abc"),
        message_with(["Ping", {}, [["t", "uint8", [0] * 9, "raw", 0]]]),
        message_with(["Ping", {}, [["t", "uint8", [0] * 100, "raw", 0]]]),
        message_with(["Ping", {}, [["t", "uint8", [0], "raw", 0]] * 9]),
        message_with(["Ping", {}, [["t", "uint8", [0], "raw", 0]] * 2000]),
        message_with(["Ping", {}, [["t", "uint8", [2**63, 2**63], "raw", 0]]]),
        message_with(["Ping", {}, [["t", "uint8", [2**20 + 1], "raw+zstd", 3]]], b"abc"),
        message_with(["Ping", {}, [["t", "uint8", [2**19 + 1], "raw+zstd", 1]] * 2], bytes(65)),
        struct.pack("<I", 50_006) + b"\x92\xa4Ping" + b"\x91" * 50_000,
    ],
)
def test_what_is_not_a_message_is_refused(data: bytes | memoryview) -> None:
    with pytest.raises(ProtocolError):
        decode_message(memoryview(data), KINDS, LIMITS)


def test_every_record_of_the_protocols_survives() -> None:
    server = ServerInfo("peer", ("tcp://…",), span=Span(0, 10))  # type: ignore[arg-type]
    reply = InfoReply(server, uptime=1.5, counters={"steps": 3})
    assert decode_record(encode_record(reply), InfoReply) == reply
