"""Drafters that cannot do harm: what goes wrong in one costs its drafts, and nothing else."""

from __future__ import annotations

import asyncio
import logging
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import attrs

from swarmcore.client.speculation.draft_thread import DraftThread
from swarmcore.client.speculation.drafter import Drafter, DraftRequest, DraftSource
from swarmcore.tasks import loop_time

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

PATIENCE = 300.0
"""Seconds after which a call that has not returned never will; taking in a very long prompt may take some."""
WAIT = 2.0
"""Seconds that a proposal is waited for."""


@attrs.frozen
class Proposal:
    """Tokens that may come next."""

    drafter: str = ""
    """The name of who proposes them."""
    tokens: tuple[int, ...] = ()
    probabilities: tuple[float, ...] = ()
    """How likely each is when those before it are right; empty where that is not known."""
    seconds: float = attrs.field(default=0.0, eq=False)
    """What making it took, without waiting for the thread."""


NOTHING = Proposal()


@attrs.define(eq=False)
class _Call:
    """A call of a drafter in the thread: ``make``, or a proposal that somebody waits for."""

    guarded: GuardedDrafter
    drafter: Drafter
    make: Callable[[Drafter], None] | None = None
    ahead: Sequence[int] = ()
    k: int = 0
    done: asyncio.Future[Proposal] | None = None

    def request(self) -> DraftRequest:
        return DraftRequest(
            self.drafter, self.ahead, self.k, lambda: not (self.done and self.done.cancelled())
        )


class GuardedSource:
    """A `DraftSource` whose drafters raise nothing, propose nothing but tokens, and keep nobody waiting.

    A drafter that fails is set aside: it proposes nothing any more. The first one is logged. To be used from
    one event loop.
    """

    def __init__(self, source: DraftSource, vocab_size: int, *, patience: float = PATIENCE) -> None:
        self.name = source.name
        self.wants_hidden = source.wants_hidden
        self.vocab_size = vocab_size
        self.fallbacks: Counter[str] = Counter()
        """How often a drafter was set aside: because it ``"raised"``, was ``"wrong"`` or ``"silent"``."""
        self.late = 0
        """Proposals that were not there in time."""
        self.silent = ""
        """What is said of a call that never returned: all its drafters are set aside."""
        self._source = source
        self._patience = patience
        self._thread = DraftThread(f"swarmcore-draft-{self.name}") if source.threaded else None
        self._waiting: list[_Call] = []
        self._running: asyncio.Future[list[object]] | None = None
        self._began = 0.0
        self.closed = False

    def __repr__(self) -> str:
        failed = f" · {self.fallbacks.total()} set aside" if self.fallbacks else ""
        return f"<GuardedSource {self.name} · {self.late} late{failed}>"

    @property
    def threaded(self) -> bool:
        return self._thread is not None

    def drafter(self, *, owner: str = "") -> GuardedDrafter:
        """As `DraftSource.drafter`; of a source that fails, one that is set aside."""
        try:
            return GuardedDrafter(self, self._source.drafter(owner=owner))
        except Exception as exc:
            drafter = GuardedDrafter(self, None)
            drafter.fail("raised", exc)
            return drafter

    def close(self) -> None:
        """Let go of what the drafters share, and end the thread. Harmless when repeated."""
        if self.closed:
            return
        self.closed = True
        waiting, self._waiting = self._waiting, []
        if self._thread is None:
            try:
                self._source.close()
            except Exception as exc:
                self.note_failure("raised", exc)
            return
        for call in waiting:
            if call.done is not None and not call.done.done():
                call.done.set_result(NOTHING)
        rest = [call for call in waiting if call.done is None]
        self._thread.submit(_run, self._source, rest, asyncio.get_running_loop().time)
        self._thread.submit(self._source.close)
        self._thread.shutdown()

    def note_failure(self, reason: str, detail: object) -> None:
        if not self.fallbacks:
            logger.warning("the drafter %r failed, and is done without: %s", self.name, detail)
        self.fallbacks[reason] += 1

    def busy(self, seconds: float) -> bool:
        """Whether the thread has been at its present work for so long."""
        return self._running is not None and loop_time() - self._began >= seconds

    def call(self, call: _Call) -> None:
        """Have it made in the thread, with all others that wait by then."""
        if self.busy(self._patience) and not self.silent:
            self.silent = f"a call has not returned for {self._patience:g} s"
            self._waiting.clear()
            self.note_failure("silent", self.silent)
        if not self.silent and not self.closed:
            self._waiting.append(call)
            self._start()

    def _start(self) -> None:
        if self._running is None and self._waiting:
            batch, self._waiting = self._waiting, []
            self._began = loop_time()
            loop = asyncio.get_running_loop()
            self._running = loop.run_in_executor(self._thread, _run, self._source, batch, loop.time)
            self._running.add_done_callback(partial(self._finished, batch))

    def _finished(self, batch: Sequence[_Call], running: asyncio.Future[list[object]]) -> None:
        self._running = None
        failure = None if running.cancelled() else running.exception()
        results = [failure] * len(batch) if failure is not None else running.result()
        for call, result in zip(batch, results, strict=True):
            proposal = call.guarded.checked(result, call.k)
            if call.done is not None and not call.done.done():
                call.done.set_result(proposal)
        self._start()


