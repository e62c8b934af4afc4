"""A swarm of server processes on this machine whose members are killed, frozen and replaced."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import attrs

from swarmcore.tasks import deadline_after
from swarmcore.testing.fork_server import ForkServer
from swarmcore.testing.processes import ServerProcess
from swarmcore.types import PeerId, Span

if TYPE_CHECKING:
    from swarmcore.client.swarm import Swarm

SEEN_TIMEOUT = 60.0
"""Seconds for news of a server to reach a client."""


@attrs.frozen
class Member:
    """A server process, and the blocks it was started with."""

    process: ServerProcess
    span: Span

    @property
    def peer(self) -> PeerId:
        return PeerId(self.process.peer)

    def __str__(self) -> str:
        return f"{self.process.pid} [{self.span}]"


class Fleet:
    """Servers that hold each of ``spans`` of ``model`` ``replicas`` times, and a bootstrap peer.

    ``arguments`` go to every ``swarmcore serve``. With ``bootstrap``, an address, they join that swarm, and
    have no bootstrap peer of their own. Entering waits until all are online, leaving stops them.
    """

    def __init__(
        self,
        fork_server: ForkServer,
        model: str,
        spans: Sequence[Span],
        *,
        replicas: int = 2,
        transport: str = "tcp",
        listen: str = "127.0.0.1:0",
        bootstrap: str | None = None,
        arguments: Sequence[str] = (),
    ) -> None:
        self.fork_server = fork_server
        self.model = model
        self.spans = tuple(spans)
        self.replicas = replicas
        self.bootstrap: ServerProcess | None = None
        self.members: dict[PeerId, Member] = {}
        """The servers that live: those that were killed or stopped are not among them."""
        self._network = ("--transport", transport, "--listen", listen)
        self._outside = bootstrap
        self._arguments = ("--model", model, *arguments)
        self._background: set[asyncio.Task[object]] = set()

    def __repr__(self) -> str:
        return f"<Fleet {', '.join(map(str, self.members.values()))}>"

    @property
    def addresses(self) -> tuple[str, ...]:
        """Where to join: the bootstrap peer while there is one, and one of the servers."""
        found = [self._outside] if self._outside is not None else []
        if self.bootstrap is not None and self.bootstrap.returncode is None:
            found.append(self.bootstrap.address)
        found += [member.process.address for member in list(self.members.values())[:1]]
        return tuple(found)

    def holding(self, span: Span) -> list[Member]:
        """The servers that live and were started with ``span``."""
        return [member for member in self.members.values() if member.span == span]

    async def start(self, span: Span, *arguments: str) -> Member:
        """Start one more server of ``span``; it is online when this returns."""
        joined = [option for address in self.addresses for option in ("--bootstrap", address)]
        process = await self.fork_server.start(
            "serve",
            *self._arguments,
            *("--blocks", str(span)),
            *self._network,
            *joined,
            *arguments,
        )
        member = Member(process, span)
        self.members[member.peer] = member
        return member

    def start_soon(self, span: Span, *arguments: str) -> None:
        """`start` in the background; `settle` waits for it."""
        self._in_background(self.start(span, *arguments))

    def kill(self, peer: PeerId) -> Member:
        """SIGKILL, now; the process is reaped in the background."""
        member = self.members.pop(peer)
        member.process.signal(signal.SIGKILL)
        self._in_background(member.process.kill())
        return member

    def leave(self, peer: PeerId) -> Member:
        """SIGTERM: the server leaves in good order, in its own time."""
        member = self.members.pop(peer)
        self._in_background(member.process.stop())
        return member

    async def settle(self, span: Span | None = None) -> None:
        """Wait for servers that are starting and ending; with ``span``, only until it has all its replicas.

        Raise what kept a server from starting.
        """
        while self._background and (span is None or len(self.holding(span)) < self.replicas):
            done, _ = await asyncio.wait(self._background, return_when=asyncio.FIRST_COMPLETED)
            self._background -= done
            for task in done:
                task.result()

    async def seen_by(self, swarm: Swarm, span: Span | None = None) -> None:
        """Wait until ``swarm`` takes every living server, or those of ``span``, for online."""
        awaited = self.members if span is None else [member.peer for member in self.holding(span)]
        changes = swarm.registry.changes()
        missed = f"{swarm!r} does not see all of {self!r} in {SEEN_TIMEOUT:.0f} s"
        async with deadline_after(SEEN_TIMEOUT, missed):
            while True:
                view = swarm.view().servers
                if all(p in view and view[p].state == "online" for p in awaited):
                    return
                await anext(changes)

    async def __aenter__(self) -> Self:
        try:
            if self._outside is None:
                self.bootstrap = await self.fork_server.start("bootstrap", *self._network)
            async with asyncio.TaskGroup() as group:
                for span in self.spans:
                    for _ in range(self.replicas):
                        group.create_task(self.start(span))
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._stop()

    async def _stop(self) -> None:
        # Starts and ends have deadlines of their own.
        results = await asyncio.gather(*self._background, return_exceptions=True)
        self._background.clear()
        processes = [member.process for member in self.members.values()]
        if self.bootstrap is not None:
            processes.append(self.bootstrap)
        self.members.clear()
        await asyncio.gather(*(process.stop() for process in processes))
        for failure in results:
            if isinstance(failure, BaseException):
                raise failure

    def _in_background(self, work: Coroutine[Any, Any, object]) -> None:
        self._background.add(asyncio.create_task(work))
