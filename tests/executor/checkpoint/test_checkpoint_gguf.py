"""The real small model: converted from its GGUF once for this machine."""

from __future__ import annotations

from pathlib import Path


def test_a_converted_model_has_config_tokenizer_and_chat_template(smollm2_folder: Path) -> None:
    from transformers import AutoTokenizer

    assert (smollm2_folder / "config.json").is_file()
    assert AutoTokenizer.from_pretrained(smollm2_folder).chat_template
