"""Servers of a tiny random model in the place of the real one: what is killed, and when, is the same."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import pytest
import pytest_asyncio

from swarmcore.testing.fleet import Fleet


@pytest.fixture(scope="session")
def make_fleet(make_fleet: Callable[..., Fleet], talkative: Any) -> Callable[..., Fleet]:
    return partial(make_fleet, model=talkative.folder, spans=talkative.spans)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def shared_fleet(make_fleet: Callable[..., Fleet]) -> AsyncIterator[Fleet]:
    async with make_fleet() as fleet:
        yield fleet


@pytest.fixture(scope="session")
def reference(talkative: Any) -> Any:
    return talkative.reference
