"""The comparison of weights on a small model: every kind is measured, and int8 costs next to nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from byte_tokenizer import byte_tokenizer
from click.testing import CliRunner
from tiny_models import save_random_model, tiny_config

from swarmcore.bench.weights import KINDS, quality, speed
from swarmcore.checkpoint import open_checkpoint
from swarmcore.cli import main
from swarmcore.types import Span


def test_every_kind_is_measured(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    config = tiny_config("llama")
    config.vocab_size = 257
    save_random_model(config, tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    times = speed(checkpoint, Span(1, 2), turns=2)
    assert all(set(each) == set(KINDS) and min(each.values()) > 0 for each in times.values())
    found = quality(checkpoint, tokens=40, rows=20)
    assert set(found) == {("bf16", False), *((kind, by) for kind in KINDS[1:] for by in (False, True))}
    assert found["int8", False] == pytest.approx(found["bf16", False], rel=0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_the_command_line_measures_memory(tmp_path: Path) -> None:
    save_random_model(tiny_config("llama"), tmp_path)
    arguments = ["weights", "memory", "--kind", "bf16", "--num-blocks", "1", "--model", str(tmp_path)]
    done = CliRunner().invoke(main, ["bench", *arguments, "--json"])
    assert done.exit_code == 0, done.output
    use = json.loads(done.stdout.splitlines()[-1])["results"]["bf16"]
    assert min(use.values()) > 50 * 2**20 and max(use.values()) == use["most"]
