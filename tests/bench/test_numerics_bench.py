"""The comparison of numerics: what is equal has no difference, what is mixed is named, and rounding shows."""

from __future__ import annotations

from pathlib import Path

import pytest
from byte_tokenizer import byte_tokenizer
from tiny_models import save_random_model, tiny_config

from swarmcore.bench.numerics import differences


async def test_what_ways_to_compute_differ_by(tmp_path: Path) -> None:
    config = tiny_config("llama")
    config.vocab_size = 257
    save_random_model(config, tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    same, mixed = "torch dtype=float32 rows=8", "torch dtype=float32 + torch dtype=bfloat16"
    first, again, both = await differences(("torch dtype=float32", same, mixed), str(tmp_path), tokens=40)
    assert first.numerics == again.numerics == ("torch/f32",)
    assert both.numerics == ("torch/f32", "torch/bf16")
    assert first.same == again.same == 1
    assert again.divergence == pytest.approx(0, abs=1e-6)
    assert again.perplexity == pytest.approx(first.perplexity, rel=1e-4)
    assert 1e-6 < both.divergence < 1e-2
