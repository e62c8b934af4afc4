"""Low-rank updates of remote blocks: which projections, what they start from, what stands for their state."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_config
from transformers import AutoModelForCausalLM

from swarmcore.errors import AdapterError, SpanError
from swarmcore.training import CombinedAdapter, LoraAdapter, PrefixAdapter
from swarmcore.types import Span

# What peft does with a model gives warnings about the future of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TARGETS = {
    "llama": ("q_proj", "v_proj"),
    "qwen3": ("self_attn.o_proj", "down_proj"),
    "gemma3": "all-linear",
    "gpt2": ("c_attn", "c_proj"),
    "bloom": ("query_key_value",),
    "qwen3_moe": ("q_proj", "o_proj"),
    "olmo2": r".*layers\.[13]\..*(q_proj|mlp\.up_proj)",
}


@pytest.mark.parametrize("family", TARGETS)
def test_targets_sizes_and_first_values_are_those_of_peft(family: str) -> None:
    config, targets = tiny_config(family), TARGETS[family]
    named = targets if isinstance(targets, str) else list(targets)
    lora = LoraConfig(r=4, target_modules=named, fan_in_fan_out=family == "gpt2", task_type="CAUSAL_LM")
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config)
    expected = {}
    for name, weight in get_peft_model(plain, lora).named_parameters():
        if ".lora_" in name:
            block, _, rest = name.partition("layers." if "layers." in name else ".h.")[2].partition(".")
            expected[f"{block}.{rest.removesuffix('.default.weight')}"] = tuple(weight.shape)

    mine = LoraAdapter.for_model(config, targets=targets, rank=4, alpha=8, seed=0)

    assert {name: tuple(weight.shape) for name, weight in mine.named_weights().items()} == expected
    assert mine.scaling == 2.0


def test_it_starts_as_peft_does() -> None:
    config = tiny_config("llama")
    mine = LoraAdapter.for_model(config, seed=3)
    again = LoraAdapter.for_model(config, seed=3)
    for name, weight in mine.named_weights().items():
        assert torch.equal(weight, again.named_weights()[name])
        if name.endswith("lora_A"):
            assert 0.9 * 64**-0.5 < weight.abs().max() <= 64**-0.5
        else:
            assert not weight.any()
    other = LoraAdapter.for_model(config, seed=4)
    assert mine.version == again.version != other.version


def test_weights_of_a_span_come_in_the_order_of_the_blocks() -> None:
    adapter = LoraAdapter.for_model(tiny_config("llama"), blocks=[4, 1, 2], rank=2)
    assert adapter.covered_blocks == (1, 2, 4)
    assert list(adapter.named_weights(Span(2, 5))) == [
        f"{block}.self_attn.{module}.{part}"
        for block in (2, 4)
        for module in ("q_proj", "v_proj")
        for part in ("lora_A", "lora_B")
    ]
    assert adapter.named_weights(Span(3, 4)) == {}
    assert all(a is b for a, b in zip(adapter.named_weights().values(), adapter.parameters(), strict=True))


def test_the_version_follows_every_way_of_changing_a_weight() -> None:
    adapter = LoraAdapter.for_model(tiny_config("llama"), rank=2, seed=0)
    weight = next(adapter.parameters())
    start, state = adapter.version, {name: value.clone() for name, value in adapter.state_dict().items()}
    optimiser = torch.optim.AdamW(adapter.parameters(), lr=0.1)
    torch.cat([parameter.flatten() for parameter in adapter.parameters()]).sum().backward()
    optimiser.step()
    seen = {start, adapter.version}
    weight.data.add_(1.0)
    seen.add(adapter.version)
    weight.data = weight.data * 2
    seen.add(adapter.version)
    with torch.no_grad():
        weight[0, 0] = 17.0
    seen.add(adapter.version)
    adapter.scaling *= 2
    seen.add(adapter.version)
    assert len(seen) == 6
    assert all(len(version) == 32 and int(version, 16) >= 0 for version in seen)
    adapter.scaling /= 2
    adapter.load_state_dict(state)
    assert adapter.version == start


def test_updates_and_a_prefix_are_used_as_one() -> None:
    config = tiny_config("llama")
    lora = LoraAdapter.for_model(config, blocks=Span(0, 3), rank=2, alpha=6, seed=0)
    prefix = PrefixAdapter.for_model(config, tokens=4, seed=0)
    both = CombinedAdapter(prefix, lora)
    assert (both.scaling, both.prefix_tokens) == (3.0, 4)
    assert both.covered_blocks == (0, 1, 2, 3, 4)
    assert both.named_weights(Span(2, 4)) == {
        **prefix.named_weights(Span(2, 3)),
        **lora.named_weights(Span(2, 3)),
        **prefix.named_weights(Span(3, 4)),
    }
    assert set(both.parameters()) == {*lora.parameters(), *prefix.parameters()}
    before = both.version
    next(lora.parameters()).data.add_(1.0)
    assert both.version != before


def test_adapters_that_cannot_be_combined() -> None:
    config = tiny_config("llama")
    lora = LoraAdapter.for_model(config, rank=2)
    with pytest.raises(AdapterError, match=r"more than one of the adapters has weights for 0\.self_attn"):
        CombinedAdapter(lora, LoraAdapter.for_model(config, rank=2))
    with pytest.raises(AdapterError, match="different scalings"):
        CombinedAdapter(lora, LoraAdapter.for_model(config, rank=2, alpha=1, targets=["o_proj"]))
    with pytest.raises(AdapterError, match="different lengths"):
        CombinedAdapter(
            PrefixAdapter.for_model(config, tokens=4, blocks=Span(0, 2)),
            PrefixAdapter.for_model(config, tokens=3, blocks=Span(2, 5)),
        )
    with pytest.raises(AdapterError, match="at least one"):
        CombinedAdapter()


def test_what_cannot_be_made_says_why() -> None:
    config = tiny_config("llama")
    with pytest.raises(
        AdapterError, match=r"'c_attn' is no projection.*self_attn\.q_proj, self_attn\.k_proj"
    ):
        LoraAdapter.for_model(config, targets=["q_proj", "c_attn"])
    with pytest.raises(AdapterError, match="'self_attn' is no linear layer"):
        LoraAdapter.for_model(config, targets=["self_attn"])
    with pytest.raises(AdapterError, match="no regular expression"):
        LoraAdapter.for_model(config, targets="(")
    with pytest.raises(AdapterError, match="no targets"):
        LoraAdapter.for_model(config, targets=[])
    with pytest.raises(AdapterError, match="dropout"):
        LoraAdapter.for_model(config, dropout=0.1)
    with pytest.raises(AdapterError, match="rank"):
        LoraAdapter.for_model(config, rank=0)
    with pytest.raises(SpanError, match=r"no blocks 3:9 in a model with 5"):
        LoraAdapter.for_model(config, blocks=Span(3, 9))
    config.num_hidden_layers = 0
    with pytest.raises(AdapterError, match="whole model"):
        LoraAdapter.for_model(config)
