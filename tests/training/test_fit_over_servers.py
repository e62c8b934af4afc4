"""The training loop with blocks on servers: parameters end where plain PyTorch takes them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from applied_adapter import hidden_with_adapter
from byte_tokenizer import byte_tokenizer
from tiny_models import save_random_model, tiny_config
from tiny_swarm import served
from torch import nn

import swarmcore
from swarmcore.training import LoraAdapter, PrefixAdapter, SequenceClassificationHead, SoftPrompt, fit

DATA = [
    (torch.randint(3, 120, (6,), generator=torch.Generator().manual_seed(i)), torch.tensor(i % 2))
    for i in range(12)
]


class Here(nn.Module):
    """A classifier on a plain local model with an adapter."""

    def __init__(self, plain: Any, adapter: Any, head: SequenceClassificationHead) -> None:
        super().__init__()
        self.plain, self.adapter, self.head = plain, adapter, head

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(hidden_with_adapter(self.plain, self.adapter, ids))


class OverServers(Here):
    """The same, whose blocks are on servers; of the plain model it uses embeddings and norm."""

    def __init__(self, blocks: Any, plain: Any, adapter: Any, head: SequenceClassificationHead) -> None:
        super().__init__(plain, adapter, head)
        self.blocks = blocks

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.plain.get_input_embeddings()(ids)
        if isinstance(self.adapter, SoftPrompt):
            hidden = self.blocks(self.adapter(hidden))
        else:
            hidden = self.blocks(hidden, adapter=self.adapter)
        return self.head(self.plain.base_model.norm(hidden))


def collate(examples: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    ids, labels = zip(*examples, strict=True)
    return torch.stack(ids), torch.stack(labels)


def loss(model: Any, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return model.head.loss(model(batch[0]), batch[1])  # type: ignore[no-any-return]


async def trained(model: nn.Module) -> nn.Module:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    report = await fit(model, DATA, collate, loss, batch_size=2, accumulate=2, epochs=2, optimizer=optimizer)
    assert report.steps == 6
    return model


@pytest.mark.filterwarnings("ignore::FutureWarning")
async def test_adapters_prompts_and_heads_are_trained_as_locally(tmp_path: Path) -> None:
    plain = save_random_model(tiny_config("llama"), tmp_path).requires_grad_(False)
    byte_tokenizer().save_pretrained(tmp_path)
    with served(tmp_path, "0:2", "2:5") as servers:
        async with swarmcore.connect(str(servers[0].node.addresses[0])) as swarm:
            model = await swarm.load_model(str(tmp_path), dtype="float32")
            await swarm.wait_for_blocks(model.info, timeout=30)
            config = model.whole_config
            adapters = [
                LoraAdapter.for_model(config, rank=4, seed=1),
                PrefixAdapter.for_model(config, tokens=3, seed=1),
                SoftPrompt.random(3, config.hidden_size, seed=1),
            ]
            for adapter in adapters:
                head = SequenceClassificationHead.for_model(config, 2, seed=2)
                there = OverServers(model.blocks, plain, copy.deepcopy(adapter), copy.deepcopy(head))
                here = await trained(Here(plain, copy.deepcopy(adapter), head))
                await trained(there)
                for wanted, found in zip(here.adapter.parameters(), there.adapter.parameters(), strict=True):
                    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)
                moved = [
                    not torch.equal(a, b)
                    for a, b in zip(adapter.parameters(), there.adapter.parameters(), strict=True)
                ]
                assert all(moved)
