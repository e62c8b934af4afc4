"""``swarmcore bootstrap``: a peer that others join through, without blocks."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from swarmcore.cli import interrupt
from swarmcore.cli.head import head_options
from swarmcore.cli.listening import network_config
from swarmcore.cli.options import network_options, own_identity, set_thread_environment, standard
from swarmcore.cli.output import Output
from swarmcore.cli.reached import Reached, say_what_next
from swarmcore.errors import InputError
from swarmcore.resources.limits import raise_descriptor_limit

if TYPE_CHECKING:
    from swarmcore.head.queue import GenerationLimits
    from swarmcore.types import ServerInfo


@click.command()
@click.option("--name", "public_name", default="", metavar="TEXT", help="Name shown to others in the status.")
@click.option("--model", metavar="MODEL", help="With --serve-head: hub id, folder, or GGUF file.")
@click.option("--revision", metavar="NAME", help="Branch, tag or commit of a hub model.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Type of embeddings and head; auto is the checkpoint's own.",
)
@click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Compute threads of the head.")
@head_options
@network_options
@standard
def bootstrap(
    output: Output,
    public_name: str,
    model: str | None,
    revision: str | None,
    dtype: str,
    threads: int | None,
    head: GenerationLimits | None,
    exit_with_stdin: bool,
    identity_file: str | None,
    new_identity: bool,
    **network: Any,
) -> None:
    """Run a meeting point without blocks of its own, until Ctrl-C.

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
    identity = own_identity(output, identity_file, new_identity, public_name)
    reached = Reached(output)

    def on_online(info: ServerInfo) -> None:
        output.remark("online, at")
        reached.begin(info.addresses)
        talk = "chat --thin" if head is not None else ""
        say_what_next(output, info.addresses, model=model or "", chat=talk)
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
                on_addresses=reached.change,
            ),
            interrupted_status=0,
            exit_with_stdin=exit_with_stdin,
        )
