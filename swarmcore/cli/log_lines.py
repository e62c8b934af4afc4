"""What a command logs: one printable line for each record, and no more lines of a kind than can be read."""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import Any

import attrs

from swarmcore.printable import printable, printable_line

MAX_LINE = 2000
"""Characters of one message."""

BURST = 30
"""Lines of one kind, from the same place in the code, that are shown one after the other."""

PER_MINUTE = 10
"""So many more of them in each minute."""

_MAX_KINDS = 1024


class PrintableFormatter(logging.Formatter):
    """One line for each record, and tracebacks below it; nothing in either that a terminal acts upon."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable_line(record.message, MAX_LINE)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        return printable(super().formatException(ei))


@attrs.define
class _Kind:
    left: float
    at: float
    left_out: int = 0


class LineLimit:
    """How many lines of each kind are shown, whoever causes them. A plain object."""

    def __init__(self, *, burst: int = BURST, per_minute: float = PER_MINUTE) -> None:
        self._burst = burst
        self._rate = per_minute / 60
        self._kinds: OrderedDict[object, _Kind] = OrderedDict()

    def take(self, kind: object, now: float) -> int | None:
        """How many lines of this ``kind`` were left out since the last, or None to leave out this one."""
        known = self._kinds.pop(kind, None) or _Kind(self._burst, now)
        self._kinds[kind] = known
        if len(self._kinds) > _MAX_KINDS:
            self._kinds.popitem(last=False)
        known.left = min(self._burst, known.left + (now - known.at) * self._rate)
        known.at = now
        if known.left < 1:
            known.left_out += 1
            return None
        known.left -= 1
        left_out, known.left_out = known.left_out, 0
        return left_out


class LineFilter(logging.Filter):
    """Applies a `LineLimit` to what a handler is given; records below ``INFO`` were asked for, and pass."""

    def __init__(self, limit: LineLimit | None = None) -> None:
        super().__init__()
        self._limit = limit or LineLimit()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.INFO:
            return True
        left_out = self._limit.take((record.name, record.pathname, record.lineno), record.created)
        if left_out:
            record.msg, record.args = f"{record.getMessage()} ({left_out} more like it were left out)", ()
        return left_out is not None
