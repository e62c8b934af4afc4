"""A peer's whole part in a run, as plain values and tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs
import torch

from swarmcore.errors import CheckpointError
from swarmcore.training.local_steps.contributions import Outgoing, restored
from swarmcore.training.local_steps.replica import State
from swarmcore.training.local_steps.vectors import decode
from swarmcore.types import PeerId
from swarmcore.wire.local_steps import Contribution, Lineage, RunTerms

_FORMAT = 1


@attrs.frozen(eq=False, kw_only=True)
class SavedMember:
    """What a peer goes on with, bit for bit, after it was stopped."""

    terms: RunTerms
    peer: PeerId
    state: State
    residuals: Mapping[str, torch.Tensor]
    """What lossy codecs have dropped of this peer's deltas, to be sent with the next."""
    outgoing: Outgoing | None
    """A delta of which it is not known whether it got in."""
    base: torch.Tensor
    """The common parameters that the local steps began from, as they were rounded."""
    own: torch.Tensor
    """This peer's parameters, after some local steps."""
    steps: int
    samples: int

    def is_outdated(self, state: State) -> bool:
        """Whether a delta of this peer is in ``state`` that was made after saving, and so had all of it."""
        now, before = state.included.get(self.peer), self.state.included.get(self.peer)
        known = [one.delivery for one in (before, self.outgoing) if one is not None]
        return now is not None and now.delivery not in known

    def as_dict(self) -> dict[str, Any]:
        """Shares memory with what is never changed."""
        one, lineage = self.outgoing, self.state.lineage
        return {
            "format": _FORMAT,
            "terms": attrs.asdict(self.terms),
            "peer": str(self.peer),
            "lineage": attrs.asdict(lineage),
            "parameters": self.state.parameters,
            "velocity": self.state.velocity,
            "included": [[str(c.peer), c.delivery, c.samples] for c in self.state.included.values()],
            "residuals": dict(self.residuals),
            "outgoing": None
            if one is None
            else {
                "delta": one.delta,
                "values": decode(one.pieces),
                "samples": one.samples,
                "delivery": one.delivery,
            },
            "base": self.base,
            "own": self.own,
            "steps": self.steps,
            "samples": self.samples,
        }

    @classmethod
    def read(cls, saved: Mapping[str, Any]) -> SavedMember:
        """The inverse of `as_dict`.

        Raise `CheckpointError` for what does not come from there, `DeltaError` for values not finite.
        """
        try:
            if saved["format"] != _FORMAT:
                raise CheckpointError(f"a saved run of format {saved['format']}; this version has {_FORMAT}")
            terms = RunTerms(**saved["terms"])
            included = [Contribution(PeerId(peer), *numbers) for peer, *numbers in saved["included"]]
            one = saved["outgoing"]
            return cls(
                terms=terms,
                peer=PeerId(saved["peer"]),
                state=State.of(
                    Lineage(**saved["lineage"]),
                    _vector(saved, "parameters", terms),
                    _vector(saved, "velocity", terms),
                    included,
                ),
                residuals={name: values.clone() for name, values in saved["residuals"].items()},
                outgoing=None
                if one is None
                else restored(
                    _vector(one, "delta", terms),
                    _vector(one, "values", terms),
                    one["samples"],
                    one["delivery"],
                ),
                base=_vector(saved, "base", terms),
                own=_vector(saved, "own", terms),
                steps=int(saved["steps"]),
                samples=int(saved["samples"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as exc:
            raise CheckpointError(f"this is not what LocalSteps.state_dict() gives: {exc!r}") from exc


def _vector(saved: Mapping[str, Any], name: str, terms: RunTerms) -> torch.Tensor:
    vector: torch.Tensor = saved[name]
    if vector.shape != (terms.values,) or vector.dtype != torch.float32:
        raise CheckpointError(
            f"{name} in a saved run is {list(vector.shape)} {vector.dtype}; expected {terms.values} float32"
        )
    return vector.detach().cpu().clone()
