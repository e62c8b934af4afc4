"""How an error crosses the wire: class name, message and plain details, never a traceback."""

from __future__ import annotations

from typing import Any

import attrs

from swarmcore.errors import RemoteFaultError, SwarmError, error_classes
from swarmcore.types import PeerId, short
from swarmcore.wire.framing import encode_record

MAX_TEXT = 1000
"""Characters of an error message that travel."""
MAX_DETAILS = 16
MAX_DETAIL_BYTES = 2000


@attrs.frozen
class Failure:
    """In place of a reply, or as the last message of a channel: the other side failed."""

    error: str
    """Name of the `SwarmError` class."""
    message: str = ""
    details: dict[str, Any] = attrs.field(factory=dict)


def to_failure(error: SwarmError) -> Failure:
    """``error`` as it travels. Details that are not plain values, or are large, stay at home."""
    details = {name: value for name, value in error.details.items() if _may_travel(value)}
    return Failure(type(error).__name__, error.message[:MAX_TEXT], dict(list(details.items())[:MAX_DETAILS]))


def to_error(failure: Failure, peer: PeerId) -> SwarmError:
    """The error that ``failure`` stands for; `RemoteFaultError` when its class is unknown here."""
    message = failure.message[:MAX_TEXT]
    cls = error_classes().get(failure.error)
    if cls is None:
        cls = RemoteFaultError
        message = f"{short(peer)} failed with {failure.error[:100]!r}: {message}"
    error = cls(message)
    error.details.update(failure.details)
    error.origin = peer
    return error


def _may_travel(value: Any) -> bool:
    try:
        return len(encode_record(value)) <= MAX_DETAIL_BYTES
    except (TypeError, ValueError, OverflowError, RecursionError):
        return False
