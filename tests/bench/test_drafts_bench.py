"""What drafters foresee of a text: all of it where they are the model itself, what is repeated by lookup."""

from __future__ import annotations

from pathlib import Path

from byte_tokenizer import byte_tokenizer
from tiny_models import save_random_model, tiny_config

from swarmcore.bench.drafts import LENGTHS, foreseen


def test_a_model_foresees_its_own_text(tmp_path: Path) -> None:
    config = tiny_config("llama")
    config.vocab_size = 257
    save_random_model(config, tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    found = foreseen(str(tmp_path), str(tmp_path), tokens=19, prompts={"greeting": "Hello"})
    assert [(each.drafter, each.length) for each in found] == [
        (drafter, length) for drafter in ("suffix", "model") for length in LENGTHS
    ]
    assert all(each.accepted == 1 for each in found if each.drafter == "model")
    assert all(1 <= each.tokens_per_step <= each.length + 1 for each in found)
