"""``swarmcore sim``: the whole system on a simulated clock and network."""

from __future__ import annotations

import shlex

import click

from swarmcore.cli.command import standard
from swarmcore.cli.interrupt import Interrupted
from swarmcore.cli.option_kinds import count, option
from swarmcore.cli.output import Output


@click.command()
@click.argument("scenario")
@count(
    "--seed",
    min=0,
    default=0,
    help="All randomness follows from it: the same seed gives the same run, message for message.",
)
@option("--plot", "plot_file", metavar="FILE", help="Draw the result into FILE: .png, .svg or .pdf.")
@standard
def sim(output: Output, scenario: str, seed: int, plot_file: str | None) -> None:
    """Simulate SCENARIO: a TOML file, or the name of one that comes with swarmcore.

    \b
    failures         the paper's table of failure rates, this system beside restarts and no caches
    failures-paper   the same, with servers as fast as the paper's
    load             1,000 servers, 200 clients, an hour; a third of the servers dies at once
    balance          the paper's ablation of load balancing, under churn
    training         batches shared out by speed, failures, two chains beside one, codecs by link
    """
    from swarmcore.sim.kinds import KINDS
    from swarmcore.sim.plot import check_plot_file, save_plot
    from swarmcore.sim.scenario import load_scenario

    loaded = load_scenario(scenario, KINDS)
    if plot_file is not None:
        check_plot_file(plot_file)
    try:
        with output.progress(loaded.unit) as progress:
            report = loaded.simulate(seed, progress)
    except KeyboardInterrupt:
        raise Interrupted(130) from None
    replay = f"swarmcore sim {shlex.quote(scenario)} --seed {seed}"
    output.event(
        "simulation",
        scenario=scenario,
        seed=seed,
        trace=report.trace,
        messages=report.messages,
        goals=report.goals,
        problems=report.problems,
        replay=replay,
        data=report.data,
    )
    for table in report.tables:
        output.table(table)
    for goal, reached in report.goals.items():
        output.result(f"{'reached' if reached else 'MISSED'}: {goal}")
    output.result(f"trace {report.trace} of {report.messages} messages, seed {seed}")
    if plot_file is not None and report.plot is not None:
        save_plot(report.plot, plot_file)
        output.remark(f"plot written to {plot_file}")
    if report.problems:
        for problem in report.problems:
            output.remark(f"problem: {problem}")
        output.remark(f"again with: {replay}")
        raise click.exceptions.Exit(1)
