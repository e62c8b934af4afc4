from __future__ import annotations

import json

from click.testing import CliRunner

from swarmcore.cli import main


def test_the_bench_plans_after_every_kind_of_change() -> None:
    command = "bench routing --servers 40 --blocks 12 --longest-span 6 --rounds 3 --json"
    ended = CliRunner().invoke(main, command.split())
    assert ended.exit_code == 0, ended.output
    results = json.loads(ended.stdout.splitlines()[-1])["results"]
    assert len(results) == 8
    assert all(result["hops"] >= 1 for result in results)
