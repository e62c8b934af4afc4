"""Remote blocks in PyTorch: real servers of tiny models, compared with the same blocks in this process."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from tiny_models import save_random_model, tiny_config
from tiny_swarm import served
from torch import nn

import swarmcore
from swarmcore import sync
from swarmcore.client.autograd.options import PassOptions
from swarmcore.client.autograd.packing import PackedRows
from swarmcore.client.autograd.planner import BatchCodecs
from swarmcore.errors import InputError, InvalidBatchError, SpanError
from swarmcore.routing.link_codec import TensorKind
from swarmcore.training import LoraAdapter
from swarmcore.types import PeerId, ServerInfo

MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 1]])
BATCH, TOKENS = MASK.shape


class Blocks:
    """The same blocks here and on servers."""

    def __init__(self, plain: Any, model: sync.Model, folder: str = "", address: str = "") -> None:
        self.plain, self.model, self.folder, self.address = plain, model, folder, address
        base = plain.base_model
        self.layers = next(child for child in base.children() if isinstance(child, nn.ModuleList))

    def here(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states through all blocks in this process, whatever comes before and after them."""
        found: list[torch.Tensor] = []

        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: Any) -> tuple[tuple[Any, ...], Any]:
            return (hidden, *args[1:]), kwargs

        def leave(_: nn.Module, args: Any, output: Any) -> None:
            found.append(output[0] if isinstance(output, tuple) else output)

        hooks = [
            self.layers[0].register_forward_pre_hook(enter, with_kwargs=True),
            self.layers[-1].register_forward_hook(leave),
        ]
        try:
            ids = torch.zeros(hidden.shape[:2], dtype=torch.long)
            self.plain(input_ids=ids, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return found[0]


def start(folder: Path, family: str, *spans: str) -> Any:
    plain = save_random_model(tiny_config(family, every_expert=True), folder)
    byte_tokenizer().save_pretrained(folder)
    return plain.requires_grad_(False), served(folder, *spans)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Blocks]:
    folder = tmp_path_factory.mktemp("llama")
    plain, running = start(folder, "llama", "0:2", "2:5")
    with running as servers, sync.connect(address := str(servers[0].node.addresses[0])) as swarm:
        options = PassOptions(micro_batch_tokens=8)
        model = swarm.load_model(str(folder), dtype="float32", pass_options=options)
        swarm.wait_for_blocks(model.info, timeout=30)
        yield Blocks(plain, model, str(folder), address)


def inputs(seed: int = 0, batch: int = BATCH, tokens: int = TOKENS) -> torch.Tensor:
    return torch.randn(batch, tokens, 64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def gradients(output: torch.Tensor, *wanted: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad((output * weight).sum(), wanted))


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-4 * other.abs().max())


def test_padding_at_the_left_changes_nothing_but_where_the_rows_are(llama: Blocks) -> None:
    hidden = inputs()
    rows = PackedRows((BATCH, TOKENS), MASK)
    output = llama.model.blocks(hidden, MASK)
    for index, length in enumerate(rows.lengths):
        alone = llama.model.blocks(hidden[index : index + 1][:, MASK[index].bool()])
        assert alone.shape == (1, length, 64)
        assert close(output[index][MASK[index].bool()].detach(), alone[0].detach())
    assert not output[MASK == 0].any()


def test_blocks_go_between_other_modules_and_can_be_sliced(llama: Blocks) -> None:
    torch.manual_seed(3)
    between = nn.Linear(64, 64)
    blocks = llama.model.blocks
    assert len(blocks) == 5 and len(blocks[1:3][1:]) == 1 and str(blocks[-1].span) == "4:5"
    network = nn.Sequential(blocks[:2], between, blocks[2:])
    assert [name for name, _ in network.named_parameters()] == ["1.weight", "1.bias"]
    network(inputs()).square().mean().backward()
    assert between.weight.grad is not None and between.weight.grad.abs().sum() > 0
    for wrong in (slice(0, 4, 2), slice(3, 3), 5, -6):
        with pytest.raises(SpanError):
            blocks[wrong]


def test_low_rank_updates_get_their_gradients(llama: Blocks) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    adapter = LoraAdapter.for_model(llama.plain.config, targets=("q_proj", "down_proj"), rank=4, alpha=8)
    with torch.no_grad():
        for weight in adapter.parameters():
            weight.normal_(0, 0.1)
    hidden = inputs(1)
    weight = torch.randn_like(hidden)
    names = list(adapter.named_weights())
    there = gradients(llama.model.blocks(hidden, adapter=adapter), *adapter.parameters(), weight=weight)

    plain = copy.deepcopy(llama.plain)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    inject_adapter_in_model(config, plain.base_model)
    local = {
        name.removeprefix("layers.").replace(".default.weight", ""): parameter
        for name, parameter in plain.base_model.named_parameters()
        if "lora_" in name
    }
    with torch.no_grad():
        for name, parameter in adapter.named_weights().items():
            local[name].copy_(parameter)
    for parameter in local.values():
        parameter.requires_grad_()
    output = Blocks(plain, llama.model).here(hidden)
    here = gradients(output, *(local[name] for name in names), weight=weight)
    assert all(close(found, wanted) for found, wanted in zip(there, here, strict=True))


