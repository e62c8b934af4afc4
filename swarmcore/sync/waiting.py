"""What the synchronous classes have in common; their methods are generated, see `swarmcore.sync.faces`."""

from __future__ import annotations

from collections.abc import Awaitable, Iterator
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from swarmcore.loop_thread import LoopThread

Piece = TypeVar("Piece", covariant=True)
T = TypeVar("T")


async def awaited(work: Awaitable[T]) -> T:
    return await work


class Face:
    """A synchronous class over an asynchronous one: a context manager that closes itself at the end."""

    asynchronous: Any

    def __init__(self, loop: LoopThread, asynchronous: Any) -> None:
        self.loop = loop
        self.asynchronous = asynchronous

    def close(self) -> None:
        """Close it, and free what it has on servers. Harmless when repeated."""
        self.loop.run(self.asynchronous.close())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return repr(self.asynchronous)


class SwarmFace(Face):
    """Closed when the process ends, unless it is closed before."""

    def __init__(self, loop: LoopThread, asynchronous: Any) -> None:
        super().__init__(loop, asynchronous)
        loop.opened(self)

    def close(self) -> None:
        """Close the swarm and the models loaded from it. Harmless when repeated."""
        self.loop.closed(self)
        super().close()


class Pieces(Generic[Piece]):
    """An iterator over what an asynchronous iterator makes, one piece for each turn."""

    def __init__(self, loop: LoopThread, pieces: Any) -> None:
        self.loop = loop
        self._pieces = pieces

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        piece: Piece | None = self.loop.run(self._next())
        if piece is None:
            raise StopIteration
        return piece

    def close(self) -> None:
        """End it here, and clean up. Harmless when it has ended."""
        self.loop.run(self._pieces.aclose())

    async def _next(self) -> Piece | None:
        try:
            found: Piece = await anext(self._pieces)
        except StopAsyncIteration:  # it cannot leave a task
            return None
        return found


class WholeText(Pieces[str]):
    """A text that is being generated: iterate over its pieces, or take it whole."""

    asynchronous: Any

    def __init__(self, loop: LoopThread, asynchronous: Any) -> None:
        super().__init__(loop, asynchronous)
        self.asynchronous = asynchronous

    def text(self) -> str:
        """The whole text, or what is left of it."""
        return "".join(self)

    def __repr__(self) -> str:
        return repr(self.asynchronous)
