"""What a command logs: one printable line for each record, and no more lines of a kind than can be read."""

from __future__ import annotations

import logging
import os
import sys
from collections import OrderedDict
from typing import Any

import attrs

from swarmcore.pacing import TokenBucket
from swarmcore.printable import printable, printable_line

MAX_LINE = 2000
"""Characters of one message."""

BURST = 30
"""Lines of one kind, from the same place in the code, that are shown one after the other."""

PER_MINUTE = 10
"""So many more of them in each minute."""

_MAX_KINDS = 1024


def configure_logging(level: str) -> None:
    """Log to stderr, from ``level`` up."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(LineFilter())
    handler.setFormatter(PrintableFormatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # The model libraries' own bars would fight with ours over the terminal.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


class PrintableFormatter(logging.Formatter):
    """One line for each record, and tracebacks below it; nothing in either that a terminal acts upon."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = printable_line(record.message, MAX_LINE)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:
        return printable(super().formatException(ei))


@attrs.define
class _LinesOfAKind:
    bucket: TokenBucket
    left_out: int = 0


class LineLimit:
    """How many lines of each kind are shown, whoever causes them. A plain object."""

    def __init__(self, *, burst: int = BURST, per_minute: float = PER_MINUTE) -> None:
        self._burst = burst
        self._rate = per_minute / 60
        self._kinds: OrderedDict[object, _LinesOfAKind] = OrderedDict()

    def take(self, kind: object, now: float) -> int | None:
        """How many lines of this ``kind`` were left out since the last, or None to leave out this one."""
        lines = self._kinds.pop(kind, None) or _LinesOfAKind(TokenBucket(self._rate, self._burst))
        self._kinds[kind] = lines
        if len(self._kinds) > _MAX_KINDS:
            self._kinds.popitem(last=False)
        if not lines.bucket.take(now):
            lines.left_out += 1
            return None
        left_out, lines.left_out = lines.left_out, 0
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
