"""`LocalSteps` as a program uses it: a model, an optimiser, and others who train the same."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
import torch
from torch import nn
from training_run import MemoryPlaces

from swarmcore.errors import InputError
from swarmcore.registry.base import Registry
from swarmcore.rpc.node import Node
from swarmcore.training import LocalSteps, RoundReport, StepReport, fit_sync
from swarmcore.training.local_steps import replica

Open = Callable[[], AbstractAsyncContextManager[tuple[Node, Registry]]]


@pytest.fixture
def network() -> Open:
    """Opens nodes of one network in memory."""
    return MemoryPlaces().open


def model(seed: int = 0) -> nn.Linear:
    linear = nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return linear


def learn(linear: nn.Linear, by: float) -> None:
    """In place of a step of the optimiser."""
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.sub_(by)


@pytest.mark.virtual_time
async def test_every_h_th_step_exchanges(network: Open) -> None:
    mine, theirs = model(0), model(1)
    heard: list[RoundReport] = []
    async with (
        LocalSteps(
            mine, run="r", every=3, outer_lr=1.0, momentum=0.0, network=network, on_round=heard.append
        ) as one,
        LocalSteps(theirs, run="r", every=3, outer_lr=1.0, momentum=0.0, network=network) as other,
    ):
        assert torch.equal(mine.weight, theirs.weight)  # of the one who was first
        begun = mine.weight.detach().clone()
        for _ in range(2):
            learn(mine, 1.0)
            assert await one.step(samples=2) is None
        assert repr(one) == "<LocalSteps 'r' round 0 step 2/3 2 peers>"
        learn(mine, 1.0)
        exchanging = asyncio.create_task(one.step(samples=2))
        for _ in range(3):
            learn(theirs, 0.0)
            report = await other.step(samples=1)
        assert await exchanging == heard[0]
        assert report is not None
        assert (report.round, report.peers, report.samples) == (1, 2, 9)
        assert one.round == other.round == 1
        assert torch.equal(mine.weight, theirs.weight)
        torch.testing.assert_close(mine.weight.detach(), begun - 3 * 6 / 9)
        assert one.bytes_sent + other.bytes_sent == one.bytes_received + other.bytes_received > 0


@pytest.mark.virtual_time
async def test_the_event_loop_does_no_arithmetic_of_a_round(
    network: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []

    def watch(place: object, name: str) -> None:
        function = getattr(place, name)

        def watched(*arguments: Any, **named: Any) -> Any:
            threads.append(threading.current_thread())
            return function(*arguments, **named)

        monkeypatch.setattr(place, name, watched)

    one, other = (LocalSteps(model(seed), run="r", every=1, codec="int8", network=network) for seed in (0, 1))
    watch(torch.linalg, "vector_norm")
    watch(torch, "cat")
    watch(torch, "where")  # of the codec
    watch(replica, "founding")
    watch(replica, "following")
    async with one, other:
        entered = len(threads)
        await asyncio.gather(one.step(), other.step())
        assert len(threads) > entered > 0
    assert threading.main_thread() not in threads


@pytest.mark.virtual_time
async def test_parameters_of_few_bits_are_rounded_alike(network: Open) -> None:
    mine, theirs = model().bfloat16(), model().bfloat16()
    async with (
        LocalSteps(mine, run="r", every=1, network=network) as one,
        LocalSteps(theirs, run="r", every=1, network=network) as other,
    ):
        for _ in range(5):
            learn(mine, 0.01)
            learn(theirs, 0.02)
            await asyncio.gather(one.step(), other.step())
            assert torch.equal(mine.weight, theirs.weight)


@pytest.mark.virtual_time
async def test_parameters_are_given_in_several_forms(network: Open) -> None:
    linear = model()
    linear.bias.requires_grad_(False)
    async with LocalSteps(linear, run="r", every=1, network=network) as steps:
        learn(linear, 1.0)
        bias = linear.bias.clone()
        await steps.step()
        assert torch.equal(linear.bias, bias)  # it is nobody else's
    async with LocalSteps(linear.parameters(), run="s", network=network):
        pass
    async with LocalSteps(linear.named_parameters(), run="t", network=network):
        pass
    linear.requires_grad_(False)
    with pytest.raises(InputError, match="requires_grad"):
        LocalSteps(linear, run="r", network=network)


@pytest.mark.virtual_time
async def test_what_cannot_work_is_refused(network: Open) -> None:
    with pytest.raises(InputError, match="topk7"):
        async with LocalSteps(model(), run="r", codec="topk7", network=network):
            pass
    steps = LocalSteps(model(), run="r", network=network)
    assert repr(steps) == "<LocalSteps 'r' not joined>"
    with pytest.raises(InputError, match="enter"):
        await steps.step()
    async with steps:
        with pytest.raises(InputError, match="1 sample"):
            await steps.step(samples=0)
        with pytest.raises(InputError, match="entered already"):
            await steps.__aenter__()
        with pytest.raises(InputError, match="await"):
            steps.wait_for_peers_sync(1)


def test_ordinary_loops_over_tcp() -> None:
    """Two programs without asyncio, each with a thread of its own, over real connections and gossip."""
    here = {"tcp": ("127.0.0.1:0",)}
    with LocalSteps(model(0), run="poems", every=2, listen=here) as first:

        def train(steps: LocalSteps, linear: nn.Linear, by: float) -> list[RoundReport]:
            reports = []
            for _ in range(4):
                learn(linear, by)
                if report := steps.step_sync(samples=8):
                    reports.append(report)
            return reports

        second_model = model(1)
        with LocalSteps(second_model, run="poems", every=2, listen=here, bootstrap=first.addresses) as second:
            for steps in (first, second):
                steps.wait_for_peers_sync(2, timeout=10)
            with ThreadPoolExecutor(2) as threads:
                reports = threads.submit(train, second, second_model, 0.5)
                own = train(first, model(0), 0.1)
            assert [(r.round, r.peers, r.samples) for r in own] == [(1, 2, 32), (2, 2, 32)]
            assert [(r.round, r.peers, r.samples) for r in reports.result()] == [(1, 2, 32), (2, 2, 32)]


def test_within_fit(network: Open) -> None:
    linear = model()
    rounds: list[RoundReport] = []
    with LocalSteps(linear, run="r", every=2, network=network, on_round=rounds.append) as steps:

        def exchange(report: StepReport) -> None:
            steps.step_sync(samples=4)

        fit_sync(
            linear,
            [torch.ones(3)] * 16,
            torch.stack,
            lambda net, batch: net(batch).square().mean(),
            batch_size=4,
            progress=False,
            on_step=exchange,
        )
    assert [(report.round, report.samples) for report in rounds] == [(1, 8), (2, 8)]
