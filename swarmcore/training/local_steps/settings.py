"""How peers train together: every setting and its range."""

from __future__ import annotations

import math

import attrs

from swarmcore.errors import DeltaError, InputError, RunMismatchError
from swarmcore.wire.local_steps import RunTerms

MAX_RUN_NAME = 100


@attrs.frozen(kw_only=True)
class LocalStepsSettings:
    """Settings of a `LocalSteps`. Raise `InputError` for a value out of its range."""

    run: str
    """What the peers that train together have in common; anybody who knows it may join."""
    every: int = 50
    """Local steps between two exchanges. May differ between peers."""
    outer_lr: float = 0.7
    """What the averaged delta is multiplied by. All peers of a run have the same."""
    momentum: float = 0.9
    """Of Nesterov's method. All peers of a run have the same."""
    codec: str = "raw"
    """How deltas travel: ``raw``, ``int8``, ``topk0.05``, … What it drops goes with the next delta."""
    deadline: float = 30.0
    """Seconds that this peer, when it has delivered, waits for those that have not."""

    def __attrs_post_init__(self) -> None:
        if not self.run or len(self.run) > MAX_RUN_NAME or not self.run.isprintable():
            raise InputError(
                f"the name of a run is of 1 to {MAX_RUN_NAME} printable characters: {self.run!r}"
            )
        if type(self.every) is not int or self.every < 1:
            raise InputError(f"every must be a whole number, 1 or more; got {self.every!r}")
        if not 0 < self.outer_lr < math.inf:
            raise InputError(f"outer_lr must be above 0; got {self.outer_lr}")
        if not 0 <= self.momentum < 1:
            raise InputError(f"momentum must be from 0 to below 1; got {self.momentum}")
        if not 0 < self.deadline <= 3600:
            raise InputError(f"deadline must be above 0, and 3600 s at most; got {self.deadline}")

    def terms(self, values: int, layout: str) -> RunTerms:
        """What peers have to agree on that train so many values, of that layout."""
        return RunTerms(self.run, values, layout, self.outer_lr, self.momentum)


def check_terms(own: RunTerms, others: RunTerms) -> None:
    """Raise `RunMismatchError` or `DeltaError` unless what ``others`` are of fits with a run on ``own``."""
    if others.run != own.run:
        raise RunMismatchError(
            f"this peer takes part in the run {own.run!r}, not in {others.run[:MAX_RUN_NAME]!r}; find the "
            f"peers of that in the registry"
        )
    if (others.values, others.layout) != (own.values, own.layout):
        raise DeltaError(
            f"the run {own.run!r} trains {own.values} values (layout {own.layout[:8]}), and not "
            f"{others.values} ({others.layout[:8]}): parameters need the same names, shapes and order"
        )
    if others != own:
        raise RunMismatchError(
            f"the run {own.run!r} has outer_lr={own.outer_lr:g}, momentum={own.momentum:g}, and not "
            f"{others.outer_lr:g}, {others.momentum:g}: all its peers need the same"
        )


@attrs.frozen
class RoundReport:
    """One exchange, as it ended for this peer."""

    round: int
    """Rounds of the run so far."""
    included: bool
    """Whether all that this peer has learned is in the parameters; the rest is kept for the next exchange."""
    peers: int
    """Whose deltas are in the last round."""
    samples: int
    """That all of them trained on in it."""
    seconds: float
    """That the exchange took, its waiting included."""
    sent: int
    """Bytes of deltas, results and states that this peer sent since the report before."""
    received: int

    def __str__(self) -> str:
        peers = f"{self.peers} peer" + ("s" if self.peers != 1 else "")
        part = "" if self.included else ", this one's delta kept for the next"
        return (
            f"round {self.round}: {peers}, {self.samples} samples{part}, in {self.seconds:.2f} s, "
            f"{self.sent / 1e6:.2f} MB sent, {self.received / 1e6:.2f} MB received"
        )
