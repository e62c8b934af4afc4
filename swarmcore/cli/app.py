"""The command group; each command is a module of its own and imports what it needs when it runs."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from pathlib import Path
from typing import Any

import click

from swarmcore.cli.bench import bench
from swarmcore.cli.bootstrap import bootstrap
from swarmcore.cli.chat import chat
from swarmcore.cli.command import Failure
from swarmcore.cli.convert import convert
from swarmcore.cli.generate import generate
from swarmcore.cli.identity import identity
from swarmcore.cli.interrupt import Interrupted
from swarmcore.cli.output import Output
from swarmcore.cli.serve import serve
from swarmcore.cli.sim import sim
from swarmcore.cli.status import status
from swarmcore.distribution import NAME
from swarmcore.errors import InputError, StorageError
from swarmcore.imports import keep_imports

_ARGUMENTS = "swarmcore.arguments"


class CommandGroup(click.Group):
    """Ends an interrupted command at once: all is closed, and Python takes a second to tear torch down.

    Characters that the terminal's encoding lacks are shown as ``?``; a standard stream that is closed is
    ``/dev/null``. With ``--json`` a command line that click refuses is an ``error`` event, too.
    """

    def main(self, *args: Any, **options: Any) -> Any:
        # In this order: each gets its own number, which no socket then has.
        for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
            if getattr(sys, name) is None:
                setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                with contextlib.suppress(OSError):  # it was a file, and has become a pipe underneath
                    stream.reconfigure(errors="replace")
        try:
            return super().main(*args, **options)
        except OSError as exc:
            if exc.errno != errno.ENOSPC:
                raise
            # What is still to be written, and would fail again at the end, has nowhere to go.
            sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
            where = f" at {exc.filename}" if exc.filename else ""
            Failure(StorageError(f"nothing more can be written{where}: {exc.strerror}")).show()
            sys.exit(Failure.exit_code)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_ARGUMENTS] = tuple(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        keep_imports()
        try:
            return super().invoke(ctx)
        except click.UsageError as exc:
            output = Output(json_lines="--json" in ctx.meta[_ARGUMENTS])
            output.event("error", error=InputError.wire_tag, message=exc.format_message(), details={})
            raise
        except Interrupted as exc:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(exc.exit_code)


@click.group(
    cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(package_name=NAME, message="swarmcore %(version)s")
def main() -> None:
    """Run language models too big for one machine on many machines over the Internet."""


for command in (serve, bootstrap, chat, generate, status, identity, convert, bench, sim):
    main.add_command(command)
