"""Which tests are run by one process, one after the other, where pytest-xdist has several."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import pytest

FOLDERS = ("tests/chaos/", "tests/e2e/")
"""Folders of which all tests share running servers, those that take longest first."""


def group_of(nodeid: str) -> str:
    """What shares expensive fixtures: fleets of servers, else files."""
    return next((folder for folder in FOLDERS if nodeid.startswith(folder)), nodeid.partition("::")[0])


def order(group: str, long: Container[str]) -> int:
    """The lower, the earlier ``group`` is to begin."""
    return FOLDERS.index(group) if group in FOLDERS else len(FOLDERS) + (group not in long)


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
