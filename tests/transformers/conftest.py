"""Tiny models over swarms in this process, for the tests of what Transformers sees of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tiny_swarm import Tiny, tiny_swarm


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    """A random Llama of five blocks on two servers."""
    with tiny_swarm(tmp_path_factory.mktemp("llama"), "llama", "0:2", "2:5") as tiny:
        yield tiny
