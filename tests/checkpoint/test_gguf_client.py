"""Clients of GGUF models whose blocks are left to llama.cpp: their ends make its logits of its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from ggml_cases import CASES, HEAD, WIDTH, Case
from random_gguf import write_random_gguf
from transformers import AutoTokenizer

from swarmcore.checkpoint import open_checkpoint
from swarmcore.checkpoint.gguf_client import FAMILIES
from swarmcore.client.generation.local_model import LocalParts
from swarmcore.errors import UnsupportedModelError

VOCABULARY = 300


def with_vocabulary(case: Case, folder: Path, **keys: Any) -> Path:
    heads = {name: (VOCABULARY, WIDTH) for name in case.around if name in HEAD}
    return write_random_gguf(
        folder / "model.gguf",
        case.architecture,
        blocks=case.blocks,
        each=case.each,
        around={**case.around, **heads},
        keys={**case.keys, **keys},
        vocabulary=VOCABULARY,
    )


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.architecture in FAMILIES], ids=lambda case: case.architecture
)
@pytest.mark.parametrize("executor", ["torch", "ggml"])
def test_the_ends_are_those_of_llama_cpp(case: Case, executor: str, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="needs the extra ggml")
    from llama_rows import logits_of, rows_of

    path = with_vocabulary(case, tmp_path)
    checkpoint = open_checkpoint(str(path), cache_dir=tmp_path / "cache")
    assert (checkpoint.info.blocks, checkpoint.info.hidden_size) == (case.blocks, WIDTH)
    if executor == "ggml" and "output.bias" in case.around:
        with pytest.raises(UnsupportedModelError, match="has a bias"):
            LocalParts.load(checkpoint, dtype="float32", executor=executor)
        return
    parts = LocalParts.load(checkpoint, dtype="float32", executor=executor)
    text = "hello, hello"
    tokens = AutoTokenizer.from_pretrained(checkpoint.folder)(text)["input_ids"]
    rows = parts.embed(tokens, range(len(tokens))).numpy()
    scale = case.keys.get("embedding_scale", 1.0)
    hidden = rows_of(path, case.blocks - 1, np.float32(rows / scale))
    expected = logits_of(path, tokens)
    found = np.concatenate([parts.logits(row).numpy() for row in torch.from_numpy(hidden).split(1)])
    assert np.abs(found - expected).max() < 0.03 * expected.std()  # embeddings and head are in bfloat16


def test_their_blocks_are_refused(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.architecture == "gpt-oss")
    checkpoint = open_checkpoint(str(with_vocabulary(case, tmp_path)), cache_dir=tmp_path / "cache")
    block = next(name for name in checkpoint.names() if ".layers.1." in name)
    with pytest.raises(UnsupportedModelError, match=r"left to llama\.cpp: .*--executor ggml"):
        checkpoint.read([block])


def test_what_would_change_the_ends_is_refused(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.architecture == "arcee")
    with pytest.raises(UnsupportedModelError, match=r"arcee\.final_logit_softcapping = 30\.0"):
        open_checkpoint(
            str(with_vocabulary(case, tmp_path, final_logit_softcapping=30.0)), cache_dir=tmp_path / "cache"
        )
    other = attrs.evolve(case, around={**case.around, "output_norm.bias": (WIDTH,)})
    with pytest.raises(UnsupportedModelError, match=r"output_norm\.bias"):
        open_checkpoint(str(with_vocabulary(other, tmp_path)), cache_dir=tmp_path / "cache")
