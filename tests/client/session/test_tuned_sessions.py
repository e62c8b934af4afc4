"""Generation with what was tuned: adapters, prefixes and soft prompts in ordinary sessions."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from byte_tokenizer import byte_tokenizer
from tiny_models import save_random_model, tiny_config
from tiny_swarm import served

from swarmcore import sync
from swarmcore.client.session.options import Failover, SessionOptions
from swarmcore.errors import AdapterError, InputError, MissingBlocksError
from swarmcore.loop_thread import background_loop
from swarmcore.server.block_server import BlockServer
from swarmcore.training import CombinedAdapter, LoraAdapter, PrefixAdapter, SoftPrompt

PROMPT = [[5, 9, 100, 7]]
TOKENS = 10


@attrs.frozen
class Setting:
    plain: Any
    model: sync.Model
    swarm: sync.Swarm
    servers: list[BlockServer]
    failovers: list[Failover]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def setting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    """Two servers for the last blocks, either of which can take over from the other."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    plain = save_random_model(tiny_config(request.param), folder)
    byte_tokenizer().save_pretrained(folder)
    with (
        served(folder, "0:2", "2:5", "2:5") as servers,
        sync.connect(str(servers[0].node.addresses[0])) as swarm,
    ):
        failovers: list[Failover] = []
        options = SessionOptions(on_failover=failovers.append)
        model = swarm.load_model(str(folder), dtype="float32", session_options=options)
        swarm.wait_for_blocks(model.info, timeout=30)
        yield Setting(plain, model, swarm, servers, failovers)


def trained(module: Any) -> Any:
    """As if it had been trained: none of its weights is zero."""
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return module


def greedy(setting: Setting, **tuned: Any) -> list[list[int]]:
    """Tokens one by one; with three for a prompt's first step, and then a rollback that is made good."""
    with setting.model.session(**tuned) as session:
        return _continue(session, [list(PROMPT[0])])


def _continue(session: sync.Session, tokens: list[list[int]]) -> list[list[int]]:
    new = tokens
    while len(tokens[0]) < TOKENS:
        new = [[int(session.step(new).argmax())]]
        tokens = [tokens[0] + new[0]]
    return tokens


def reference(plain: Any, *, embeds_before: torch.Tensor | None = None, past: Any = None) -> list[list[int]]:
    """What the plain model does, from scratch for each token."""
    tokens = [list(PROMPT[0])]
    while len(tokens[0]) < TOKENS:
        embeds = plain.get_input_embeddings()(torch.tensor(tokens))
        if embeds_before is not None:
            embeds = torch.cat([embeds_before[None], embeds], 1)
        with torch.no_grad():
            logits = plain(inputs_embeds=embeds, past_key_values=copy.deepcopy(past)).logits
        tokens = [[*tokens[0], int(logits[0, -1].argmax())]]
    return tokens


def prefix_cache(plain: Any, adapter: PrefixAdapter) -> Any:
    """The prefix as Transformers' own cache."""
    from transformers import DynamicCache

    cache = DynamicCache(config=plain.config)
    for block in range(plain.config.num_hidden_layers):
        key, value = adapter.named_weights()[f"{block}.prefix"].detach().transpose(1, 2)
        cache.update(key[None], value[None], block)
    return cache


def test_soft_prompts(setting: Setting) -> None:
    prompt = trained(SoftPrompt.random(6, 64))
    tokens = greedy(setting, soft_prompt=prompt)
    assert tokens == reference(setting.plain, embeds_before=prompt.embeddings.detach()) != greedy(setting)


def test_prefixes(setting: Setting) -> None:
    adapter = trained(PrefixAdapter.for_model(setting.plain.config, tokens=5))
    tokens = greedy(setting, adapter=adapter)
    assert tokens == reference(setting.plain, past=prefix_cache(setting.plain, adapter)) != greedy(setting)


def test_low_rank_updates_with_a_prefix_and_a_soft_prompt(setting: Setting) -> None:
    """All together; and a generation is what the steps by hand are, in a batch too."""
    targets = ("q_proj", "down_proj") if setting.plain.config.model_type == "llama" else ("c_attn",)
    lora = trained(LoraAdapter.for_model(setting.plain.config, targets=targets, rank=2))
    both = CombinedAdapter(lora, trained(PrefixAdapter.for_model(setting.plain.config, tokens=3)))
    prompt = trained(SoftPrompt.random(2, 64))
    tokens = greedy(setting, adapter=both, soft_prompt=prompt)
    assert tokens != greedy(setting, adapter=lora) != greedy(setting)
    generation = setting.model.generate(
        PROMPT[0], max_new_tokens=TOKENS - 4, min_new_tokens=TOKENS - 4, adapter=both, soft_prompt=prompt
    )
    generation.text()
    assert generation.tokens == tokens[0][4:]


@pytest.mark.parametrize("how", ["handed over", "replayed"])
def test_another_server_takes_over(setting: Setting, how: str) -> None:
    """Its cache begins with the prefix again, whether it is handed over or computed anew."""
    adapter = trained(PrefixAdapter.for_model(setting.plain.config, tokens=5))
    prompt = trained(SoftPrompt.random(2, 64))
    expected = greedy(setting, adapter=adapter, soft_prompt=prompt)
    with setting.model.session(adapter=adapter, soft_prompt=prompt) as session:
        first = [[int(session.step(PROMPT).argmax())]]
        inner = session.asynchronous
        leaving = next(s for s in setting.servers[1:] if s.node.peer == inner.chain.peers[1])

        async def leave() -> None:
            if how == "handed over":
                await leaving.inference.drain(10.0)
                leaving.inference.draining = False
            else:
                await leaving.inference.end()

        background_loop().run(leave())
        tokens = [PROMPT[0] + first[0]]
        new = first
        while len(tokens[0]) < TOKENS:
            new = [[int(session.step(new).argmax())]]
            tokens = [tokens[0] + new[0]]
        assert inner.chain.peers[1] != leaving.node.peer
    assert tokens == expected
    assert setting.failovers.pop().how == how


def test_what_does_not_work_says_why(setting: Setting) -> None:
    with pytest.raises(AdapterError, match="another model"):
        setting.model.session(soft_prompt=SoftPrompt.random(2, 32))
    with pytest.raises(MissingBlocksError):
        setting.model.session(adapter="unheard-of")
    with setting.model.session() as session, pytest.raises(InputError, match="for life"):
        setting.model.generate("x", session=session, soft_prompt=SoftPrompt.random(2, 64)).text()
