"""Errors on the wire: bounded, plain, and never a class of the sender's choosing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcore.errors import CacheFullError, RemoteFaultError, SwarmError, error_classes
from swarmcore.identity import Identity
from swarmcore.wire.failure import MAX_DETAIL_BYTES, MAX_DETAILS, MAX_TEXT, Failure, to_error, to_failure
from swarmcore.wire.framing import decode_record, encode_record

PEER = Identity.generate().peer


def crossed(error: SwarmError) -> SwarmError:
    return to_error(decode_record(encode_record(to_failure(error)), Failure), PEER)


@pytest.mark.parametrize("cls", error_classes().values())
def test_every_class_crosses(cls: type[SwarmError]) -> None:
    error = crossed(cls("what and why", retry_after=1.5, ranges=["0:3"], nested={"a": [1, None]}))
    assert type(error) is cls
    assert error.message == "what and why"
    assert error.details == {"retry_after": 1.5, "ranges": ["0:3"], "nested": {"a": [1, None]}}
    assert error.retry_after == 1.5
    assert error.origin == PEER


def test_what_is_not_plain_or_is_large_stays_at_home() -> None:
    endless: list[Any] = []
    endless.append(endless)
    error = CacheFullError(
        "x" * 100_000,
        kept=1,
        path=Path("/secret"),
        code=lambda: 0,
        large=bytes(MAX_DETAIL_BYTES),
        huge=2**70,
        endless=endless,
    )
    arrived = crossed(error)
    assert arrived.details == {"kept": 1}
    assert len(arrived.message) == MAX_TEXT
    many = crossed(CacheFullError("many", **{f"d{n}": n for n in range(100)}))
    assert len(many.details) == MAX_DETAILS


@pytest.mark.parametrize(
    "name", ["KeyboardInterrupt", "SystemExit", "Exception", "", "os.system", "X" * 10_000]
)
def test_unknown_classes_become_remote_faults(name: str) -> None:
    error = to_error(Failure(name, "reason"), PEER)
    assert type(error) is RemoteFaultError
    assert "reason" in error.message
    assert len(error.message) < 200


@given(st.binary(max_size=200))
def test_hostile_details_cost_only_themselves(details: bytes) -> None:
    assert type(to_error(Failure("CacheFullError", "full", msgspec.Raw(details)), PEER)) is CacheFullError


def test_large_details_are_not_even_read() -> None:
    details = msgspec.Raw(encode_record({"wide": [[]] * 500_000}))
    assert to_error(Failure("CacheFullError", "full", details), PEER).details == {}


def test_details_cannot_overwrite_the_error() -> None:
    details = msgspec.Raw(encode_record({"message": "forged", "args": 1, "origin": "forged", "self": 2}))
    error = to_error(Failure("CacheFullError", "full", details), PEER)
    assert error.message == "full"
    assert error.origin == PEER
