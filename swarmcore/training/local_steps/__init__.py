"""Many clients that tune one thing: local steps on each, now and then an exchange of what they learned.

After DiLoCo (arXiv 2311.08105): an inner optimiser on every peer, an outer one on the mean of their deltas.
"""

from swarmcore.training.local_steps.settings import LocalStepsSettings, RoundReport
from swarmcore.training.local_steps.steps import LocalSteps

__all__ = ["LocalSteps", "LocalStepsSettings", "RoundReport"]
