"""Time limits as swarmcore's errors."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from swarmcore.errors import DeadlineExceededError


@asynccontextmanager
async def within(seconds: float, missed: str) -> AsyncIterator[None]:
    """Raise `DeadlineExceededError`, saying what was ``missed``, when the block takes longer."""
    try:
        async with asyncio.timeout(seconds) as clock:
            yield
    except TimeoutError as exc:
        if not clock.expired():
            raise
        raise DeadlineExceededError(f"{missed} in {seconds:.0f} s") from exc
