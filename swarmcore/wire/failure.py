"""How an error crosses the wire: its tag, message and plain details, never a traceback."""

from __future__ import annotations

import contextlib
from itertools import islice
from typing import Any

import attrs
import msgspec

from swarmcore.errors import ProtocolError, RemoteFaultError, SwarmError, error_classes
from swarmcore.printable import printable_line
from swarmcore.types import PeerId, short
from swarmcore.wire.framing import decode_record, encode_record, wire_tag

MAX_TEXT = 1000
"""Characters of an error message that travel."""
MAX_DETAILS = 16
"""Details that travel with one error."""
MAX_DETAIL_BYTES = 2000
"""Most bytes of one detail, encoded."""

_NO_DETAILS = msgspec.Raw(encode_record({}))
_MAX_ENCODED = MAX_DETAILS * 2 * MAX_DETAIL_BYTES


@wire_tag("Failure")
@attrs.frozen
class Failure:
    """In place of a reply, or as the last message of a channel: the other side failed."""

    error: str
    """`SwarmError.wire_tag` of its class."""
    message: str = ""
    details: msgspec.Raw = _NO_DETAILS
    """A map of plain values, decoded only once it is known to be small."""


def to_failure(error: SwarmError) -> Failure:
    """``error`` as it travels. Details that are not plain values, or are large, stay at home."""
    may_travel = (item for item in error.details.items() if _may_travel(item))
    details = encode_record(dict(islice(may_travel, MAX_DETAILS)))
    return Failure(error.wire_tag, error.message[:MAX_TEXT], msgspec.Raw(details))


def to_error(failure: Failure, peer: PeerId) -> SwarmError:
    """The error that ``failure`` stands for; `RemoteFaultError` when its class is unknown here.

    Its message is one printable line: errors end up in logs and on terminals.
    """
    message = printable_line(failure.message, MAX_TEXT)
    cls = error_classes().get(failure.error)
    if cls is None:
        cls = RemoteFaultError
        message = f"{short(peer)} failed with {failure.error[:100]!r}: {message}"
    error = cls(message)
    if memoryview(failure.details).nbytes <= _MAX_ENCODED:
        with contextlib.suppress(ProtocolError):  # the error matters more than its broken details
            error.details.update(decode_record(failure.details, dict[str, Any]))
    error.origin = peer
    return error


def _may_travel(detail: tuple[str, Any]) -> bool:
    try:
        return len(encode_record(detail)) <= MAX_DETAIL_BYTES
    except (TypeError, ValueError, OverflowError, RecursionError):
        return False
