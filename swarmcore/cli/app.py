"""The command group; each command is a module of its own and imports what it needs when it runs."""

from __future__ import annotations

import click

from swarmcore.cli.bench import bench
from swarmcore.cli.bootstrap import bootstrap
from swarmcore.cli.chat import chat
from swarmcore.cli.convert import convert
from swarmcore.cli.generate import generate
from swarmcore.cli.serve import serve
from swarmcore.cli.status import status


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="swarmcore", message="swarmcore %(version)s")
def main() -> None:
    """Run language models too big for one machine on many machines over the Internet."""


for command in (serve, bootstrap, chat, generate, status, convert, bench):
    main.add_command(command)
