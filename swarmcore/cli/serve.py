"""``swarmcore serve``: hold blocks of a model and serve them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from swarmcore.cli import interrupt
from swarmcore.cli.listening import network_config
from swarmcore.cli.options import load_identity, network_options, set_thread_environment, standard
from swarmcore.cli.output import Output
from swarmcore.types import Span

if TYPE_CHECKING:
    from swarmcore.server.block_server import BlockServer


@click.command()
@click.option(
    "--model", required=True, metavar="MODEL", help="Hub id, folder with safetensors, or GGUF file."
)
@click.option("--revision", metavar="NAME", help="Branch, tag or commit of a hub model.")
@click.option(
    "--blocks",
    metavar="START:END",
    help="Blocks to hold, the end excluded, such as 0:10. [default: all]",
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Type of weights and computation; auto is the checkpoint's own.",
)
@click.option("--device", default="cpu", show_default=True, metavar="DEVICE", help="cpu, cuda or cuda:N.")
@click.option(
    "--cache-tokens",
    type=int,
    metavar="N",
    help="Attention cache, in tokens of all sessions together. [default: a quarter of the free memory]",
)
@click.option(
    "--max-batch-tokens",
    type=int,
    default=512,
    show_default=True,
    metavar="N",
    help="Most tokens computed in one pass; more is faster for prompts, slower for those who decode.",
)
@click.option("--threads", type=int, metavar="N", help="Compute threads. [default: torch's choice]")
@click.option("--name", "public_name", default="", metavar="TEXT", help="Name shown to others in the status.")
@network_options
@standard
def serve(
    output: Output,
    model: str,
    revision: str | None,
    blocks: str | None,
    dtype: str,
    device: str,
    cache_tokens: int | None,
    max_batch_tokens: int,
    threads: int | None,
    public_name: str,
    exit_with_stdin: bool,
    identity_file: str | None,
    **network: Any,
) -> None:
    """Hold blocks of a model and serve them until Ctrl-C.

    Prints its addresses when online: give any of them to other servers and to clients as --bootstrap.
    """
    set_thread_environment(threads)

    from swarmcore.server.config import ServerConfig
    from swarmcore.server.run import run_server

    config = ServerConfig(
        model=model,
        revision=revision,
        span=Span.parse(blocks) if blocks is not None else None,
        dtype=dtype,
        device=device,
        cache_tokens=cache_tokens,
        max_batch_tokens=max_batch_tokens,
        threads=threads,
        public_name=public_name,
    )

    identity = load_identity(identity_file)
    network_settings = network_config(identity.peer, **network)

    def on_online(server: BlockServer) -> None:
        _report_online(output, server)

    with output.progress() as progress:
        interrupt.run(
            run_server(config, network_settings, identity, progress=progress, on_online=on_online),
            interrupted_status=0,
            exit_with_stdin=exit_with_stdin,
        )


def _report_online(output: Output, server: BlockServer) -> None:
    info = server.info
    assert info.model is not None
    assert info.span is not None
    output.remark(
        f"online: blocks {info.span} of {info.model.blocks} of {info.model.name} in {info.dtype}, "
        f"cache for {info.cache_tokens} tokens. Others join with --bootstrap and this address:"
    )
    for address in info.addresses:
        output.result(address)
    output.event(
        "online",
        peer=info.peer,
        addresses=info.addresses,
        pid=os.getpid(),
        model=info.model.name,
        fingerprint=info.model.fingerprint,
        blocks=str(info.span),
        blocks_in_all=info.model.blocks,
        dtype=info.dtype,
        cache_tokens=info.cache_tokens,
    )
