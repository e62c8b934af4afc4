"""Generating a sequence in a simulated swarm, and checking every token of it."""

from __future__ import annotations

import asyncio

import attrs

from swarmcore.client.generation.session_api import RemoteSession
from swarmcore.sim.model import SimModel, unpack_rows


class WrongTokenError(AssertionError):
    """What came out of the last block is not what the tokens of the sequence lead to."""


@attrs.define
class Generation:
    """A sequence that grows; it outlives the sessions that compute it."""

    model: SimModel
    tokens: list[int]
    """The prompt, then what was generated."""
    states: list[int] = attrs.field(init=False, factory=list)
    """The hash of the sequence after each token that has gone through the blocks at least once."""

    @classmethod
    def begin(cls, model: SimModel, seed: int, prompt: int = 1) -> Generation:
        """A sequence whose prompt, of ``prompt`` tokens, follows from ``seed``."""
        return cls(model, [model.start(seed + index) for index in range(prompt)])

    async def step(self, session: RemoteSession, start: int, client_seconds: float = 0.0) -> None:
        """Send the tokens from ``start`` on, and add the one that follows.

        Raise `WrongTokenError` when the answer is not the only right one, and what the session raises.
        """
        await asyncio.sleep(client_seconds)
        new = self.tokens[start:]
        output = await session.step(self.model.embed(new), [len(new)], starts=[start])
        del self.states[start:]
        for token in new:
            before = self.states[-1] if self.states else 0
            self.states.append(self.model.follow(before, token))
        number = unpack_rows(output)[-1]
        if number != self.model.expected(self.states[-1]):
            raise WrongTokenError(
                f"the token after position {len(self.tokens) - 1} came out wrong over {session.chain}"
            )
        self.tokens.append(self.model.choose(number))
