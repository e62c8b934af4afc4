"""``swarmcore bootstrap``: a peer that others join through, without blocks."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from swarmcore.cli import interrupt
from swarmcore.cli.command import set_thread_environment, standard
from swarmcore.cli.identity import own_identity
from swarmcore.cli.option_kinds import count, option
from swarmcore.cli.options import (
    ProcessOptions,
    dtype,
    generation_server_options,
    network_options,
    process_options,
    public_name,
    revision,
)
from swarmcore.cli.output import Output
from swarmcore.cli.peer import AddressReport, network_config, say_what_next
from swarmcore.errors import InputError
from swarmcore.resources.limits import raise_descriptor_limit

if TYPE_CHECKING:
    from swarmcore.head.queue import GenerationLimits
    from swarmcore.types import ServerInfo


@click.command()
@public_name
@option("--model", metavar="MODEL", help="With --serve-head: hub id, folder, or GGUF file.")
@revision
@dtype("embeddings and head")
@count("--threads", help="Compute threads of the head.")
@generation_server_options
@network_options
@process_options
@standard
def bootstrap(
    output: Output,
    public_name: str,
    model: str | None,
    revision: str | None,
    dtype: str,
    threads: int | None,
    head: GenerationLimits | None,
    network: dict[str, Any],
    process: ProcessOptions,
) -> None:
    """Run a bootstrap peer without blocks of its own, until Ctrl-C.

    Prints its addresses: give them to servers and clients as --bootstrap. Every server can be joined through
    just as well; a swarm goes on when all the peers that it began with are gone. With --serve-head it is a
    gateway for clients without torch: it makes texts of MODEL, whose blocks others hold.
    """
    if (head is None) != (model is None):
        raise InputError("--serve-head and --model go together: the model is the one that texts are made of")
    set_thread_environment(threads)
    raise_descriptor_limit()

    from swarmcore.serving import run_bootstrap

    gateway = None
    if head is not None and model is not None:
        from swarmcore.head.model import GenerationServerConfig

        gateway = GenerationServerConfig(
            model=model, revision=revision, dtype=dtype, threads=threads, limits=head
        )
    identity = own_identity(output, process, public_name)
    addresses = AddressReport(output)

    def on_online(info: ServerInfo) -> None:
        output.remark("online, at")
        addresses.online(info.addresses)
        chat = "chat --thin" if head is not None else ""
        say_what_next(output, info.addresses, model=model or "", chat=chat)
        output.event("online", peer=info.peer, addresses=info.addresses, pid=os.getpid())

    with output.progress() as progress:
        interrupt.run(
            run_bootstrap(
                network_config(identity.peer, **network),
                identity,
                public_name=public_name,
                head=gateway,
                progress=progress,
                on_online=on_online,
                on_addresses=addresses.changed,
            ),
            interrupted_status=0,
            exit_with_stdin=process.exit_with_stdin,
        )
