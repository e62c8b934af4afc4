"""Which adapter a remote model uses: its own, one of the servers, or a tuned model's, in each thread."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import save_random_model, tiny_config
from tiny_swarm import Tiny, served

from swarmcore import PassOptions, SessionOptions, sync
from swarmcore.errors import MissingBlocksError
from swarmcore.identity import Identity
from swarmcore.training import LoraAdapter, TunedModel, prompt_tuning, save_adapter
from swarmcore.transformers import AutoModelForCausalLM

IDS = torch.randint(3, 120, (2, 7), generator=torch.Generator().manual_seed(0))
LENGTH: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def lora(config: Any, seed: int) -> LoraAdapter:
    """Low-rank updates that change what the model says."""
    adapter = LoraAdapter.for_model(config, rank=2, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in adapter.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return adapter


@pytest.fixture(scope="module")
def poet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str, LoraAdapter]]:
    """A model's folder, the address of servers that have the adapter "poet" for it, and that adapter."""
    folder = tmp_path_factory.mktemp("poet")
    config = tiny_config("llama")
    save_random_model(config, folder)
    adapter = lora(config, 1)
    save_adapter(folder / "adapter", adapter, config)
    with served(folder, "0:2", "2:5", adapters={"poet": str(folder / "adapter")}) as servers:
        yield folder, str(servers[0].node.addresses[0]), adapter


def test_one_of_the_clients_own_one_by_name_and_a_tuned_model_do_the_same(
    poet: tuple[Path, str, LoraAdapter],
) -> None:
    folder, address, adapter = poet
    me = Identity.generate()
    with AutoModelForCausalLM.from_pretrained(
        folder, bootstrap=address, dtype="float32", identity=me, adapter=adapter
    ) as own:
        swarm = own.stack.swarm
        assert swarm.asynchronous.node.peer == me.peer
        swarm.wait_for_blocks(own.stack.model, timeout=30)
        by_name = AutoModelForCausalLM.from_pretrained(folder, swarm=swarm, dtype="float32", adapter="poet")
        plain = AutoModelForCausalLM.from_pretrained(folder, swarm=swarm, dtype="float32")
        tuned = TunedModel(plain, adapter=adapter)
        logits = [model(IDS).logits for model in (own, by_name, tuned)]
        texts = [model.generate(IDS, **LENGTH) for model in (own, by_name, tuned)]
        for found, text in zip(logits, texts, strict=True):
            torch.testing.assert_close(found, logits[0], rtol=1e-5, atol=1e-5)
            assert torch.equal(text, texts[0])
        assert (logits[0] - plain(IDS).logits).abs().max() > 0.01
        assert not torch.equal(texts[0], plain.generate(IDS, **LENGTH))

        logits[0].sum().backward()
        assert all(weight.grad is not None for weight in adapter.parameters())
        on_top = prompt_tuning(by_name, tokens=2, seed=1)
        on_both = TunedModel(plain, prompt=on_top.prompt, adapter=adapter)
        torch.testing.assert_close(on_top(IDS).logits, on_both(IDS).logits, rtol=1e-5, atol=1e-5)
        other = TunedModel(by_name, adapter=lora(own.config, 2))
        torch.testing.assert_close(other(IDS).logits, TunedModel(plain, adapter=other.adapter)(IDS).logits)


def test_a_name_that_no_server_has(poet: tuple[Path, str, LoraAdapter]) -> None:
    folder, address, _ = poet
    with sync.connect(address) as swarm:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            swarm=swarm,
            adapter="painter",
            pass_options=PassOptions(patience=0.1),
            session_options=SessionOptions(patience=0.1),
        )
        swarm.wait_for_blocks(model.stack.model, timeout=30)
        with pytest.raises(MissingBlocksError, match=r"takes batches .* with the adapter 'painter'"):
            model(IDS)
        with pytest.raises(MissingBlocksError, match="serve --adapter painter=FOLDER"):
            model.generate(IDS, **LENGTH)


def test_two_threads_use_their_own(llama: Tiny) -> None:
    both = [TunedModel(llama.remote, adapter=lora(llama.remote.config, seed)) for seed in (1, 2)]

    def run(tuned: TunedModel) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor | None]]:
        tuned.zero_grad()
        output = tuned(IDS, labels=IDS)
        output.loss.backward()
        gradients = [weight.grad for weight in tuned.parameters()]
        return output.logits, tuned.generate(IDS, **LENGTH), gradients

    alone = [run(tuned) for tuned in both]
    together = threading.Barrier(2)
    # Before the blocks, and after it is said which adapter is used.
    hook = llama.remote.base_model.rotary_emb.register_forward_hook(lambda *_: together.wait(30) and None)
    try:
        with ThreadPoolExecutor(2) as threads:
            found = list(threads.map(run, both))
    finally:
        hook.remove()
    for (logits, text, gradients), expected in zip(found, alone, strict=True):
        torch.testing.assert_close(logits, expected[0])
        assert torch.equal(text, expected[1])
        torch.testing.assert_close(gradients, expected[2])
    assert not torch.equal(alone[0][0], alone[1][0])


def test_nobody_keeps_an_adapter_that_was_used(llama: Tiny) -> None:
    tuned = TunedModel(llama.remote, adapter=lora(llama.remote.config, 1))
    tuned(IDS, labels=IDS).loss.backward()
    tuned.generate(IDS, **LENGTH)
    adapter = weakref.ref(tuned.adapter)
    del tuned
    gc.collect()
    assert llama.sessions_end()
    assert adapter() is None
