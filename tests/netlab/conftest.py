"""Tests in network namespaces: skipped, with the reason, where none can be made."""

from __future__ import annotations

import pytest
from nat_lab import unavailable


@pytest.fixture(autouse=True, scope="session")
def _a_lab_can_be_built() -> None:
    if reason := unavailable():
        pytest.skip(f"no NAT lab: {reason}")
