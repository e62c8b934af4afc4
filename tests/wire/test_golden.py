"""The bytes of version 1, as docs/protocol.md shows them: a change here is a change of the protocol."""

from __future__ import annotations

import re
from pathlib import Path

from swarmcore.wire.framing import decode_message, encode_message, kinds_of
from swarmcore.wire.limits import Limits
from swarmcore.wire.messages import PING, Ping, StepOutput
from swarmcore.wire.tensors import Tensor

PAGE = Path(__file__).parents[2] / "docs" / "protocol.md"

TENSOR = b"\x91\x95\xa6hidden\xa8bfloat16\x92\x01\x02\xa3raw\x04\xa0\xc0"
VALUES = bytes.fromhex("803f 0040")
STEP_OUTPUT = (
    bytes.fromhex("61000000 95")
    + b"\xaaStepOutput\x86\xa7arrival\xc0\xa7attempt\x00\xabblocks_done\x1e\xa4sent\xc0\xa4step\x07"
    + b"\xabundelivered\xa0"
    + TENSOR
    + bytes(27)
    + VALUES
)
EARLIER_STEP_OUTPUT = (
    bytes.fromhex("52000000 95")
    + b"\xaaStepOutput\x84\xa7attempt\x00\xabblocks_done\x1e\xa4step\x07\xabundelivered\xa0"
    + TENSOR
    + bytes(42)
    + VALUES
)
"""As servers sent it before answers said how long steps were under way."""


def documented(heading: str) -> bytes:
    """The bytes of the dump that follows ``heading``: pairs of hex digits, then the remark on them."""
    block = re.search(re.escape(heading) + r"\n\n```text\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert block is not None
    return bytes.fromhex(" ".join(re.findall(r"^ *((?:[0-9a-f]{2} ?)+)(?:  |$)", block[1], re.MULTILINE)))


def test_a_call() -> None:
    sent = b"".join(encode_message(Ping(b"hi"), (), Limits(), method=PING, timeout=10.0))
    assert sent == documented("A ping, the whole first message of its stream:")


def test_a_tensor() -> None:
    hidden = Tensor("hidden", "bfloat16", (1, 2), memoryview(bytes.fromhex("803f0040")))
    assert b"".join(encode_message(StepOutput(7, 30), [hidden], Limits())) == STEP_OUTPUT
    for received in (STEP_OUTPUT, EARLIER_STEP_OUTPUT):
        message = decode_message(memoryview(received), kinds_of(StepOutput), Limits())
        assert message.record == StepOutput(7, 30)
        assert message.tensors == (hidden,)
