"""What the interoperability tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from js_node import install


@pytest.fixture(scope="session")
def js_libp2p(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder to start a `JsNode` from; skips where node or npm is missing."""
    run = tmp_path_factory.getbasetemp()
    # Each process of pytest-xdist has a folder of its own inside that of the run.
    return install(run.parent if "PYTEST_XDIST_WORKER" in os.environ else run)
