"""``swarmcore identity``: the peer id of a key file, for allow-lists and addresses; a peer's own identity."""

from __future__ import annotations

from pathlib import Path

import click

from swarmcore.cli.command import standard
from swarmcore.cli.option_kinds import option
from swarmcore.cli.options import ProcessOptions
from swarmcore.cli.output import Output
from swarmcore.errors import IdentityFileError
from swarmcore.identity import Identity
from swarmcore.identity_files import LockedIdentity, identity_path, stored_identity


@click.command()
@click.argument("file", required=False)
@option("--name", default="", metavar="TEXT", help="The identity that is kept for peers of this --name.")
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


def own_identity(output: Output, process: ProcessOptions, name: str) -> Identity:
    """Whom a listening peer is: the identity in a file, a new one, or the one kept for its ``name``, and a
    new one where none can be kept. No other process gets it before this command has ended.

    Raise `IdentityInUseError` when another process uses the file, `IdentityFileError` when it is no key.
    """
    file = process.identity_file
    if file is None and process.new_identity:
        return Identity.generate()
    try:
        # Who was killed a moment ago, and is started anew, may not be quite gone yet.
        held = LockedIdentity(file, patience=3.0) if file is not None else stored_identity(name)
    except IdentityFileError as exc:
        if file is not None:
            raise
        output.remark(f"a new identity, which is not kept: {exc}")
        return Identity.generate()
    click.get_current_context().call_on_close(held.release)
    if file is None:
        output.remark(f"this peer is {held.identity.peer}, kept in {held.path}")
    return held.identity
