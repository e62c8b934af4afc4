"""Text that comes in pieces: what is iterated over, however it is made."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from types import TracebackType
from typing import Generic, Self, TypeVar

Piece = TypeVar("Piece")


class GeneratedPieces(Generic[Piece]):
    """An asynchronous iterator of pieces that is made by a generator, and can be closed before its end.

    The generator must not know this object: when the last reference to it goes, in the middle of a loop that
    was left, the event loop then closes the generator at once.
    """

    def __init__(self, pieces: AsyncGenerator[Piece, None]) -> None:
        self._pieces = pieces

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Piece:
        return await self._pieces.__anext__()

    async def aclose(self) -> None:
        """End it here, and release what was opened for it. Harmless when it has ended."""
        await self._pieces.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose()
