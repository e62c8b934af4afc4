"""Which tests are run by one process, one after the other, where pytest-xdist has several."""

from __future__ import annotations

from collections.abc import Container
from typing import Any
from zlib import crc32

import pytest

FOLDERS = ("tests/chaos/", "tests/e2e/")
"""Folders of which all tests share running servers, those that take longest first."""

DEAR = tuple(
    f"tests/{part}/"
    for part in (
        *("client", "contracts", "executor", "registry", "rpc"),
        *("sim", "training", "transformers", "transports"),
    )
)
"""Parts whose files take seconds; those of the others are quick, and fill what is left at the end."""


def group_of(nodeid: str) -> str:
    """What shares expensive fixtures: fleets of servers, else files."""
    return next((folder for folder in FOLDERS if nodeid.startswith(folder)), nodeid.partition("::")[0])


def order(group: str, long: Container[str]) -> tuple[int, int]:
    """The lower, the earlier ``group`` is to begin.

    Files are mixed: those of one folder wait for the network, or compute, all at the same time.
    """
    if group in FOLDERS:
        return FOLDERS.index(group), 0
    rank = 0 if group in long else 1 if group.startswith(DEAR) else 2
    return len(FOLDERS) + rank, crc32(group.encode())


def scheduler(config: pytest.Config, log: Any) -> Any:
    """Hands whole groups to the processes, in the order in which they were collected.

    The mark ``xdist_group`` has no effect with pytest 9.2: what pytest-xdist 3.8 sets is no node id any more.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Groups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False
    return Groups(config, log)
