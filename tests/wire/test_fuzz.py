"""Random and mutated bytes end in an error that names the peer's fault: no crash, no hang, no lost memory."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from swarmcore.errors import InvalidStepError, ProtocolError, UnknownCodecError
from swarmcore.types import PeerId
from swarmcore.wire import messages
from swarmcore.wire.failure import Failure, to_error, to_failure
from swarmcore.wire.framing import decode_header, decode_message, encode_message, kinds_of
from swarmcore.wire.limits import Limits
from swarmcore.wire.tensors import Tensor

LIMITS = Limits(max_message=2**20, max_header=2**18, max_decoded=2**22)
RECORDS = [record for record in vars(messages).values() if hasattr(record, "__attrs_attrs__")]
KINDS = kinds_of(*RECORDS, Failure)
SPARE_MEMORY = 128 * 2**20


def swallow(data: bytes | bytearray) -> str:
    """Do with ``data`` what a node does with a message; the name of what came of it."""
    try:
        decode_header(memoryview(data), LIMITS)
        message = decode_message(memoryview(data), KINDS, LIMITS)
        for tensor in message.tensors:
            tensor.decode()
        if isinstance(message.record, Failure):
            to_error(message.record, PeerId("12D3"))
    except (ProtocolError, UnknownCodecError) as exc:
        assert len(exc.message) < 20_000
        return type(exc).__name__
    return "message"


def samples() -> list[bytes]:
    hop = messages.Hop(PeerId("12D3"), ("tcp://a", "tcp://b"), "s" * 32, 0, 10)
    hidden = Tensor("hidden", "bfloat16", (4, 64), memoryview(bytes(range(256)) * 2))
    sent: list[tuple[Any, list[Tensor]]] = [
        (messages.Ping(b"payload"), []),
        (messages.OpenSession("s" * 32, "f" * 64, 0, 10, 4, 1000, hop), []),
        (messages.Step(7, (1, 2), (3, 4), (hop, hop)), [hidden]),
        (messages.StepOutput(7, 30), [hidden.encode("raw+zstd"), hidden]),
        (messages.StepFailed(7, to_failure(InvalidStepError("no", a=[1, {"b": None}], c=1.5))), []),
        (Failure("CacheFullError", "full"), []),
    ]
    return [b"".join(encode_message(record, tensors, LIMITS)) for record, tensors in sent]


def mutate(data: bytes, random: Random) -> bytearray:
    changed = bytearray(data)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(len(changed) + 1)
        match random.randrange(5):
            case 0 if changed:
                changed[at % len(changed)] ^= 1 << random.randrange(8)
            case 1:
                # The bytes that msgpack reads as "what follows is this long".
                changed[at:at] = random.choice(
                    [b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9"]
                ) + random.randbytes(4)
            case 2:
                del changed[at : at + random.randint(1, 20)]
            case 3:
                changed[at:at] = changed[at : at + random.randint(1, 200)] * random.randint(1, 50)
            case _:
                changed[at:at] = random.choice([b"\x91", b"\x81\xa0", b"\xc0", b"\xff"]) * random.randint(
                    1, 5000
                )
    return changed


@given(st.binary(max_size=500))
def test_random_bytes(data: bytes) -> None:
    swallow(data)


def test_mutated_messages_in_little_memory() -> None:
    """In a process of its own, whose address space may grow by `SPARE_MEMORY` and no more."""
    done = subprocess.run([sys.executable, __file__], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    outcomes = dict(line.split() for line in done.stdout.splitlines())
    assert int(outcomes["ProtocolError"]) > 1000
    assert int(outcomes["message"]) > 10, "mutations reach past the header"


def main() -> None:
    whole = samples()
    assert {swallow(data) for data in whole} == {"message"}
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + SPARE_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
    outcomes: dict[str, int] = {}
    random = Random(20240607)
    for _ in range(20_000):
        outcome = swallow(mutate(random.choice(whole), random))
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    for outcome, count in outcomes.items():
        print(outcome, count)


if __name__ == "__main__":
    main()
