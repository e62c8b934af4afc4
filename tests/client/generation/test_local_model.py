"""Embeddings and head, in every family, are those of the whole model; nothing else is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import FAMILIES, VOCABULARY, save_random_model, tiny_config
from transformers import LlamaForCausalLM

from swarmcore.checkpoint import Checkpoint, open_checkpoint
from swarmcore.client.generation.local_model import LocalParts
from swarmcore.errors import CheckpointError, InputError
from swarmcore.executor.torch.packed_linear import PackedLinear, packable
from swarmcore.executor.torch.partial_model import find_base, layer_list

BLOCKS = ("layers.", "h.")


class Recorded(Checkpoint):
    """A checkpoint that remembers what was read of it."""

    def __init__(self, inner: Checkpoint) -> None:
        self.name, self.folder, self.config, self.info = inner.name, inner.folder, inner.config, inner.info
        self.inner = inner
        self.was_read: set[str] = set()

    def names(self):
        return self.inner.names()

    def nbytes(self, names):
        return self.inner.nbytes(names)

    def read(self, names, *, progress=None):
        self.was_read.update(names)
        return self.inner.read(names, progress=progress)


def saved(folder: Path, family: str) -> tuple[Any, Recorded]:
    """A random model of the family, whole and as a checkpoint."""
    whole = save_random_model(tiny_config(family), folder / "model")
    return whole, Recorded(open_checkpoint(str(folder / "model"), cache_dir=folder / "cache"))


@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_equal_to_the_whole_model(family: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole, checkpoint = saved(tmp_path, family)
    capfd.readouterr()
    parts = LocalParts.load(checkpoint, dtype="float32")
    assert capfd.readouterr() == ("", ""), "nothing is printed while loading"
    assert not [n for n in checkpoint.was_read if n.removeprefix("model.").startswith(BLOCKS)]
    assert not [n for n in checkpoint.was_read if ".layers." in n or ".h." in n]

    ids = torch.randint(0, VOCABULARY, (1, 9))
    entered: list[torch.Tensor] = []
    left: list[torch.Tensor] = []
    base = find_base(whole)[1]
    layers = getattr(base, layer_list(base))
    layers[0].register_forward_pre_hook(
        lambda m, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    layers[-1].register_forward_hook(
        lambda m, args, out: left.append(out if isinstance(out, torch.Tensor) else out[0])
    )
    logits = whole(ids).logits[0]

    assert torch.equal(parts.embed(ids[0].tolist(), range(9)), entered[0][0])
    shuffled = torch.randperm(9)
    embedded = parts.embed(ids[0, shuffled].tolist(), shuffled.tolist())
    assert torch.equal(embedded, entered[0][0, shuffled]), "tokens of any sequences, in any order"
    made = parts.logits(left[0].view(9, -1))
    assert made.dtype == torch.float32
    torch.testing.assert_close(made, logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(parts.logits(left[0].view(9, -1)[4:5]), logits[4:5], atol=1e-5, rtol=0)


@torch.inference_mode()
def test_bfloat16_equals_the_whole_model_in_bfloat16(tmp_path: Path) -> None:
    whole, checkpoint = saved(tmp_path, "llama-tied")
    parts = LocalParts.load(checkpoint, dtype="bfloat16")
    whole = whole.bfloat16()
    hidden = torch.randn(3, 64)
    assert parts.dtype == torch.bfloat16
    assert parts.embed([5], [0]).dtype == torch.bfloat16
    expected = whole.lm_head(whole.model.norm(hidden.bfloat16())).float()
    assert torch.equal(parts.logits(hidden), expected)
    assert parts.scores(hidden).dtype == torch.bfloat16
    assert isinstance(parts._head_model.lm_head, PackedLinear) == packable(whole.lm_head.weight)


@torch.inference_mode()
def test_a_head_whose_weight_is_read_is_not_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, checkpoint = saved(tmp_path, "llama")
    forward = LlamaForCausalLM.forward
    scaled: list[float] = []

    def reads_weight(self: Any, *args: Any, **options: Any) -> Any:
        scaled.append(self.lm_head.weight.float().norm().item())
        return forward(self, *args, **options)

    monkeypatch.setattr(LlamaForCausalLM, "forward", reads_weight)
    parts = LocalParts.load(checkpoint, dtype="bfloat16")
    assert isinstance(parts._head_model.lm_head, torch.nn.Linear)
    assert parts.logits(torch.randn(1, 64)).isfinite().all()
    assert scaled


def test_the_checkpoints_own_dtype_is_the_default(tmp_path: Path) -> None:
    _, checkpoint = saved(tmp_path, "llama")
    assert LocalParts.load(checkpoint).dtype == torch.float32


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    _, checkpoint = saved(tmp_path, "llama")
    with pytest.raises(InputError, match="bfloat16"):
        LocalParts.load(checkpoint, dtype="int3")


def test_a_missing_head_is_not_made_up(tmp_path: Path) -> None:
    _, checkpoint = saved(tmp_path, "llama")
    names = [name for name in checkpoint.names() if name != "lm_head.weight"]
    checkpoint.names = lambda: names  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        LocalParts.load(checkpoint)


@pytest.mark.parametrize("prefix", ["", "language_model.model."])
def test_tensors_are_found_in_other_layouts(prefix: str, tmp_path: Path) -> None:
    """Checkpoints of the base model alone, or of a larger model around it."""
    _, checkpoint = saved(tmp_path, "llama-tied")
    expected = LocalParts.load(checkpoint, dtype="float32").embed([1, 2], [0, 1])
    names = {prefix + name.removeprefix("model."): name for name in checkpoint.names()}
    names |= {"vision_tower.embed_tokens_like.weight": "model.embed_tokens.weight"}
    inner = checkpoint.inner
    checkpoint.names = lambda: list(names)  # type: ignore[method-assign]
    checkpoint.read = lambda wanted, progress=None: {  # type: ignore[method-assign]
        name: inner.read([names[name]])[names[name]] for name in wanted
    }
    assert torch.equal(LocalParts.load(checkpoint, dtype="float32").embed([1, 2], [0, 1]), expected)


def test_while_another_thread_loads_a_model(tmp_path: Path) -> None:
    """transformers then has the process's default dtype changed; in bfloat16 511 is 512."""
    config = tiny_config("llama")
    config.vocab_size = 512
    save_random_model(config, tmp_path)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        parts = LocalParts.load(open_checkpoint(str(tmp_path)), dtype="float32")
    finally:
        torch.set_default_dtype(before)
    assert parts.embed([511], [0]).shape == (1, config.hidden_size)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("family", ["gpt_oss", "gpt2", "gemma2", "deepseek_v3", "nanochat"])