def test_from_every_kind_of_thread_and_loop(llama: Blocks) -> None:
    """The main thread, worker threads at once, inside of a running loop, and awaited in another loop."""
    blocks = llama.model.blocks
    expected = blocks(inputs()).detach()

    def train() -> torch.Tensor:
        hidden = inputs()
        output = blocks(hidden)
        output.sum().backward()
        assert hidden.grad is not None
        return output.detach()

    with ThreadPoolExecutor(4) as pool:
        assert all(close(found, expected) for found in pool.map(lambda _: train(), range(8)))

    async def inside() -> None:
        assert close(train(), expected)
        hidden = inputs()
        output = await blocks.forward_async(hidden)
        await asyncio.to_thread(output.sum().backward)
        assert hidden.grad is not None
        # Also with the loop blocked by the backward pass itself.
        (await blocks.forward_async(inputs())).sum().backward()

    asyncio.run(inside())


async def test_over_the_asynchronous_interface_the_swarm_is_joined_once_more(llama: Blocks) -> None:
    async with swarmcore.connect(llama.address) as swarm:
        model = await swarm.load_model(llama.folder, dtype="float32")
        hidden = inputs()
        outputs = await asyncio.gather(*(model.blocks.forward_async(hidden) for _ in range(4)))
        # This blocks the loop that the swarm lives on, and works all the same.
        sum(output.sum() for output in outputs).backward()  # type: ignore[union-attr]
        assert hidden.grad is not None


def test_the_backward_pass_can_be_run_twice_and_not_at_all(llama: Blocks) -> None:
    hidden = inputs()
    output = llama.model.blocks(hidden)
    first = torch.autograd.grad(output.sum(), hidden, retain_graph=True)[0]
    assert close(torch.autograd.grad(output.sum(), hidden)[0], first)
    with torch.no_grad():
        assert not llama.model.blocks(hidden).requires_grad
    assert not llama.model.blocks(hidden.detach()).requires_grad


def test_it_can_be_made_reproducible(llama: Blocks) -> None:
    with sync.connect(llama.address) as swarm:
        options = PassOptions(reproducible=True, micro_batch_tokens=8)
        model = swarm.load_model(llama.folder, dtype="float32", pass_options=options)
        runs = []
        for _ in range(2):
            hidden = inputs(4)
            output = model.blocks(hidden)
            runs.append((output, *gradients(output, hidden, weight=torch.ones_like(output))))
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_rows_travel_as_servers_compute_with_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A float32 client of bfloat16 servers sends half the bytes, and not a bit is different."""
    sent: list[int] = []
    done = BatchCodecs.done

    def noted(
        codecs: BatchCodecs, peer: PeerId, kind: TensorKind, rows: Any, result: Any, now: float
    ) -> None:
        sent.append(result.up.nbytes)
        done(codecs, peer, kind, rows, result, now)

    async def as_they_are(rows: Any, server: ServerInfo) -> Any:
        return rows

    monkeypatch.setattr(BatchCodecs, "done", noted)
    save_random_model(tiny_config("llama"), tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    with (
        served(tmp_path, "0:3", "3:5", dtype="bfloat16") as servers,
        sync.connect(str(servers[0].node.addresses[0])) as swarm,
    ):
        options = PassOptions(reproducible=True)
        model = swarm.load_model(str(tmp_path), dtype="float32", pass_options=options)
        swarm.wait_for_blocks(model.info, timeout=30)

        def run() -> tuple[torch.Tensor, torch.Tensor]:
            hidden = inputs()
            output = model.blocks(hidden)
            return output, gradients(output, hidden, weight=inputs(1).detach())[0]

        found = run()
        assert {values.dtype for values in found} == {torch.float32}
        values = BATCH * TOKENS * 64
        assert sent == [2 * values] * 4
        sent.clear()
        monkeypatch.setattr("swarmcore.client.autograd.micro_batches.as_computed", as_they_are)
        assert all(torch.equal(one, other) for one, other in zip(run(), found, strict=True))
        # What comes from one server goes to the next as it came.
        assert sent == [4 * values, 2 * values, 4 * values, 2 * values]


def test_two_clients_at_once_get_what_each_gets_alone(llama: Blocks) -> None:
    def train(seed: int) -> list[torch.Tensor]:
        """Three steps of low-rank updates, over a connection of its own."""
        with sync.connect(llama.address) as swarm:
            options = PassOptions(reproducible=True, micro_batch_tokens=8)
            model = swarm.load_model(llama.folder, dtype="float32", pass_options=options)
            swarm.wait_for_blocks(model.info, timeout=30)
            adapter = LoraAdapter.for_model(llama.plain.config, rank=2, seed=seed)
            optimizer = torch.optim.SGD(adapter.parameters(), lr=0.05)
            losses = []
            for _ in range(3):
                loss = (model.blocks(inputs(seed), adapter=adapter) - inputs(9)).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            return [*losses, *(weight.detach().clone() for weight in adapter.parameters())]

    alone = [train(1), train(2)]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(train, (1, 2)))
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        assert one[2] < one[1] < one[0]


def test_what_does_not_work_says_why(llama: Blocks) -> None:
    blocks = llama.model.blocks
    with pytest.raises(InputError, match=r"expected \[batch, tokens, 64\]"):
        blocks(torch.zeros(2, 3))
    with pytest.raises(InputError, match="float64"):
        blocks(torch.zeros(1, 2, 64, dtype=torch.float64))
    with pytest.raises(InputError, match="holes"):
        blocks(torch.zeros(1, 3, 64), torch.tensor([[1, 0, 1]]))
    poisoned = torch.zeros(1, 2, 64)
    poisoned[0, 1, 5] = torch.inf
    with pytest.raises(InvalidBatchError, match="finite"):
        blocks(poisoned)
    hidden = inputs()
    with pytest.raises(InvalidBatchError, match="finite"):
        blocks(hidden).backward(torch.full((BATCH, TOKENS, 64), torch.nan))
