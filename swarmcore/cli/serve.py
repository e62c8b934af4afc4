"""``swarmcore serve``: hold blocks of a model and serve them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import click

from swarmcore.cli import interrupt
from swarmcore.cli.command import set_thread_environment, standard
from swarmcore.cli.identity import own_identity
from swarmcore.cli.option_kinds import flag, option, several
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
from swarmcore.resources.allocator import use_one_arena
from swarmcore.resources.limits import raise_descriptor_limit
from swarmcore.types import Span

if TYPE_CHECKING:
    from swarmcore.head.queue import GenerationLimits
    from swarmcore.placement.capacity import CapacityPlan
    from swarmcore.server.block_server import BlockServer


@click.command()
@option("--model", required=True, metavar="MODEL", help="Hub id, folder with safetensors, or GGUF file.")
@revision
@option(
    "--blocks",
    metavar="START:END",
    help="Blocks to hold, the end excluded, such as 0:10. [default: those that the swarm serves worst]",
)
@option("--num-blocks", type=int, metavar="N", help="How many blocks to hold. [default: as many as fit]")
@dtype("weights and computation")
@option(
    "--executor",
    default="auto",
    metavar="NAME",
    help="What computes the blocks: torch, ggml (llama.cpp, for GGUF), or one that a plug-in brings; auto is "
    "ggml for GGUF where it is installed.",
)
@option(
    "--weights",
    default="auto",
    metavar="KIND",
    help="What the blocks' weights are kept in: bf16, int8, nf4 (needs bitsandbytes), or int4 (plain "
    "rounding, which costs quality); for ggml repacked (decodes some types faster, a copy in memory); auto "
    "is as the checkpoint has them where the executor can.",
)
@option(
    "--cache-dtype",
    default="auto",
    metavar="KIND",
    help="What the attention cache is kept in: int8, for ggml also f16 and f32; auto is what is computed in, "
    "for ggml f16.",
)
@option(
    "--device",
    default="cpu",
    metavar="DEVICE",
    help="cpu, cuda or cuda:N; for ggml cpu or a device of llama.cpp's.",
)
@option(
    "--memory",
    metavar="BYTES",
    help="Most memory for weights, caches and activations, with K, M or G for short. [default: what is free, "
    "less a tenth]",
)
@option(
    "--cache-tokens",
    type=int,
    metavar="N",
    help="Attention cache, in tokens of all sessions together. [default: a quarter of the free memory]",
)
@option(
    "--max-batch-tokens",
    type=int,
    default=512,
    metavar="N",
    help="Most tokens computed in one pass; more is faster for prompts, slower for those who decode.",
)
@option("--threads", type=int, metavar="N", help="Compute threads. [default: the fastest number, measured]")
@option(
    "--throughput",
    default="auto",
    metavar="TOKENS_PER_S",
    help="What it carries through its blocks; auto measures it at the first start, measure does anew.",
)
@option(
    "--rebalance",
    type=float,
    metavar="SECONDS",
    help="How often, on average, to look whether other blocks need this server more; 0 is never. "
    "[default: 60, never with --blocks]",
)
@flag("--no-rebalance", help="Keep the same blocks, whatever happens.")
@option(
    "--balance-quality",
    type=float,
    default=0.75,
    metavar="SHARE",
    help="Move only in a swarm that runs below this share of what moves could give.",
)
@option(
    "--drain",
    type=float,
    default=30.0,
    metavar="SECONDS",
    help="How long sessions get to move elsewhere when it is stopped; a second Ctrl-C stops it at once.",
)
@several(
    "--adapter",
    "adapters",
    metavar="NAME=PATH",
    help="Serve the adapter in this folder, in PEFT's format, to those who ask for NAME. May be repeated.",
)
@option(
    "--adapter-budget",
    default="256M",
    metavar="BYTES",
    help="Memory for adapters that clients bring; 0 takes none. With K, M or G for short.",
)
@option(
    "--activation-budget",
    metavar="BYTES",
    help="Memory for activations of forward and backward passes: of those under way, and kept in between; 0 "
    "keeps none. [default: a fifth of the free memory]",
)
@option(
    "--max-pass-tokens",
    type=int,
    default=8192,
    metavar="N",
    help="Most tokens of a batch that is run forward or back for fine-tuning; 0 runs none.",
)
@flag(
    "--share-prefixes",
    help="Let a client's session begin with what was computed of the same text for another one. For members "
    "who trust each other: names of texts cannot be checked, and times tell what others have asked.",
)
@public_name
@generation_server_options
@network_options
@process_options
@standard
def serve(
    output: Output,
    blocks: str | None,
    memory: str | None,
    throughput: str,
    rebalance: float | None,
    no_rebalance: bool,
    adapters: tuple[str, ...],
    adapter_budget: str,
    activation_budget: str | None,
    head: GenerationLimits | None,
    network: dict[str, Any],
    process: ProcessOptions,
    **settings: Any,
) -> None:
    """Hold blocks of a model and serve them until Ctrl-C.

    Prints its addresses when online: give any of them to other servers and to clients as --bootstrap.
    """
    if blocks is not None and settings["num_blocks"] is not None:
        raise InputError("--blocks says how many blocks there are; leave out --num-blocks")
    set_thread_environment(settings["threads"])
    use_one_arena()
    raise_descriptor_limit()

    from swarmcore.server.config import ServerConfig
    from swarmcore.serving import run_server

    config = ServerConfig(
        span=Span.parse(blocks) if blocks is not None else None,
        memory=parse_bytes("--memory", memory) if memory is not None else None,
        throughput=_parse_throughput(throughput),
        rebalance=0.0 if no_rebalance else rebalance,
        adapters=parse_named_paths("--adapter", adapters),
        adapter_budget=parse_bytes("--adapter-budget", adapter_budget),
        activation_budget=(
            parse_bytes("--activation-budget", activation_budget) if activation_budget is not None else None
        ),
        **settings,
    )
    identity = own_identity(output, process, config.public_name)
    network_settings = network_config(identity.peer, **network)
    grace = interrupt.GRACE
    addresses = AddressReport(output)

    def on_plan(plan: CapacityPlan) -> None:
        for reason in plan.reasons:
            output.remark(reason)
        output.event("plan", blocks=plan.blocks, reasons=plan.reasons)

    def on_online(server: BlockServer) -> None:
        nonlocal grace
        grace = config.drain + interrupt.GRACE
        _report_online(output, server)
        addresses.online(server.info.addresses)
        chat = "chat --thin" if head is not None else "chat"
        say_what_next(output, server.info.addresses, model=config.model, chat=chat)

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
                on_addresses=addresses.changed,
                on_leaving=on_leaving,
            ),
            interrupted_status=0,
            exit_with_stdin=process.exit_with_stdin,
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
        f"online: blocks {info.span} of {info.model.blocks} of {info.model.name} as {info.numerics}, "
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
        numerics=info.numerics,
        capabilities=info.capabilities,
        cache_tokens=info.cache_tokens,
        throughput=info.throughput,
    )


_FACTORS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_BYTES = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]?)(?:i?B)?", re.IGNORECASE)


def parse_bytes(option: str, text: str) -> int:
    """A number of bytes: ``"1048576"``, ``"512M"``, ``"1.5 GiB"``. Raise `InputError`."""
    match = _BYTES.fullmatch(text.strip())
    if match is None:
        raise InputError(f"{option} {text!r} is no number of bytes; expected such as 512M or 2G")
    return int(float(match[1]) * _FACTORS[match[2].upper()])


def parse_named_paths(option: str, values: Sequence[str]) -> dict[str, str]:
    """Paths by their names, from values of the form ``NAME=PATH``. Raise `InputError`."""
    found: dict[str, str] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not equals or not name or not path:
            raise InputError(f"{option} {value!r} is not of the form NAME=PATH")
        if name in found:
            raise InputError(f"{option} names two adapters {name!r}")
        found[name] = path
    return found
