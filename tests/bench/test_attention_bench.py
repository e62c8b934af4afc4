"""The comparison of attention by products with the fused kernel, and how the command line asks for it."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner
from tiny_models import save_random_model, tiny_config

from swarmcore.bench.attention import attention_table, compare
from swarmcore.cli import main


async def test_each_case_is_computed_both_ways(tmp_path: Path) -> None:
    save_random_model(tiny_config("llama"), tmp_path)
    cases = (1, 70, 1), (2, 3, 2)
    results = await compare(str(tmp_path), rounds=1, cases=cases)
    assert [(each.sequences, each.cached, each.new) for each in results] == list(cases)
    assert all(min(each.fused, each.seconds, each.ratio) > 0 for each in results)
    assert attention_table(results).row_count == 2


def test_a_cache_dtype_that_is_none_is_refused(tmp_path: Path) -> None:
    save_random_model(tiny_config("llama"), tmp_path)
    done = CliRunner().invoke(main, ["bench", "attention", "--model", str(tmp_path), "--cache-dtype", "int3"])
    assert done.exit_code == 2
    assert "cache dtype 'int3' is not known" in done.output
