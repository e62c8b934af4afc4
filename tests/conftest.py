"""Fixtures and hooks for the whole suite."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import pytest

from swarmcore.testing.clock import VirtualClockLoop


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Tests marked ``virtual_time`` run on a loop whose clock jumps to the next timer."""
    if item.get_closest_marker("virtual_time"):
        return {"virtual": VirtualClockLoop}
    return {"asyncio": asyncio.new_event_loop}
