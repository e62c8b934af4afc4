"""Which tests are run by one process, one after the other, where pytest-xdist has several."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import pytest

FLEET = "fleet"
"""The tests in folders of which all share running servers."""

FLEET_FOLDERS = ("tests/chaos/", "tests/e2e/")


def group_of(nodeid: str) -> str:
    """What shares expensive fixtures: fleets of servers, else files."""
    return FLEET if nodeid.startswith(FLEET_FOLDERS) else nodeid.partition("::")[0]


def order(group: str, long: Container[str]) -> int:
    """The lower, the earlier ``group`` is to begin."""
    return 0 if group == FLEET else 1 if group in long else 2


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
