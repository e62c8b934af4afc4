"""The self-test of a span: it passes what is right, once, and finds each way of being wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, save_random_model, tiny_config
from transformers import AutoConfig

from swarmcore.checkpoint import Checkpoint, open_checkpoint
from swarmcore.errors import CheckpointError, UnsupportedModelError
from swarmcore.executor.torch import attention, reference, self_test, span
from swarmcore.executor.torch.batch import Attention
from swarmcore.executor.torch.executor import TorchExecutor
from swarmcore.executor.torch.ragged_batch import RaggedBatch
from swarmcore.executor.torch.reference import Reference
from swarmcore.executor.torch.small_config import WINDOW, small_config
from swarmcore.executor.torch.uncached_batch import UncachedBatch
from swarmcore.types import ModelInfo, Span


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SWARMCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(self_test, "_remembered", set())
    monkeypatch.setattr(self_test, "_reference", None)


def opened(config: Any, folder: Path) -> Checkpoint:
    save_random_model(config, folder / "model")
    return open_checkpoint(str(folder / "model"))


def config_only(config: Any) -> Any:
    """Of a checkpoint as much as `Reference` takes, without weights of that size."""
    text = config.get_text_config(decoder=True)
    info = ModelInfo("a model", "fingerprint", text.num_hidden_layers, text.hidden_size)
    return SimpleNamespace(name="a model", config=config, info=info)


def test_passed_once_for_a_config_and_a_span(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []
    monkeypatch.setattr(self_test, "Reference", lambda checkpoint: made.append(1) or Reference(checkpoint))
    checkpoint = opened(tiny_config("mistral"), tmp_path)
    TorchExecutor.load(checkpoint, Span(0, 2))
    TorchExecutor.load(checkpoint, Span(2, 5))
    assert made == [1], "one reference is enough for all spans"
    assert len(list((tmp_path / "cache" / "tested").iterdir())) == 2

    monkeypatch.setattr(self_test, "_remembered", set())  # another process
    monkeypatch.setattr(self_test, "_reference", None)
    TorchExecutor.load(checkpoint, Span(0, 2))
    TorchExecutor.load(opened(tiny_config("mistral"), tmp_path / "copy"), Span(2, 5))
    assert made == [1]
    monkeypatch.setattr(self_test, "_versions", lambda: ("another version",))
    TorchExecutor.load(checkpoint, Span(0, 2))
    assert made == [1, 1]


def window_forgotten(how: Attention) -> Attention:
    return how._replace(window=None)


def window_off_by_one(how: Attention) -> Attention:
    return how._replace(window=how.window + 1) if how.window else how


def softcap_forgotten(how: Attention) -> Attention:
    return how._replace(softcap=None)


def sinks_forgotten(how: Attention) -> Attention:
    return how._replace(sinks=None)


def scale_forgotten(how: Attention) -> Attention:
    return how._replace(scale=how.scale * 1.1)


@pytest.mark.parametrize(
    ("family", "mistake"),
    [
        ("mistral", window_forgotten),
        ("phi3", window_off_by_one),
        ("phimoe", window_forgotten),
        ("gemma2", softcap_forgotten),
        ("gpt_oss", sinks_forgotten),
        ("granite", scale_forgotten),
    ],
)
def test_what_attends_otherwise_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, mistake: Callable[[Attention], Attention]
) -> None:
    for kind in (RaggedBatch, UncachedBatch):
        right = kind.attend
        monkeypatch.setattr(kind, "attend", lambda *args, right=right: right(*args[:-1], mistake(args[-1])))
    with pytest.raises(UnsupportedModelError, match=r"blocks 1:3 would differ .* block [12] is off by"):
        TorchExecutor.load(opened(tiny_config(family), tmp_path), Span(1, 3))


def test_a_pass_that_attends_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = UncachedBatch.attend
    monkeypatch.setattr(UncachedBatch, "attend", lambda *args: right(*args[:-1], window_forgotten(args[-1])))
    with pytest.raises(UnsupportedModelError, match="a forward pass is off by"):
        TorchExecutor.load(opened(tiny_config("mistral"), tmp_path), Span(1, 3))


def test_layers_that_are_not_those_of_the_whole_model_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_class = span.cut_class
    monkeypatch.setattr(span, "cut_class", lambda *args: cut_class(*args[:-1], Span(0, len(args[-1]))))
    checkpoint = opened(tiny_config("gpt2-by-index"), tmp_path)
    TorchExecutor.load(checkpoint, Span(0, 2))
    with pytest.raises(UnsupportedModelError, match="block 2 is off by"):
        TorchExecutor.load(checkpoint, Span(2, 4))


def test_masks_of_a_window_taken_for_full_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "setattr", lambda *args: None, raising=False)  # nothing is noted
    with pytest.raises(UnsupportedModelError, match="from token 4 of"):
        TorchExecutor.load(opened(tiny_config("phi3"), tmp_path), Span(0, 2))


def test_a_small_model_that_is_not_small_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "LARGEST", 100_000)
    with pytest.raises(UnsupportedModelError, match="would still take 6"):
        TorchExecutor.load(opened(tiny_config("llama"), tmp_path), Span(0, 2))


@pytest.mark.parametrize("error", [RuntimeError("odd"), CheckpointError("a tensor is missing")])
def test_what_fails_in_small_is_refused_for_that(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object) -> None:
        raise error

    monkeypatch.setattr(self_test, "_difference", fails)
    with pytest.raises(UnsupportedModelError, match="cannot be tested, and is not served untested"):
        TorchExecutor.load(opened(tiny_config("llama"), tmp_path), Span(0, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_small_config_of_a_small_model_keeps_its_widths(family: str) -> None:
    config = tiny_config(family)
    small = small_config(config)
    assert small.hidden_size == config.hidden_size
    assert small.num_attention_heads == config.num_attention_heads
    window = getattr(config, "sliding_window", None)
    assert getattr(small, "sliding_window", None) == (min(window, WINDOW) if window else window)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64}),
        ("gemma3_text", {}),
        (
            "gemma4_text",
            {"hidden_size_per_layer_input": 0, "num_global_key_value_heads": 4} | {"attention_k_eq_v": True},
        ),
        ("gpt_oss", {}),
        ("deepseek_v3", {"num_hidden_layers": 8}),
        ("bloom", {"hidden_size": 14336, "n_layer": 6, "n_head": 112}),
        ("falcon", {"num_hidden_layers": 4}),
        ("phi3", {"sliding_window": 2047}),
        ("codegen", {}),
        ("ctrl", {"n_layer": 6}),
        ("diffllama", {}),
        ("gpt_neo", {}),
        ("gptj", {}),
        ("mpt", {}),
        ("openai-gpt", {}),
        ("xglm", {}),
    ],
)
def test_a_large_model_is_tried_in_small(model_type: str, settings: dict[str, Any]) -> None:
    checkpoint = config_only(AutoConfig.for_model(model_type, **settings))
    small = Reference(checkpoint)
    text = checkpoint.config.get_text_config(decoder=True)
    assert small.config.num_hidden_layers == text.num_hidden_layers == len(small.hidden[0]) - 1
    assert small.nbytes(small.names()) < 64 * 2**20
    assert all(torch.isfinite(logits).all() for logits in small.logits)
    part = Span(1, 3)
    assert self_test._difference(small, part, span._load_small(small, part)) is None
