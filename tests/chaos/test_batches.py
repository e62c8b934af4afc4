"""Servers that are killed while batches go through them, forward and back."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch

from swarmcore.client.autograd import rpc as passes
from swarmcore.client.autograd.options import PassOptions
from swarmcore.loop_thread import background_loop
from swarmcore.types import PeerId

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]

BATCH, LENGTH = 4, 32


@pytest.fixture(autouse=True, scope="module")
def background() -> None:
    """The loop that batches run on stays, and is not to be taken for something left open."""
    background_loop()


@pytest.fixture(scope="module")
def hidden() -> torch.Tensor:
    return torch.randn(BATCH, LENGTH, 576, generator=torch.Generator().manual_seed(6))


@pytest.fixture(scope="module")
def expected(plain_smollm2: Any, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What comes out of the last block of the plain model, and the gradient of its square."""
    base = plain_smollm2.model
    inputs = hidden.clone().requires_grad_()
    found: list[torch.Tensor] = []
    hook = base.layers[-1].register_forward_hook(lambda layer, args, output: found.append(output))
    try:
        base(inputs_embeds=inputs, use_cache=False)
    finally:
        hook.remove()
    output = found[0][0] if isinstance(found[0], tuple) else found[0]
    (gradient,) = torch.autograd.grad(output.square().mean(), inputs)
    return output.detach(), gradient


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-4 * other.abs().max())


@pytest.mark.parametrize("way", ["forward", "backward"])
@pytest.mark.parametrize("nth", [0, 5, 11])
async def test_a_server_is_killed_in_a_pass(
    way: str,
    nth: int,
    fleet: Any,
    smollm2_folder: Any,
    hidden: torch.Tensor,
    expected: tuple[torch.Tensor, torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At the first, a middle and the last of the twelve passes of four micro-batches over three stages."""
    import swarmcore

    home = asyncio.get_running_loop()
    killed: list[PeerId] = []
    begun = 0
    run: Callable[..., Any] = getattr(passes, way)

    async def fatal(node: Any, model: Any, stage: Any, *args: Any, **options: Any) -> Any:
        nonlocal begun
        begun += 1
        if begun == nth + 1:
            killed.append(stage.server.peer)
            # The batch is on its way, or being computed, when it falls.
            asyncio.get_running_loop().call_later(0.01, home.call_soon_threadsafe, fleet.kill, killed[0])
        return await run(node, model, stage, *args, **options)

    monkeypatch.setattr(passes, way, fatal)
    async with swarmcore.connect(*fleet.addresses) as swarm:
        await fleet.seen_by(swarm)
        model = await swarm.load_model(
            str(smollm2_folder),
            dtype="float32",
            threads=1,
            pass_options=PassOptions(micro_batch_tokens=LENGTH, patience=30),
        )
        inputs = hidden.clone().requires_grad_()
        output = await model.blocks.forward_async(inputs)
        await asyncio.to_thread(output.square().mean().backward)
    assert killed
    assert close(output.detach(), expected[0])
    assert inputs.grad is not None and close(inputs.grad, expected[1])
