"""Rows that come in pieces, put together again, at either end of a pass."""

from __future__ import annotations

from swarmcore.errors import SwarmError
from swarmcore.wire.passes import Rows
from swarmcore.wire.tensors import FLOATS, Tensor


class RowsIntake:
    """Puts the pieces of one kind of rows together. Memory grows with what has come, not with what will."""

    def __init__(self, kind: str, rows: int, width: int, refusal: type[SwarmError]) -> None:
        """``rows`` of ``width`` values are to come; ``refusal`` is raised for any others."""
        self.kind = kind
        self._rows, self._width = rows, width
        self._refusal = refusal
        self._received = 0
        self._dtype = ""
        self._values = bytearray()

    @property
    def complete(self) -> bool:
        return self._received == self._rows

    def check(self, record: Rows, hidden: Tensor) -> None:
        """Raise the refusal unless these rows, still encoded, come next, in the form that is expected."""
        if record.kind != self.kind:
            raise self._refusal(f"rows of the {record.kind[:32]!r} came where {self.kind} were expected")
        if record.first != self._received:
            raise self._refusal(
                f"rows of the {self.kind} from {record.first} on came where those from {self._received} on "
                f"were expected"
            )
        rows = hidden.shape[0] if len(hidden.shape) == 2 else 0
        if rows < 1 or hidden.shape[1] != self._width or self._received + rows > self._rows:
            raise self._refusal(
                f"rows of the {self.kind} have shape {list(hidden.shape)}; expected {self._width} values in "
                f"each of 1 to {self._rows - self._received} rows"
            )
        if hidden.dtype not in FLOATS or (self._dtype and hidden.dtype != self._dtype):
            expected = self._dtype or ", ".join(FLOATS)
            raise self._refusal(f"rows of the {self.kind} are {hidden.dtype!r}; expected {expected}")

    def add(self, hidden: Tensor) -> None:
        """Take in rows that were checked and decoded."""
        self._dtype = hidden.dtype
        self._values += hidden.data
        self._received += hidden.shape[0]

    def whole(self) -> Tensor:
        """All rows, raw; once it is complete."""
        return Tensor("hidden", self._dtype, (self._rows, self._width), memoryview(self._values))