class GuardedDrafter:
    """The drafter of one sequence. Made by `GuardedSource.drafter`."""

    def __init__(self, source: GuardedSource, drafter: Drafter | None) -> None:
        self.source = source
        self.late = 0
        """Proposals that were not there in time."""
        self._drafter = drafter
        self._failure = ""

    @property
    def failure(self) -> str:
        """Why it is set aside; nothing while it is not."""
        return self._failure or self.source.silent

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def set_aside(self) -> bool:
        return self._drafter is None or bool(self.source.silent)

    def append(self, tokens: Sequence[int]) -> None:
        """As `Drafter.append`. Returns at once, as all of it but `propose`."""
        tokens = list(tokens)
        self._call(lambda drafter: drafter.append(tokens))

    def observe(self, start: int, hidden: torch.Tensor) -> None:
        """As `Drafter.observe`."""
        if self.source.wants_hidden:
            self._call(lambda drafter: drafter.observe(start, hidden))

    async def propose(self, ahead: Sequence[int], k: int, wait: float = WAIT) -> Proposal:
        """As `Drafter.propose`; nothing when that takes more than ``wait`` seconds, or has for some time."""
        drafter, source = self._drafter, self.source
        if drafter is None or source.silent or source.closed or k < 1:
            return NOTHING
        if not source.threaded:
            began = loop_time()
            try:
                tokens = drafter.propose(ahead, k)
                return self.checked((tokens, drafter.probabilities, loop_time() - began), k)
            except Exception as exc:
                return self.fail("raised", exc)
        if not source.busy(wait):
            done: asyncio.Future[Proposal] = asyncio.get_running_loop().create_future()
            source.call(_Call(self, drafter, None, list(ahead), k, done))
            try:
                await asyncio.wait([done], timeout=wait)
                if done.done():
                    return done.result()
            finally:
                done.cancel()  # nobody waits for it any more
        source.late += 1
        self.late += 1
        return NOTHING

    def close(self) -> None:
        """As `Drafter.close`."""
        self._call(lambda drafter: drafter.close())
        self._drafter = None

    def fail(self, reason: str, detail: object) -> Proposal:
        """Set it aside."""
        if not self._failure:
            self._drafter = None
            said = f"{type(detail).__name__}: {detail}" if reason == "raised" else str(detail)
            self._failure = said[:200]
            self.source.note_failure(reason, self._failure)
        return NOTHING

    def checked(self, result: object, k: int) -> Proposal:
        """What became of a call: None, an exception, or tokens, their probabilities, and seconds."""
        if result is None or self._drafter is None:
            return NOTHING
        if isinstance(result, BaseException):
            return self.fail("raised", result)
        try:
            tokens, probabilities, seconds = _checked(result, k, self.source.vocab_size)
        except (TypeError, ValueError) as exc:
            return self.fail("wrong", exc)
        return Proposal(self.name, tuple(tokens), tuple(probabilities), seconds)

    def _call(self, make: Callable[[Drafter], None]) -> None:
        if self._drafter is None:
            return
        if self.source.threaded:
            self.source.call(_Call(self, self._drafter, make))
        else:
            try:
                make(self._drafter)
            except Exception as exc:
                self.fail("raised", exc)


def _checked(result: Any, k: int, vocab_size: int) -> tuple[list[int], list[float], float]:
    """Raise `TypeError` or `ValueError` for what is no proposal of ``k`` tokens at most."""
    tokens, probabilities, seconds = result
    if len(tokens) > k or len(probabilities) not in (0, len(tokens)):
        raise ValueError(
            f"{len(tokens)} tokens and {len(probabilities)} probabilities, where {k} were asked for"
        )
    tokens = [operator.index(token) for token in tokens]
    if bad := [token for token in tokens if not 0 <= token < vocab_size]:
        raise ValueError(f"token {bad[0]} is not in the vocabulary of {vocab_size}")
    probabilities = [float(probability) for probability in probabilities]
    if bad := [probability for probability in probabilities if not 0 <= probability <= 1]:
        raise ValueError(f"{bad[0]} is no probability")
    return tokens, probabilities, seconds


def _run(source: DraftSource, calls: Sequence[_Call], clock: Callable[[], float]) -> list[object]:
    """Make the calls in their order; proposals together, as far as nothing else comes between."""
    results: list[object] = [None] * len(calls)
    asked: list[int] = []
    for place, call in enumerate(calls):
        if call.make is None:
            if call.done is not None and not call.done.cancelled():
                asked.append(place)
            continue
        if any(calls[other].drafter is call.drafter for other in asked):
            _propose(source, calls, asked, results, clock)
            asked = []
        try:
            call.make(call.drafter)
        except Exception as exc:
            results[place] = exc
    _propose(source, calls, asked, results, clock)
    return results


def _propose(
    source: DraftSource,
    calls: Sequence[_Call],
    asked: Sequence[int],
    results: list[object],
    clock: Callable[[], float],
) -> None:
    def ask(places: Sequence[int]) -> None:
        requests = [calls[each].request() for each in places]
        began = clock()
        proposals = source.propose(requests)
        seconds = clock() - began
        for place, request, tokens in zip(places, requests, proposals, strict=True):
            results[place] = tokens, request.drafter.probabilities, seconds

    if not asked:
        return
    try:
        ask(asked)
    except Exception:  # of one of them: the others are not to suffer for it
        for place in asked:
            try:
                ask([place])
            except Exception as exc:
                results[place] = exc