def test_half_precision_is_float32_but_for_rounding(family: str, dtype: str, tmp_path: Path) -> None:
    """Some families keep their norms in float32."""
    checkpoint = saved(tmp_path, family)[1]
    exact, half = (LocalParts.load(checkpoint, dtype=name) for name in ("float32", dtype))
    hidden = torch.randn(6, exact.hidden_size)
    expected = exact.logits(hidden)
    assert half.dtype == half.embed([3, 4], [0, 1]).dtype == getattr(torch, dtype)
    assert (half.logits(hidden) - expected).abs().max() < 0.05 * expected.std()


def test_a_head_is_rounded_for_drafts_where_that_is_faster(llama_folder: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(llama_folder), cache_dir=tmp_path)
    parts = LocalParts.load(checkpoint, dtype="bfloat16")
    hidden = torch.randn(3, parts.hidden_size, generator=torch.Generator().manual_seed(0))
    exact = parts.logits(hidden)
    if parts.round_head("int8"):
        assert not torch.equal(parts.logits(hidden), exact)
        assert (parts.logits(hidden) - exact).norm() < 0.02 * exact.norm()
        assert torch.equal(parts.project(parts.normed(hidden)), parts.logits(hidden))
    else:
        assert torch.equal(parts.logits(hidden), exact)
    in_float32 = LocalParts.load(checkpoint, dtype="float32")
    assert not in_float32.round_head("int8")
