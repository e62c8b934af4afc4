"""The kinds of scenarios there are."""

from __future__ import annotations

from swarmcore.sim.balance import Balance
from swarmcore.sim.failures import FailureTable
from swarmcore.sim.load import Load
from swarmcore.sim.scenario import Scenario
from swarmcore.sim.training import Training

KINDS: tuple[type[Scenario], ...] = (FailureTable, Load, Balance, Training)
