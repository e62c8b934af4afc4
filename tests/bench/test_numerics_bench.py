"""The comparison of numerics: what is equal has no difference, what is mixed is named, and rounding shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from byte_tokenizer import byte_tokenizer
from click.testing import CliRunner
from tiny_models import save_random_model, tiny_config

from swarmcore.bench.numerics import differences
from swarmcore.cli import main
from swarmcore.errors import InputError


async def test_what_ways_to_compute_differ_by(tmp_path: Path) -> None:
    config = tiny_config("llama")
    config.vocab_size = 257
    save_random_model(config, tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    same, mixed = "torch dtype=float32 rows=8", "torch dtype=float32 + torch dtype=bfloat16"
    first, again, both = await differences(str(tmp_path), ("torch dtype=float32", same, mixed), tokens=40)
    assert first.numerics == again.numerics == ("torch/f32",)
    assert both.numerics == ("torch/f32", "torch/bf16")
    assert first.same == again.same == 1
    assert again.divergence == pytest.approx(0, abs=1e-6)
    assert again.perplexity == pytest.approx(first.perplexity, rel=1e-4)
    assert 1e-6 < both.divergence < 1e-2


@pytest.mark.parametrize(
    "way", ["", "torch +", "torch speed=3", "torch weights", "torch rows=none", "torch rows=0"]
)
async def test_a_way_that_is_none_is_refused(way: str) -> None:
    with pytest.raises(InputError, match="is no way to compute"):
        await differences("nowhere", ("torch", way))


def test_the_command_line_compares_ways(tmp_path: Path) -> None:
    config = tiny_config("llama")
    config.vocab_size = 257
    save_random_model(config, tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    ways = ["torch dtype=float32", "torch dtype=float32 cache_dtype=int8"]
    arguments = ["bench", "numerics", *ways, "--model", str(tmp_path), "--tokens", "20"]
    as_json, as_table = (CliRunner().invoke(main, arguments + more) for more in (["--json"], []))
    assert as_json.exit_code == as_table.exit_code == 0, as_json.output + as_table.output
    event = json.loads(as_json.stdout.splitlines()[-1])
    assert [each["way"] for each in event["results"]] == ways
    assert [each["numerics"] for each in event["results"]] == [["torch/f32"], ["torch/f32/f32/int8"]]
    assert "perplexity" in as_table.output
