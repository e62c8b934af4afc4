"""What all commands have in common: their output, their log, and how an error ends them."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from traceback import format_exception
from types import TracebackType
from typing import Any

import click

from swarmcore.cli.logs import configure_logging
from swarmcore.cli.option_kinds import choice, flag
from swarmcore.cli.output import Output
from swarmcore.errors import InputError, SwarmError
from swarmcore.printable import printable, printable_line

MAX_ERROR = 4000
"""Characters that are shown of one error."""


class Failure(click.ClickException):
    """A `SwarmError` on its way out: one line on stderr, exit status 1."""

    def __init__(self, error: SwarmError) -> None:
        super().__init__(one_line(error))

    def show(self, file: Any = None) -> None:
        click.echo(f"error: {printable(self.message)}", err=True)


class InputFailure(Failure):
    """An `InputError` on its way out: exit status 2, as for click's own usage errors."""

    exit_code = 2


def one_line(error: SwarmError) -> str:
    """The message without line breaks, whatever library it began in."""
    return printable_line(str(error), MAX_ERROR)


def standard(command: Callable[..., Any]) -> Callable[..., None]:
    """Give a command ``--json``, ``--log-level`` and ``--debug``; it is called with an `Output` first.

    A `SwarmError` becomes one line on stderr (and an ``error`` event); with ``--debug`` it is a traceback.
    """

    @flag("--json", "json_lines", help="Print one JSON object a line, for programs.")
    @choice(
        "--log-level",
        "debug",
        "info",
        "warning",
        "error",
        default="warning",
        help="What is logged to stderr.",
    )
    @flag("--debug", help="Show the traceback of an error.")
    @functools.wraps(command)
    def wrapped(json_lines: bool, log_level: str, debug: bool, **options: Any) -> None:
        output = Output(json_lines=json_lines)
        configure_logging(log_level)
        sys.excepthook = _show_traceback
        try:
            command(output, **options)
        except SwarmError as exc:
            output.event("error", error=exc.wire_tag, message=str(exc), details=exc.details)
            if debug:
                raise
            raise (InputFailure if isinstance(exc, InputError) else Failure)(exc) from exc

    return wrapped


def _show_traceback(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """What Python shows of an exception that nobody handles, printable."""
    click.echo(printable("".join(format_exception(kind, error, traceback))), err=True, nl=False)


def set_thread_environment(threads: int | None) -> None:
    """Tell OpenMP, which reads this when torch is imported and never again, how many threads to use.

    Idle threads sleep instead of spinning: else they take the cores from the event loop and from other
    processes on the machine.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if threads is not None and threads > 0:
        os.environ["OMP_NUM_THREADS"] = str(threads)
