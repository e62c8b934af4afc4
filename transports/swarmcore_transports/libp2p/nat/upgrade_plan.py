"""Which relayed peers to try directly, when, and when to leave it."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from swarmcore.types import PeerId

ATTEMPTS = 3
"""Attempts in a row before a peer stays relayed for a while, as many as DCUtR's specification says."""

BACKOFF_SECONDS = (1.0, 3.0)
"""Between one attempt and the next."""

PAUSE_SECONDS = 600.0
"""How long a peer stays relayed before it is tried again: routers and addresses change."""

MAX_PEERS = 4096
"""Peers remembered; those whose pause ends first are forgotten first."""


@attrs.define
class Upgrade:
    """What has been tried with one peer."""

    due: float
    failed: int = 0
    running: bool = False
    reason: str = ""
    relayed: bool = True


class UpgradePlan:
    """A plain object: connections and failures in, peers to try now out. ``now`` is in seconds."""

    def __init__(self) -> None:
        self._of: dict[PeerId, Upgrade] = {}

    def __repr__(self) -> str:
        running = sum(upgrade.running for upgrade in self._of.values())
        return f"<UpgradePlan {len(self._of)} peers · {running} running>"

    def relayed(self, peer: PeerId, now: float) -> None:
        """``peer`` is connected by way of a relay only; what failed with it lately still counts."""
        upgrade = self._of.get(peer)
        if upgrade is None:
            self._forget_idle(now)
            self._of[peer] = Upgrade(due=now)
        else:
            upgrade.relayed = True

    def direct(self, peer: PeerId) -> None:
        """There is a direct connection to ``peer``: nothing is left to try, and nothing to remember."""
        self._of.pop(peer, None)

    def disconnected(self, peer: PeerId, now: float) -> None:
        """``peer`` is not connected any more."""
        upgrade = self._of.get(peer)
        if upgrade is not None:
            upgrade.relayed = False
            if upgrade.due <= now and not upgrade.running:
                del self._of[peer]

    def take_due(self, now: float) -> list[PeerId]:
        """Those to try now; each is running until `direct` or `failed` is called."""
        due = [peer for peer, upgrade in self._waiting() if upgrade.due <= now]
        for peer in due:
            self._of[peer].running = True
        return due

    def failed(self, peer: PeerId, reason: str, now: float) -> bool:
        """An attempt came to nothing, for ``reason``. True when that was the last for a while."""
        upgrade = self._of.get(peer)
        if upgrade is None:
            return False
        upgrade.running = False
        upgrade.failed += 1
        upgrade.reason = reason
        failure_reasons = upgrade.failed % ATTEMPTS == 0
        upgrade.due = now + (
            PAUSE_SECONDS if failure_reasons else BACKOFF_SECONDS[upgrade.failed % ATTEMPTS - 1]
        )
        return failure_reasons

    def retry_all(self, now: float) -> None:
        """Own addresses have changed: what has failed may succeed now."""
        for upgrade in self._of.values():
            if not upgrade.running:
                upgrade.due = min(upgrade.due, now)
                upgrade.failed = 0

    def next_change_at(self) -> float:
        """When `take_due` will have somebody."""
        return min((upgrade.due for _, upgrade in self._waiting()), default=float("inf"))

    def status(self, peer: PeerId) -> str:
        """Where ``peer`` stands, in words; empty when there is nothing to try."""
        upgrade = self._of.get(peer)
        if upgrade is None or not upgrade.relayed:
            return ""
        if upgrade.failed and upgrade.failed % ATTEMPTS == 0 and not upgrade.running:
            return f"stays relayed after {upgrade.failed} attempts: {upgrade.reason}"
        if upgrade.failed:
            return f"relayed; a direct connection failed {upgrade.failed} times so far: {upgrade.reason}"
        return "relayed; a direct connection is being tried"

    def failure_reasons(self) -> list[str]:
        """Why peers stay relayed after `ATTEMPTS`, a reason for each. May be called in any thread."""
        return [
            upgrade.reason
            for upgrade in list(self._of.values())
            if upgrade.relayed and upgrade.failed and upgrade.failed % ATTEMPTS == 0
        ]

    def _waiting(self) -> Iterable[tuple[PeerId, Upgrade]]:
        return [
            (peer, upgrade) for peer, upgrade in self._of.items() if upgrade.relayed and not upgrade.running
        ]

    def _forget_idle(self, now: float) -> None:
        for peer in [p for p, u in self._of.items() if not u.relayed and not u.running and u.due <= now]:
            del self._of[peer]
        if len(self._of) >= MAX_PEERS:
            idle = [p for p, u in self._of.items() if not u.relayed]
            del self._of[min(idle or self._of, key=lambda p: self._of[p].due)]
