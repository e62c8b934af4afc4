"""What holds for every test of the engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def engine_never_crashes(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """The engine's task reports its own crash in the log and nowhere else."""
    yield
    assert [record.message for record in caplog.get_records("call") if record.levelname == "CRITICAL"] == []
