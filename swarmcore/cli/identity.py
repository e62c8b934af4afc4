"""``swarmcore identity``: the peer id of a key file, for allow-lists and addresses."""

from __future__ import annotations

from pathlib import Path

import click

from swarmcore.cli.command import standard
from swarmcore.cli.output import Output
from swarmcore.identity import Identity
from swarmcore.identity_files import identity_path


@click.command()
@click.argument("file", required=False)
@click.option(
    "--name", default="", metavar="TEXT", help="The identity that is kept for peers of this --name."
)
@standard
def identity(output: Output, file: str | None, name: str) -> None:
    """Print the peer id of the key in FILE, or of the one that `serve` and `bootstrap` keep by default.

    It is created on first use: the id is known before the peer is started.
    """
    path = Path(file) if file is not None else identity_path(name)
    found = Identity.load_or_create(path)
    output.remark(str(path))
    output.result(found.peer)
    output.event("identity", peer=found.peer, file=str(path))
