"""The client's torch work: one thread for each model, in which what waits together is done together.

The head's matrix product reads the whole vocabulary matrix, for one row or for fifty: generations that run at
the same time share it, and those whose rows are about to come are waited for where that pays.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import math
import timeit
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

import attrs
import torch

from swarmcore.client.generation.local_model import LocalParts
from swarmcore.client.generation.sampling import Choice, Chosen, choose
from swarmcore.engine.batch_window import BatchWindow
from swarmcore.errors import InternalError, ProtocolError, SessionLostError, SwarmError
from swarmcore.executor.loader import THREADS_WORTH, thread_choices
from swarmcore.executor.torch import codecs as _codecs  # noqa: F401  (registers the int8 codec)
from swarmcore.executor.torch import sparse_codecs as _sparse  # noqa: F401  (registers topk and mixed)
from swarmcore.executor.torch.wire_tensors import to_torch
from swarmcore.tasks import loop_time
from swarmcore.wire.tensors import Tensor

P = ParamSpec("P")
T = TypeVar("T")

MAX_ROWS = 64
"""Rows of one head product; more wait for the next one. It bounds the memory that logits take."""


_HEAD_REPEATS = 5
"""How often logits of one row are made with each number of threads that is tried."""


@attrs.define(eq=False)
class _Job:
    """Hidden states to make logits of, tokens to embed, or both: choose tokens, then embed them."""

    done: asyncio.Future[Any]
    hidden: Tensor | None = None
    choices: Sequence[Choice] | None = None
    ids: Sequence[int] = ()
    positions: Sequence[int] = ()
    """Of ``ids``; or of the first token that is chosen for each sequence, then of the last."""
    generation: Hashable = None
    """Whose choice it is, where the same one comes again and again."""
    result: Any = None
    error: Exception | None = None

    @property
    def rows(self) -> int:
        return self.hidden.shape[0] if self.hidden is not None else 0


class ModelCompute:
    """Runs `LocalParts` in a thread, batching what its callers ask for while the thread is busy.

    To be used from one event loop. `close` ends the thread; work still waiting then fails with
    `SessionLostError`.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._pool = ThreadPoolExecutor(1, "swarmcore-client", initializer=_use_threads, initargs=(threads,))
        self._threads = threads
        self._parts: LocalParts | None = None
        self._waiting: list[_Job] = []
        self._running: asyncio.Future[None] | None = None
        # What shares a pass here came in one from the servers: no groups are made of it that take turns.
        self._window = BatchWindow(turns=False)
        self._ready_since: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._wanted = 0
        """Choices for which the timer is not waited for any longer."""
        self._closed = False
        self.batches = 0
        """Batches computed so far."""

    @property
    def parts(self) -> LocalParts:
        if self._parts is None:
            raise InternalError("the model's local parts are not loaded")
        return self._parts

    async def load(self, load: Callable[[], LocalParts]) -> None:
        """Load the parts that all later work uses, in the thread."""
        self._parts = await self.run(load)
        if self._threads is None:
            await self.run(_choose_threads, self._parts)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function in the thread, between batches."""
        self._check_open()
        call = functools.partial(function, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)

    async def embed(self, ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """`LocalParts.embed`."""
        embedded: torch.Tensor = await self._submit(_Job(_future(), ids=ids, positions=positions))
        return embedded

    async def logits(self, hidden: Tensor) -> torch.Tensor:
        """`LocalParts.logits` of ``[rows, hidden size]`` as they came off the wire."""
        logits: torch.Tensor = await self._submit(_Job(_future(), hidden))
        return logits

    @contextlib.contextmanager
    def generating(self, generation: Hashable) -> Iterator[None]:
        """Within it ``generation`` calls `next_tokens` again and again."""
        try:
            yield
        finally:
            self._window.closed(generation)

    async def next_tokens(
        self,
        hidden: Tensor,
        choices: Sequence[Choice],
        positions: Sequence[int],
        generation: Hashable = None,
    ) -> tuple[list[Chosen], torch.Tensor]:
        """Choose tokens by the rows of ``hidden``, as `choose`, and embed the last one of each, in one pass.

        ``positions`` are those of the first token that is chosen for each sequence. Return what was chosen,
        and embeddings ``[sequences, hidden size]``. Within `generating` it may wait for other generations
        whose rows are about to come, for a part of the time that the pass takes.
        """
        if generation is not None:
            self._window.arrived(generation, loop_time())
        chosen: tuple[list[Chosen], torch.Tensor] = await self._submit(
            _Job(_future(), hidden, choices, positions=positions, generation=generation)
        )
        return chosen

    async def close(self) -> None:
        """Wait for what runs in the thread, then end it. Harmless when repeated."""
        self._closed = True
        for job in self._waiting:
            if not job.done.done():
                job.done.set_exception(SessionLostError("the model was closed"))
        self._waiting.clear()
        self._stop_timer()
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._running is not None:
            await asyncio.wait([self._running])

    def _check_open(self) -> None:
        if self._closed:
            raise SessionLostError("the model was closed; load it again")

    async def _submit(self, job: _Job) -> Any:
        self._check_open()
        if self._running is None and not self._waiting:
            # Not at once: answers that arrived in the same turn of the loop are to share the pass.
            asyncio.get_running_loop().call_soon(self._start)
        self._waiting.append(job)
        if self._timer is not None and (job.generation is None or len(self._waiting) >= self._wanted):
            self._stop_timer()
            asyncio.get_running_loop().call_soon(self._start)
        return await job.done

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _holds_back(self) -> bool:
        """Whether what waits is joined by more before long; `_start` is called again then."""
        if not all(job.generation is not None for job in self._waiting):
            return False
        now = loop_time()
        if self._ready_since is None:
            self._ready_since = now
        wait = self._window.wait(len(self._waiting), self._ready_since, now)
        if wait is not None:
            self._wanted = wait.steps
            self._timer = asyncio.get_running_loop().call_at(wait.until, self._start)
        return wait is not None

    def _start(self) -> None:
        self._stop_timer()
        self._waiting = [job for job in self._waiting if not job.done.done()]
        if self._running is not None or not self._waiting or self._holds_back():
            return
        self._ready_since = None
        count, rows = 1, self._waiting[0].rows
        while count < len(self._waiting) and rows + self._waiting[count].rows <= MAX_ROWS:
            rows += self._waiting[count].rows
            count += 1
        batch, self._waiting = self._waiting[:count], self._waiting[count:]
        loop = asyncio.get_running_loop()
        self._running = loop.run_in_executor(self._pool, _run, self.parts, batch)
        self._running.add_done_callback(functools.partial(self._finished, batch, loop.time()))

    def _finished(self, batch: Sequence[_Job], began: float, future: asyncio.Future[None]) -> None:
        self._running = None
        self.batches += 1
        now = loop_time()
        if all(job.generation is not None for job in batch):
            self._window.passes.note(len(batch), now - began)
        for job in batch:
            if job.generation is not None:
                self._window.answered(job.generation, now)
        failure = None if future.cancelled() else future.exception()
        for job in batch:
            if job.done.done():
                continue
            error = job.error or failure
            if error is not None:
                job.done.set_exception(_translated(error))
            else:
                job.done.set_result(job.result)
        if self._waiting:
            self._start()


def _future() -> asyncio.Future[Any]:
    return asyncio.get_running_loop().create_future()


def _use_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)


@torch.inference_mode()
def _choose_threads(parts: LocalParts) -> None:
    """Let this thread have as many threads of torch as are worth it for logits of one row.

    Half as many are tried for as long as that takes hardly longer (`THREADS_WORTH`).
    """
    row = torch.zeros(1, parts.hidden_size, dtype=parts.dtype)
    threads, taken = torch.get_num_threads(), math.inf
    for choice in thread_choices(threads):
        torch.set_num_threads(choice)
        seconds = min(timeit.repeat(lambda: parts.logits(row), repeat=_HEAD_REPEATS, number=1))
        if seconds > THREADS_WORTH * taken:
            break
        threads, taken = choice, seconds
    torch.set_num_threads(threads)


def _translated(error: BaseException) -> SwarmError:
    if isinstance(error, SwarmError):
        return error
    failure = InternalError(f"the client's part of the model failed: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


@torch.inference_mode()
def _run(parts: LocalParts, batch: Sequence[_Job]) -> None:
    """One pass: all heads at once, then all choices, then all embeddings at once. Fills in the jobs."""
    heads: list[tuple[_Job, torch.Tensor]] = []
    for job in batch:
        if job.hidden is not None:
            try:
                heads.append((job, _checked(job.hidden, parts.hidden_size)))
            except SwarmError as exc:
                job.error = exc
    if heads:
        _run_heads(parts, heads)
    embedding = [job for job in batch if job.ids and job.error is None]
    if not embedding:
        return
    embedded = parts.embed(
        [token for job in embedding for token in job.ids],
        [position for job in embedding for position in job.positions],
    )
    for job, rows in zip(embedding, torch.split(embedded, [len(job.ids) for job in embedding]), strict=True):
        job.result = rows if job.choices is None else (job.result, rows)


def _run_heads(parts: LocalParts, heads: Sequence[tuple[_Job, torch.Tensor]]) -> None:
    hidden = heads[0][1] if len(heads) == 1 else torch.cat([rows.to(parts.dtype) for _, rows in heads])
    logits = parts.scores(hidden)
    choosing, chosen_from = [], []
    for (job, _), rows in zip(heads, torch.split(logits, [len(rows) for _, rows in heads]), strict=True):
        if job.choices is None:
            # Its own memory: a caller who keeps it should not keep the whole batch.
            job.result = rows.to(torch.float32, copy=len(heads) > 1)
        else:
            choosing.append((job, job.choices))
            chosen_from.append(rows)
    if not choosing:
        return
    rows = logits if len(choosing) == len(heads) else torch.cat(chosen_from)
    found = iter(choose(rows, [choice for _, choices in choosing for choice in choices]))
    most = parts.max_positions or 2**62
    for job, choices in choosing:
        job.result = chosen = list(itertools.islice(found, len(choices)))
        job.error = next((each.error for each in chosen if not each.tokens), None)
        job.ids = [each.tokens[-1] for each in chosen if each.tokens]
        # A token that ends its text at the model's limit is embedded too, and thrown away.
        job.positions = [
            min(position + len(each.tokens), most) - 1
            for position, each in zip(job.positions, chosen, strict=True)
        ]


def _checked(hidden: Tensor, hidden_size: int) -> torch.Tensor:
    values = to_torch(hidden)
    if values.dim() != 2 or values.shape[1] != hidden_size:
        raise ProtocolError(
            f"hidden states came back as {tuple(values.shape)}, expected [rows, {hidden_size}]"
        )
    return values
