"""``swarmcore bootstrap``: a peer that others join through, without blocks."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from swarmcore.cli import interrupt
from swarmcore.cli.listening import network_config
from swarmcore.cli.options import load_identity, network_options, standard
from swarmcore.cli.output import Output
from swarmcore.cli.reached import Reached

if TYPE_CHECKING:
    from swarmcore.types import ServerInfo


@click.command()
@click.option("--name", "public_name", default="", metavar="TEXT", help="Name shown to others in the status.")
@network_options
@standard
def bootstrap(
    output: Output, public_name: str, exit_with_stdin: bool, identity_file: str | None, **network: Any
) -> None:
    """Run a meeting point without blocks of its own, until Ctrl-C.

    Prints its addresses: give them to servers and clients as --bootstrap. Every server can be joined through
    just as well; a swarm goes on when all the peers that it began with are gone.
    """
    from swarmcore.server.run import run_bootstrap

    identity = load_identity(identity_file)
    reached = Reached(output)

    def on_online(info: ServerInfo) -> None:
        output.remark("online: others join with --bootstrap and this address:")
        reached.begin(info.addresses)
        output.event("online", peer=info.peer, addresses=info.addresses, pid=os.getpid())

    interrupt.run(
        run_bootstrap(
            network_config(identity.peer, **network),
            identity,
            public_name=public_name,
            on_online=on_online,
            on_addresses=reached.change,
        ),
        interrupted_status=0,
        exit_with_stdin=exit_with_stdin,
    )
