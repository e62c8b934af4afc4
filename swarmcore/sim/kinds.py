"""The kinds of scenarios there are."""

from __future__ import annotations

from swarmcore.sim.balance import Balance
from swarmcore.sim.crowd import Crowd
from swarmcore.sim.failures import FailureTable
from swarmcore.sim.scenario import Scenario

KINDS: tuple[type[Scenario], ...] = (FailureTable, Crowd, Balance)
