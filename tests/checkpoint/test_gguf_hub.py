"""Models in GGUF on a hub: which is meant, and that only what is needed of it is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import write_gguf
from random_gguf import write_random_gguf
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from swarmcore.checkpoint import open_checkpoint
from swarmcore.checkpoint.download import Downloader
from swarmcore.checkpoint.gguf_checkpoint import GgufCheckpoint
from swarmcore.checkpoint.gguf_model import GgufModel, open_local
from swarmcore.checkpoint.gguf_source import open_gguf, open_on_hub
from swarmcore.checkpoint.hub import resolve
from swarmcore.checkpoint.location import names_gguf
from swarmcore.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError
from swarmcore.executor.ggml.span_file import span_file
from swarmcore.types import Span

HEADER = 256 * 1024


@pytest.fixture
def ggufs(hub: Any, tmp_path: Path) -> Path:
    """The folder of ``someone/tiny-GGUF``, empty."""
    folder = tmp_path / "there"
    folder.mkdir()
    hub.models["someone/tiny-GGUF"] = folder
    return folder


def open_there(hub: Any, cache: Path, tag: str | None = None) -> GgufModel:
    listed = resolve("someone/tiny-GGUF", None, cache, hub.url)
    return open_on_hub(listed, tag, cache, endpoint=hub.url, downloader=Downloader(backoff=0.001))


@pytest.mark.parametrize("parts", [1, 3])
def test_only_the_span_is_downloaded(parts: int, hub: Any, ggufs: Path, tmp_path: Path) -> None:
    local = open_local(write_random_gguf(ggufs / "tiny-F32.gguf", blocks=40, parts=parts))
    there = open_there(hub, tmp_path)
    assert there.info(tmp_path).fingerprint == local.info(tmp_path).fingerprint
    headers = hub.sent
    assert headers <= parts * HEADER
    with (
        span_file(there, Span(30, 32), cache=tmp_path / "one") as span,
        span_file(local, Span(30, 32), cache=tmp_path / "other") as same,
    ):
        assert span.path.read_bytes() == same.path.read_bytes()
        assert hub.sent - headers <= span.nbytes + 2 * 16384
    sent = hub.sent
    span_file(open_there(hub, tmp_path), Span(30, 32), cache=tmp_path / "one").close()
    assert hub.sent == sent


def test_torch_downloads_only_what_it_reads(hub: Any, ggufs: Path, tmp_path: Path) -> None:
    path = write_gguf(ggufs / "tiny-F32.gguf", wide_llama(), "llama", keys={})
    there = GgufCheckpoint(open_there(hub, tmp_path), tmp_path)
    here = open_checkpoint(str(path), cache_dir=tmp_path)
    assert there.info.fingerprint == here.info.fingerprint
    opened = hub.sent
    assert opened <= HEADER
    one = [name for name in there.names() if name.startswith("model.layers.2.")]
    around = [name for name in there.names() if not name.startswith("model.layers.")]
    for names in (one, around):
        before = hub.sent
        for name, data in there.read(names).items():
            assert torch.equal(data, here.read([name])[name]), name
        assert hub.sent - before <= 2 * there.nbytes(names) + 2 * 16384  # in float32 there
    sent = hub.sent
    again = GgufCheckpoint(open_there(hub, tmp_path), tmp_path)
    again.read([*one, *around])
    assert hub.sent == sent
    assert AutoTokenizer.from_pretrained(again.folder)("hello")["input_ids"]


def wide_llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    tokens = {"vocab_size": 259, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**sizes, **tokens))


def test_which_model_is_meant(hub: Any, ggufs: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="has no GGUF file"):
        open_there(hub, tmp_path, "Q8_0")
    (ggufs / "BF16").mkdir()
    write_random_gguf(ggufs / "tiny-Q8_0.gguf", keys={"general.name": "small"})
    write_random_gguf(ggufs / "BF16" / "tiny-BF16.gguf", parts=2)
    write_random_gguf(ggufs / "mmproj-F16.gguf")
    assert open_there(hub, tmp_path, "q8_0").value("general.name") == "small"
    assert len(open_there(hub, tmp_path, "BF16").files) == 2
    assert open_there(hub, tmp_path, "tiny-Q8_0").name == "someone/tiny-GGUF:tiny-Q8_0"
    with pytest.raises(ModelNotFoundError, match=r"several GGUF models, tiny-BF16, tiny-Q8_0; .*GGUF:BF16$"):
        open_there(hub, tmp_path)
    with pytest.raises(ModelNotFoundError, match="no GGUF that is called Q4_K_M; it has tiny-BF16, "):
        open_there(hub, tmp_path, "Q4_K_M")
    (ggufs / "BF16" / "tiny-BF16-00002-of-00002.gguf").unlink()
    with pytest.raises(CheckpointError, match="it has no BF16/tiny-BF16-00002"):
        open_there(hub, tmp_path, "BF16")


def test_what_is_no_gguf(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="is no GGUF, and executor ggml runs no others"):
        open_gguf(str(tmp_path), cache_dir=tmp_path)
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelNotFoundError, match=r"no such file or folder: .*did you mean .*model\.gguf"):
        open_gguf(str(tmp_path / "modle.gguf"), cache_dir=tmp_path)


def test_hub_models_in_gguf_are_told_by_their_names() -> None:
    assert names_gguf("someone/tiny-GGUF")
    assert names_gguf("someone/tiny:Q4_K_M")
    assert not names_gguf("someone/tiny")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(
        ModelNotFoundError, match=r"^no such file or folder: .*modell\.gguf; did you mean .*model\.gguf"
    ):
        open_gguf(str(tmp_path / "modell.gguf"), cache_dir=tmp_path)
