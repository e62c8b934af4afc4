"""``swarmcore serve``: hold blocks of a model and serve them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal

import click

from swarmcore.cli import interrupt
from swarmcore.cli.head import head_options
from swarmcore.cli.listening import network_config
from swarmcore.cli.options import network_options, own_identity, set_thread_environment, standard
from swarmcore.cli.output import Output
from swarmcore.cli.reached import Reached, say_what_next
from swarmcore.cli.values import parse_bytes, parse_named_paths
from swarmcore.errors import InputError
from swarmcore.resources.limits import raise_descriptor_limit
from swarmcore.types import Span

if TYPE_CHECKING:
    from swarmcore.head.queue import GenerationLimits
    from swarmcore.placement.capacity import CapacityPlan
    from swarmcore.server.block_server import BlockServer


@click.command()
@click.option(
    "--model", required=True, metavar="MODEL", help="Hub id, folder with safetensors, or GGUF file."
)
@click.option("--revision", metavar="NAME", help="Branch, tag or commit of a hub model.")
@click.option(
    "--blocks",
    metavar="START:END",
    help="Blocks to hold, the end excluded, such as 0:10. [default: those that the swarm serves worst]",
)
@click.option(
    "--num-blocks", type=int, metavar="N", help="How many blocks to hold. [default: as many as fit]"
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Type of weights and computation; auto is the checkpoint's own.",
)
@click.option(
    "--executor",
    default="torch",
    show_default=True,
    metavar="NAME",
    help="What computes the blocks: torch, or one that a plug-in brings.",
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
@click.option(
    "--threads", type=int, metavar="N", help="Compute threads. [default: the fastest number, measured]"
)
@click.option(
    "--throughput",
    default="auto",
    show_default=True,
    metavar="TOKENS_PER_S",
    help="What it carries through its blocks; auto measures it at the first start, measure does anew.",
)
@click.option(
    "--rebalance",
    type=float,
    metavar="SECONDS",
    help="How often, on average, to look whether other blocks need this server more; 0 is never. "
    "[default: 60, never with --blocks]",
)
@click.option("--no-rebalance", is_flag=True, help="Keep the same blocks, whatever happens.")
@click.option(
    "--balance-quality",
    type=float,
    default=0.75,
    show_default=True,
    metavar="SHARE",
    help="Move only in a swarm that runs below this share of what moves could give.",
)
@click.option(
    "--drain",
    type=float,
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="How long sessions get to move elsewhere when it is stopped; a second Ctrl-C stops it at once.",
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME=PATH",
    help="Serve the adapter in this folder, in PEFT's format, to those who ask for NAME. May be repeated.",
)
@click.option(
    "--adapter-budget",
    default="256M",
    show_default=True,
    metavar="BYTES",
    help="Memory for adapters that clients bring; 0 takes none. With K, M or G for short.",
)
@click.option(
    "--activation-budget",
    metavar="BYTES",
    help="Memory for activations of forward and backward passes: of those under way, and kept in between; 0 "
    "keeps none. [default: a fifth of the free memory]",
)
@click.option(
    "--max-pass-tokens",
    type=int,
    default=8192,
    show_default=True,
    metavar="N",
    help="Most tokens of a batch that is run forward or back for fine-tuning; 0 runs none.",
)
@click.option("--name", "public_name", default="", metavar="TEXT", help="Name shown to others in the status.")
@head_options
@network_options
@standard
def serve(
    output: Output,
    model: str,
    revision: str | None,
    blocks: str | None,
    num_blocks: int | None,
    dtype: str,
    executor: str,
    device: str,
    cache_tokens: int | None,
    max_batch_tokens: int,
    threads: int | None,
    throughput: str,
    rebalance: float | None,
    no_rebalance: bool,
    balance_quality: float,
    drain: float,
    adapters: tuple[str, ...],
    adapter_budget: str,
    activation_budget: str | None,
    max_pass_tokens: int,
    public_name: str,
    head: GenerationLimits | None,
    exit_with_stdin: bool,
    identity_file: str | None,
    new_identity: bool,
    **network: Any,
) -> None:
    """Hold blocks of a model and serve them until Ctrl-C.

    Prints its addresses when online: give any of them to other servers and to clients as --bootstrap.
    """
    if blocks is not None and num_blocks is not None:
        raise InputError("--blocks says how many blocks there are; leave out --num-blocks")
    set_thread_environment(threads)
    raise_descriptor_limit()

    from swarmcore.server.config import ServerConfig
    from swarmcore.serving import run_server

    config = ServerConfig(
        model=model,
        revision=revision,
        span=Span.parse(blocks) if blocks is not None else None,
        num_blocks=num_blocks,
        dtype=dtype,
        executor=executor,
        device=device,
        cache_tokens=cache_tokens,
        max_batch_tokens=max_batch_tokens,
        threads=threads,
        throughput=_parse_throughput(throughput),
        rebalance=0.0 if no_rebalance else rebalance,
        balance_quality=balance_quality,
        drain=drain,
        adapters=parse_named_paths("--adapter", adapters),
        adapter_budget=parse_bytes("--adapter-budget", adapter_budget),
        activation_budget=(
            parse_bytes("--activation-budget", activation_budget) if activation_budget is not None else None
        ),
        max_pass_tokens=max_pass_tokens,
        public_name=public_name,
    )

    identity = own_identity(output, identity_file, new_identity, public_name)
    network_settings = network_config(identity.peer, **network)

    grace = interrupt.GRACE
    reached = Reached(output)

    def on_plan(plan: CapacityPlan) -> None:
        for reason in plan.reasons:
            output.remark(reason)
        output.event("plan", blocks=plan.blocks, reasons=plan.reasons)

    def on_online(server: BlockServer) -> None:
        nonlocal grace
        grace = config.drain + interrupt.GRACE
        _report_online(output, server)
        reached.begin(server.info.addresses)
        talk = "chat --thin" if head is not None else "chat"
        say_what_next(output, server.info.addresses, model=model, chat=talk)

    def on_leaving(server: BlockServer) -> None:
        sessions = server.inference.sessions
        if sessions:
            output.remark(
                f"leaving: {sessions} session{'s have' if sessions > 1 else ' has'} "
                f"{config.drain:.0f} s to move elsewhere; Ctrl-C ends it at once"
            )
        else:
            output.remark("leaving the swarm")
        output.event("leaving", sessions=sessions)

    with output.progress() as progress:
        interrupt.run(
            run_server(
                config,
                network_settings,
                identity,
                head=head,
                progress=progress,
                on_plan=on_plan,
                on_online=on_online,
                on_addresses=reached.change,
                on_leaving=on_leaving,
            ),
            interrupted_status=0,
            exit_with_stdin=exit_with_stdin,
            grace=lambda: grace,
        )


def _parse_throughput(text: str) -> float | Literal["auto", "measure"]:
    if text == "auto":
        return "auto"
    if text == "measure":
        return "measure"
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--throughput {text!r} is neither a number, nor auto, nor measure") from None


def _report_online(output: Output, server: BlockServer) -> None:
    info = server.info
    assert info.model is not None
    assert info.span is not None
    output.remark(f"speed: {server.speed.describe(len(info.span))}")
    output.remark(
        f"online: blocks {info.span} of {info.model.blocks} of {info.model.name} in {info.dtype}, "
        f"cache for {info.cache_tokens} tokens, at"
    )
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
        throughput=info.throughput,
    )
