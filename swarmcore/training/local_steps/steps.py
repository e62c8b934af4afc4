"""Training with others: many local steps, then one exchange."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, contextmanager
from types import TracebackType
from typing import Any, TypeVar, TypeVarTuple

import torch

from swarmcore.errors import InputError
from swarmcore.identity import Identity
from swarmcore.loop_thread import background_loop, wait_on
from swarmcore.peer import NetworkConfig, listening
from swarmcore.registry.base import Registry
from swarmcore.rpc.node import Node
from swarmcore.training.local_steps.member import RunMember
from swarmcore.training.local_steps.replica import Replica, State
from swarmcore.training.local_steps.saved import SavedMember
from swarmcore.training.local_steps.settings import LocalStepsSettings, RoundReport, check_terms
from swarmcore.training.local_steps.vectors import ParameterVector, Trained, check_codec
from swarmcore.types import PeerId

OpenNetwork = Callable[[], AbstractAsyncContextManager[tuple[Node, Registry]]]
"""Opens a listening node with its registry, which is yet to be started."""

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

LISTEN = {"tcp": ("0.0.0.0:0",)}


class LocalSteps:
    """Trains parameters together with all peers of the swarm that take part in the same run.

    Each peer takes ``every`` steps of its own optimiser on its own data. Then the differences that they made
    are averaged, weighted by samples, and one step of an outer optimiser is taken with the mean, the same on
    every peer (DiLoCo, arXiv 2311.08105). Peers may join, leave and die at any time.

    Use it as a context manager, ``async with`` or ``with``. On entering, ``parameters`` become the current
    ones of the run if others have begun it; a run begins with those of its first peer. Call `step` (or
    `step_sync` in a loop that cannot await) after every step of the optimiser.

    ``bootstrap`` are addresses of members of the swarm; none for the first one. The peer listens on
    ``listen`` (transport schemes, each with its places; a free TCP port by default) and has to be reachable
    there.
    ``allowed_peers`` closes the run to all others. ``identity`` is a new one by default; keep one for
    a peer that is to come back with its `state_dict`. ``network`` replaces all these.
    """

    def __init__(
        self,
        parameters: Trained,
        *,
        run: str,
        bootstrap: Sequence[str] = (),
        every: int = 50,
        outer_lr: float = 0.7,
        momentum: float = 0.9,
        codec: str = "raw",
        deadline: float = 30.0,
        listen: Mapping[str, Sequence[str]] = LISTEN,
        announce: Sequence[str] = (),
        identity: Identity | None = None,
        allowed_peers: Collection[PeerId] | None = None,
        on_round: Callable[[RoundReport], None] | None = None,
        network: OpenNetwork | None = None,
    ) -> None:
        """Raise `InputError` for settings out of their range, or parameters that cannot be trained."""
        self.settings = LocalStepsSettings(
            run=run, every=every, outer_lr=outer_lr, momentum=momentum, codec=codec, deadline=deadline
        )
        check_codec(codec)
        self._parameters = ParameterVector(parameters)
        self._terms = self.settings.terms(self._parameters.count, self._parameters.layout)
        config = NetworkConfig(
            transports=listen, announce=announce, bootstrap=bootstrap, allowed_peers=allowed_peers
        )
        self._network = network or (lambda: listening(identity or Identity.generate(), config))
        self._on_round = on_round
        self._stack = AsyncExitStack()
        self._member: RunMember | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._saved: SavedMember | None = None
        self._base = torch.empty(0)
        self._steps = 0
        self._samples = 0
        self._exchanging = False

    def __repr__(self) -> str:
        settings = self.settings
        if self._member is None:
            return f"<LocalSteps {settings.run!r} not joined>"
        return (
            f"<LocalSteps {settings.run!r} round {self.round} step {self._steps}/{settings.every} "
            f"{len(self._member.alive)} peers>"
        )

    @property
    def round(self) -> int:
        """Rounds of the run so far."""
        return self._joined.replica.lineage.round

    @property
    def peers(self) -> frozenset[PeerId]:
        """Who takes part now, this peer included."""
        return self._joined.alive

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where others can join through this peer."""
        return tuple(map(str, self._joined.node.addresses))

    @property
    def bytes_sent(self) -> int:
        """Of deltas, results and parameters, to all peers so far."""
        return self._joined.traffic.sent

    @property
    def bytes_received(self) -> int:
        return self._joined.traffic.received

    async def step(self, samples: int = 1) -> RoundReport | None:
        """Call after every step of the optimiser, with the number of samples that it was on.

        Every ``every``-th call exchanges what was learned and sets the parameters; the others return None at
        once. Waits no longer than it takes all peers to deliver, and ``deadline`` seconds for those who do
        not. When cancelled, what was learned may get in all the same, and does so once: the next call sees to
        that. Raise `DeltaError` when the parameters are not finite.
        """
        if not self._is_due(samples):
            return None
        if asyncio.get_running_loop() is not self._loop:
            raise InputError("this LocalSteps was entered on another event loop; use step_sync() here")
        member = self._joined
        with self._one_exchange():
            delta = await _to_its_end(self._learned, member)
            report = await member.exchange(delta, self._samples)
            await _to_its_end(self._go_on, member, delta)
            self._steps = 0
        return self._reported(report)

    def step_sync(self, samples: int = 1) -> RoundReport | None:
        """`step` for code that cannot await, in any thread but the event loop's."""
        if not self._is_due(samples):
            return None
        member = self._joined
        with self._one_exchange():
            delta = self._learned(member)
            report = self._wait(member.exchange(delta, self._samples))
            self._go_on(member, delta)
            self._steps = 0
        return self._reported(report)

    def state_dict(self) -> dict[str, Any]:
        """All that this peer has of the run, its own parameters included, for `load_state_dict` later.

        Tensors, numbers and texts, which `torch.load` reads with ``weights_only``; four times the size of the
        parameters, with a lossy codec five. Call it in ``on_round`` or between steps, in the thread of the
        steps. Raise `InputError` before entering, and while an exchange is under way.
        """
        member = self._joined
        if self._exchanging:
            raise InputError("an exchange is under way: save in on_round, or between two steps")
        return SavedMember(
            terms=self._terms,
            peer=member.node.peer,
            state=member.replica.state,
            residuals=member.residuals.state_dict(),
            outgoing=member.outgoing,
            base=self._base,
            own=self._parameters.read(),
            steps=self._steps,
            samples=self._samples,
        ).as_dict()

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Go on from a `state_dict` on entering: with the same bits, if the run has not gone on meanwhile.

        This peer's own parameters become the saved ones, too. If others have trained on, their parameters are
        fetched, and what this peer had not exchanged yet is kept, unless it did so after saving. Use the same
        ``identity``. Raise `CheckpointError` for what is no state, `RunMismatchError` or `DeltaError` for one
        of another run, other settings of it or other parameters, `InputError` when entered already.
        """
        if self._member is not None:
            raise InputError("load the state before you enter the LocalSteps")
        state = SavedMember.read(saved)
        check_terms(self._terms, state.terms)
        self._saved = state

    async def wait_for_peers(self, count: int, timeout: float = 60.0) -> None:
        """Until ``count`` peers take part, this one included. Raise `DeadlineExceededError`."""
        await self._joined.wait_for_peers(count, timeout)

    def wait_for_peers_sync(self, count: int, timeout: float = 60.0) -> None:
        """`wait_for_peers` for code that cannot await."""
        self._wait(self._joined.wait_for_peers(count, timeout))

    async def __aenter__(self) -> LocalSteps:
        await self._enter()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._leave()

    def __enter__(self) -> LocalSteps:
        background_loop().run(self._enter())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        background_loop().run(self._leave())

    async def _enter(self) -> None:
        if self._member is not None:
            raise InputError("this LocalSteps is entered already")
        saved = self._saved
        async with AsyncExitStack() as stack:
            node, registry = await stack.enter_async_context(self._network())
            if saved is not None and saved.outgoing is not None and saved.peer != node.peer:
                raise InputError(
                    f"the saved state has a delta that was under way from {saved.peer}: use that identity"
                )
            replica = await asyncio.to_thread(self._replica, saved)
            await registry.start()
            member = RunMember(node, registry, self.settings, replica)
            stack.push_async_callback(member.leave)
            await member.join()
            await _to_its_end(self._begin, member, saved)
            self._stack = stack.pop_all()
        self._member, self._saved = member, None
        self._loop = asyncio.get_running_loop()

    async def _leave(self) -> None:
        await self._stack.aclose()
        self._member = self._loop = None

    @property
    def _joined(self) -> RunMember:
        if self._member is None:
            raise InputError("enter the LocalSteps first: async with LocalSteps(...) as steps")
        return self._member

    def _is_due(self, samples: int) -> bool:
        if samples < 1:
            raise InputError(f"a step is on 1 sample or more; got {samples}")
        self._joined  # noqa: B018  (raises)
        self._steps += 1
        self._samples += samples
        return self._steps >= self.settings.every

    def _replica(self, saved: SavedMember | None) -> Replica:
        if saved is not None:
            return Replica(self._terms, saved.state, settled=True)
        return Replica(self._terms, State.first(self._terms, self._parameters.read()))

    def _begin(self, member: RunMember, saved: SavedMember | None) -> None:
        if saved is None or saved.is_outdated(member.replica.state):
            self._start_from(member.replica.state)
            self._steps = self._samples = 0
            return
        member.outgoing = saved.outgoing
        member.residuals.load_state_dict(saved.residuals)
        self._base, self._steps, self._samples = saved.base, saved.steps, saved.samples
        self._parameters.write(saved.own)
        if member.replica.lineage != saved.state.lineage:
            self._go_on(member, saved.base - saved.own)

    def _learned(self, member: RunMember) -> torch.Tensor:
        """What the local steps have changed, and is not in the common parameters yet."""
        delta = self._base - self._parameters.read()
        if member.arrived(member.replica.state) is None:
            return delta
        # The exchange of some of it was cancelled, and it has got in all the same.
        self._go_on(member, delta)
        return self._base - self._parameters.read()

    def _go_on(self, member: RunMember, delta: torch.Tensor) -> None:
        """Go on from the current parameters; what of ``delta`` has not got into them is kept."""
        state = member.replica.state
        arrived = member.arrived(state)
        if arrived is not None:
            delta = delta - arrived.delta
            self._samples -= arrived.samples
            member.outgoing = None
        self._start_from(state)
        if delta.any():
            self._parameters.write(self._base - delta)

    def _start_from(self, state: State) -> None:
        self._parameters.write(state.parameters)
        self._base = self._parameters.read()  # as they were rounded

    def _reported(self, report: RoundReport) -> RoundReport:
        if self._on_round is not None:
            self._on_round(report)
        return report

    @contextmanager
    def _one_exchange(self) -> Iterator[None]:
        if self._exchanging:
            raise InputError("an exchange is under way; wait for its end before the next step")
        self._exchanging = True
        try:
            yield
        finally:
            self._exchanging = False

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        assert self._loop is not None
        try:
            running = asyncio.get_running_loop()
        except RuntimeError:
            running = None
        if running is self._loop:
            coroutine.close()
            raise InputError("a call that waits was made on the loop that it waits for; await step() there")
        return wait_on(self._loop, coroutine)


async def _to_its_end(function: Callable[[*Ts], T], *arguments: *Ts) -> T:
    """In a thread. When cancelled, wait for its end all the same: half-written parameters are of no use."""
    work = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        raise
