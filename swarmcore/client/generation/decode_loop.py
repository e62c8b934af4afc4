"""The steps of a generation: tokens go out, rows come back, tokens are chosen, drafts are verified."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress

import attrs
import torch

from swarmcore.client.generation.compute import MAX_ROWS, ModelCompute
from swarmcore.client.generation.continuation import Continuation
from swarmcore.client.generation.sampling import Choice, Chosen
from swarmcore.client.generation.token_session import ModelSession
from swarmcore.client.speculation.control import Plan, SpeculationController
from swarmcore.client.speculation.counts import SpeculationCounts
from swarmcore.client.speculation.drafting import Drafting
from swarmcore.client.speculation.guarded import Proposal
from swarmcore.errors import CacheFullError, InvalidStepError, SwarmError
from swarmcore.executor.torch.wire_tensors import to_torch
from swarmcore.session.steps import SentStep
from swarmcore.tasks import cancel_and_wait, loop_time
from swarmcore.wire.tensors import Tensor


@attrs.frozen
class _Draft:
    """A drafted token."""

    token: int
    likely: float
    """How probable it is that it is right when those before it are."""
    drafter: str


@attrs.define(eq=False)
class _Round:
    """A step under way, or back: what it brings to each text that goes on."""

    step: SentStep
    last: Sequence[Sequence[int]]
    """The last token of the text, which is certain; nothing in a step behind another one."""
    drafts: Sequence[Sequence[_Draft]]
    sent: float
    alone: bool
    """Whether nothing was under way when it was sent."""

    @property
    def back(self) -> float:
        """When it came back."""
        return self.step.ended_at or self.sent

    def tokens(self, place: int) -> list[int]:
        """Those of one text, of each of which there is a row."""
        return [*self.last[place], *(draft.token for draft in self.drafts[place])]

    @property
    def rows(self) -> int:
        return sum(map(len, self.last)) + sum(map(len, self.drafts))

    @property
    def likely(self) -> float:
        """How probable it is that all drafts in it are right, when those before it are."""
        return math.prod(draft.likely for each in self.drafts for draft in each)


class DecodeLoop:
    """Generates for all texts of a session together, step by step.

    A step brings the last token of each text, and drafts for it. Those are verified by what is chosen after
    each token, in the order of the tokens and by the settings of the text, so that it is the text of plain
    decoding. Where one text is alone in the session, more drafts go out behind a step that is under way;
    when one before them is wrong they are called back.
    """

    def __init__(
        self,
        continuations: Sequence[Continuation],
        compute: ModelCompute,
        session: ModelSession,
        counts: SpeculationCounts,
        draftings: Sequence[Drafting] = (),
        controller: SpeculationController | None = None,
    ) -> None:
        """``draftings`` make the drafts of each text, as far as the ``controller`` wants some."""
        self._continuations = continuations
        self._running = list(range(len(continuations)))
        """The texts that go on."""
        self._compute = compute
        self._session = session
        self._counts = counts
        self._draftings = draftings
        self._controller = controller
        self._plan = Plan(0, 1)
        self._window: deque[_Round] = deque()
        self._unsent: list[_Draft] = []
        """What comes behind all that is under way, of a text that is alone."""
        self._latest: _Round | None = None

    async def pieces(self, prompts: Sequence[Sequence[int]]) -> AsyncGenerator[tuple[int, str], None]:
        """Yield ``(index of the prompt, piece of its text)``."""
        try:
            done, output = await self._prefill(prompts)
            while True:
                chosen, embedded = await self._choose(done, output)
                running, pieces = self._running, self._take(done, chosen)
                if not self._goes_on(done, chosen):
                    await self._call_back()
                for index, piece in zip(running, pieces, strict=True):
                    if piece:
                        yield index, piece
                if not self._running:
                    return
                if len(self._running) < len(running):
                    embedded = embedded[[row for row, each in enumerate(running) if each in self._running]]
                if not self._window:
                    await self._send(embedded)
                await self._send_behind()
                done, output = await self._receive()
        finally:
            for drafting in self._draftings:
                drafting.close(self._counts)
            if self._window:
                with suppress(SwarmError):  # the session has ended, and what is raised says why
                    await self._call_back()

    async def _receive(self) -> tuple[_Round, Tensor]:
        """What comes of the step that was sent first.

        Where servers have no room for drafts, nothing is drafted any more: for the text alone there may be.
        """
        done = self._window[0]
        try:
            output = await self._session.receive_embedded(done.step)
        except CacheFullError:
            if not any(done.drafts):
                raise
            self._counts.refused += len(self._window)
            self._controller = None
            self._window.clear()
            await self._call_back()
            await self._send(None)
            return await self._receive()
        self._window.popleft()
        self._measure(done)
        return done, output

    async def _prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[_Round, Tensor]:
        session = self._session
        new = session.reuse_prefix(prompts)
        step = await session.send_embedded(new, await session.embed(new), reply="last")
        last = [tokens[-1:] for tokens in new]
        self._window.append(done := _Round(step, last, [()] * len(last), loop_time(), alone=False))
        for drafting, prompt in zip(self._draftings, prompts, strict=False):
            drafting.append(prompt)  # a long one takes a moment: while the servers are at it
        output = await session.receive_embedded(step)
        self._window.popleft()
        for each, prompt, sent, cached in zip(self._continuations, prompts, new, session.cached, strict=True):
            each.generated.cached_tokens = len(prompt) - len(sent) + cached
        return done, output

    # --- what came back ----------------------------------------------------------------------------------

    async def _choose(self, done: _Round, output: Tensor) -> tuple[list[Chosen], torch.Tensor]:
        running = [self._continuations[index] for index in self._running]
        choices = [
            Choice(each.sampler, done.tokens(place)[1:], each.eos) for place, each in enumerate(running)
        ]
        positions = [self._session.offset + each.length for each in running]
        chosen, embedded = await self._compute.next_tokens(output, choices, positions, self._counts)
        row = 0
        for index, choice, each in zip(self._running, choices, chosen, strict=True):
            if self._draftings and self._draftings[index].wants_hidden:
                rows = to_torch(output)[row : row + len(each.tokens)]
                self._draftings[index].observe(self._continuations[index].length - 1, rows)
            row += choice.rows
        return chosen, embedded

    def _take(self, done: _Round, chosen: Sequence[Chosen]) -> list[str]:
        """Let the texts go on with what was chosen; return the pieces that are certain now."""
        pieces, counts = [], self._counts
        for place, (index, each) in enumerate(zip(self._running, chosen, strict=True)):
            continuation, before = self._continuations[index], self._continuations[index].length
            pieces.append("")
            for token in each.tokens:
                pieces[-1] += continuation.take(token)
                if continuation.finished:
                    break
            taken = continuation.length - before
            if each.error is not None and not continuation.finished:
                raise each.error
            if self._draftings:
                self._draftings[index].append(each.tokens[:taken])
            counts.tokens += taken
            right = taken - len(done.last[place])  # the last token is the model's own
            counts.accepted.update(draft.drafter for draft in done.drafts[place][: max(right, 0)])
        counts.steps += 1
        self._running = [index for index in self._running if not self._continuations[index].finished]
        return pieces

    def _goes_on(self, done: _Round, chosen: Sequence[Chosen]) -> bool:
        """Whether what is under way behind a step is what comes after it."""
        if not self._window or not self._running:
            return False
        tokens = chosen[0].tokens
        return len(tokens) == done.rows and tokens[-1] == self._window[0].tokens(0)[0]

    async def _call_back(self) -> None:
        """Have the session hold what is certain, but for the last token of each text, and no more."""
        self._unsent.clear()
        if self._window:
            self._counts.recalled += len(self._window)
            if self._controller is not None:
                self._controller.recalled()
            first = self._window[0].step
            self._window.clear()
            await self._session.recall(first)
        certain = [each.length - 1 for each in self._continuations]
        self._session.rollback(list(map(min, self._session.positions, certain)))

    def _measure(self, done: _Round) -> None:
        controller, before = self._controller, self._latest
        self._latest = done
        if controller is None:
            return
        if done.alone:
            controller.measured(done.rows, done.back - done.sent)
        elif before is not None and done.sent - before.sent < (gap := done.back - before.back):
            controller.followed(done.rows, gap)

    # --- what goes out -----------------------------------------------------------------------------------

    async def _send(self, embedded: torch.Tensor | None) -> None:
        """Send the last token of each text, whose embeddings may be there, and drafts."""
        drafts = await self._first_drafts()
        last = [self._continuations[index].tokens[-1:] for index in self._running]
        await self._send_round(last, drafts, None if any(drafts) else embedded)

    async def _send_behind(self) -> None:
        """Send more drafts behind what is under way, as far as that is likely to pay."""
        while self._controller is not None and len(self._window) < self._plan.depth:
            if self._window[0].step.ended:
                return
            under_way = sum(each.rows for each in self._window)
            most = min(self._plan.length, self._room(self._running[0]) - under_way + 1)
            if len(self._unsent) < most:
                await self._more_drafts(most - len(self._unsent))
            likely = [draft.likely for draft in self._unsent]
            ahead = math.prod(each.likely for each in self._window)
            count = self._controller.behind(likely, ahead, most)
            if count <= 0:
                return
            drafts, self._unsent = self._unsent[:count], self._unsent[count:]
            try:
                await self._send_round([()], [drafts])
            except InvalidStepError:
                # It follows on one that has come to nothing meanwhile; receiving that one says why.
                if all(each.step.error is None for each in self._window):
                    raise
                return

    async def _send_round(
        self,
        last: Sequence[Sequence[int]],
        drafts: Sequence[Sequence[_Draft]],
        hidden: torch.Tensor | None = None,
    ) -> None:
        """``hidden`` are the embeddings, if they are there."""
        new: list[list[int]] = [[] for _ in self._continuations]
        for index, token, each in zip(self._running, last, drafts, strict=True):
            new[index] = [*token, *(draft.token for draft in each)]
        if hidden is None:
            hidden = await self._session.embed(new)
        alone, sent = not self._window, loop_time()
        step = await self._session.send_embedded(new, hidden)
        self._window.append(_Round(step, last, drafts, sent, alone))
        self._counts.drafted.update(draft.drafter for each in drafts for draft in each)

    # --- drafts ------------------------------------------------------------------------------------------

    def _room(self, index: int) -> int:
        """Drafts that a text has room for: it is to end at its limit."""
        continuation = self._continuations[index]
        return continuation.max_length - continuation.length - 1

    async def _first_drafts(self) -> Sequence[Sequence[_Draft]]:
        """What to send behind the last token of each text that goes on."""
        controller, running = self._controller, self._running
        self._plan = Plan(0, 1)
        if controller is None or not controller.ready:
            return [()] * len(running)
        most = min(controller.settings.max_tokens, MAX_ROWS // len(running) - 1)
        asked = [self._draftings[index].propose((), min(most, self._room(index))) for index in running]
        if len(running) > 1:
            proposals = await asyncio.gather(*asked)  # at once: those of a draft model share its passes
            lengths = controller.lengths([proposal.probabilities for proposal in proposals])
            return [_drafts(each)[:length] for each, length in zip(proposals, lengths, strict=True)]
        proposal = await asked[0]
        controller.max_in_flight = self._session.max_in_flight
        self._plan = controller.plan(proposal.probabilities)
        drafts = _drafts(proposal)
        first, self._unsent = drafts[: self._plan.length], drafts[self._plan.length :]
        return [first]

    async def _more_drafts(self, count: int) -> None:
        """Have drafts made behind all that there are, unless the step that is waited for is back before."""
        ahead = [token for each in self._window for token in each.tokens(0)][1:]
        ahead += [draft.token for draft in self._unsent]
        drafting = self._draftings[self._running[0]]
        asking = asyncio.create_task(drafting.propose(ahead, count), name="drafts")
        waiting = asyncio.create_task(self._window[0].step.wait(), name="a step before drafts")
        try:
            await asyncio.wait([asking, waiting], return_when=asyncio.FIRST_COMPLETED)
            if asking.done():
                self._unsent += _drafts(asking.result())
        finally:
            await cancel_and_wait(asking, waiting)


def _drafts(proposal: Proposal) -> list[_Draft]:
    return [
        _Draft(token, likely, proposal.drafter)
        for token, likely in zip(proposal.tokens, proposal.probabilities, strict=True)
    ]
