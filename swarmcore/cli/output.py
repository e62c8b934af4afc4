"""What a command prints: for people on a terminal, or one JSON object a line for programs."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, TextIO

import click
import msgspec

from swarmcore.cli.progress import BYTES, JsonProgress, PlainProgress, ProgressReport
from swarmcore.printable import printable, printable_json

if TYPE_CHECKING:
    from rich.console import RenderableType


def can_redraw(stream: TextIO) -> bool:
    """Whether ``stream`` is a terminal on which lines can be taken back."""
    return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


class Output:
    """Results go to stdout, remarks and progress to stderr; with ``json_lines`` only events, to stdout.

    Much of it was said by strangers: it is made `printable` here, whoever said it.
    """

    def __init__(self, *, json_lines: bool = False) -> None:
        self.json_lines = json_lines

    def result(self, text: str) -> None:
        """What the command was run for, as a person reads it; nothing in JSON mode."""
        if not self.json_lines:
            click.echo(printable(text))

    def piece(self, text: str) -> None:
        """A part of a streamed text, shown at once; a ``piece`` event in JSON mode."""
        if self.json_lines:
            self.event("piece", text=text)
        else:
            click.echo(printable(text), nl=False)

    def remark(self, text: str) -> None:
        """By the way, for a person; nothing in JSON mode."""
        if not self.json_lines:
            click.echo(printable(text), err=True)

    def event(self, name: str, **fields: Any) -> None:
        """One JSON line with ``"event": name``, flushed; nothing for people."""
        if self.json_lines:
            # The standard library would write an infinite time to wait as Infinity, which is not JSON.
            encoded = msgspec.json.encode({"event": name, **fields}, enc_hook=str)
            click.echo(printable_json(encoded.decode()).encode())

    def progress(self, unit: str = BYTES) -> AbstractContextManager[ProgressReport]:
        """A progress report, shown while the context lasts."""
        if self.json_lines:
            return JsonProgress(self.event)
        if can_redraw(sys.stderr):
            from swarmcore.cli.terminal import TerminalProgress

            return TerminalProgress(unit)
        return PlainProgress(self.remark, unit)

    def table(self, table: RenderableType) -> None:
        """What rich draws, to stdout; nothing in JSON mode."""
        if not self.json_lines:
            from swarmcore.cli.terminal import PrintableConsole

            PrintableConsole().print(table)
