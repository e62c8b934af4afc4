"""Rows out of the middle of llama.cpp's graph, and into it: what lets a pass begin and end at any layer.

llama.cpp asks, for each node of the graph that it is about to compute, whether somebody wants to see it.
Nodes are counted, not read: their order is learnt by their names the first time that a graph of a kind is
computed.
"""

from __future__ import annotations

import ctypes
from typing import Any

import attrs
import numpy as np

from swarmcore.errors import InternalError
from swarmcore.executor.ggml.library import Library

Rows = np.ndarray[Any, np.dtype[np.float32]]

_OP, _SOURCES, _VIEW_SOURCE, _NAME = 80, 152, 232, 256
"""Where ggml's struct of a tensor has these fields."""
_TENSOR = 336
_OBJECT = 32
"""Bytes of that struct, and of what ggml keeps beside each."""
_OP_NONE = 0
_F32 = 0
_MAX_KINDS = 64

_GraphKind = tuple[bool, bool, int, int]


@attrs.define
class _Layout:
    """Which nodes matter in graphs of one kind, by the number of the callback at which each comes."""

    enter: int | None = None
    """The node whose rows are replaced."""
    leave: int = 0
    """The node whose rows are the result."""
    idle: dict[int, int] = attrs.field(factory=dict)
    """Nodes that only lead to what is replaced, and what each of them does (ggml's operation)."""


class GraphTap:
    """The evaluation callback of one context. Used by one thread at a time, through `run`'s caller.

    Layers are numbered as in the context's model.
    """

    def __init__(self, library: Library, width: int, layers: int, entrance: str | None = None) -> None:
        """``entrance`` is the node that the first layer takes, where it is not what goes into the graph."""
        self._entrance = entrance
        self._ggml = library.ggml
        self._width, self._layers = width, layers
        self._layouts: dict[_GraphKind, _Layout] = {}
        # With structs that are laid out in another way, nodes that nobody needs are computed all the same.
        self._may_idle = self._ggml.ggml_tensor_overhead() == _TENSOR + _OBJECT
        self._count = 0
        self._next: int | None = None
        self._idle: dict[int, int] = {}
        self._plan: _Plan | None = None
        self.function = library.llama.ggml_backend_sched_eval_callback(self._make())

    def begin(self, first: int, last: int, rows: Rows, outputs: int) -> None:
        """The next evaluation is of the layers ``first:last`` alone, for ``rows``, ``[tokens, width]``.

        ``outputs`` of the rows are marked as outputs; it counts where the last layer is among them.
        """
        kind = len(rows) > 1, outputs == len(rows), first, last
        layout = self._layouts.get(kind)
        wanted = outputs if last == self._layers else len(rows)
        self._plan = plan = _Plan(kind, layout, rows, wanted)
        self._count = 0
        self._next = None
        self._idle = {}
        if layout is not None:
            self._next = layout.leave if layout.enter is None else layout.enter
            self._idle = layout.idle
        plan.entered = first == 0 and self._entrance is None

    def end(self) -> Rows | None:
        """The rows behind the last layer, ``[rows, width]``: all of them, or those of the outputs.

        None when the graph was not as expected: then it has to be evaluated once more, and is learnt anew.

        Raise `InternalError` for what has gone wrong in the callback, and a graph that has no such nodes.
        """
        plan, self._plan = self._plan, None
        if plan is None:
            raise InternalError("nothing was to be evaluated")
        plan.restore()
        if plan.error is not None:
            raise InternalError(f"llama.cpp's graph cannot be read: {plan.error}") from plan.error
        if plan.output is None:
            if plan.layout is None:
                raise InternalError(
                    f"llama.cpp's graph has no rows behind its layer {plan.kind[3] - 1} (l_out); this "
                    f"architecture is not served"
                )
            self._layouts.pop(plan.kind, None)
        return plan.output

    def _make(self) -> Any:
        def callback(tensor: int, ask: bool, _data: object) -> bool:
            self._count = count = self._count + 1
            if count != self._next:
                if self._next is None:
                    return self._guarded(self._learn, tensor, ask)
                if count in self._idle:
                    return self._guarded(self._set_idle, tensor, count)
                return False
            return self._guarded(self._reached, tensor, ask)

        return callback

    def _guarded(self, do: Any, *args: Any) -> bool:
        plan = self._plan
        if plan is None or plan.error is not None:
            return False
        try:
            return bool(do(plan, *args))
        except Exception as exc:  # nothing can be raised through C
            plan.error = exc
            return False

    def _learn(self, plan: _Plan, tensor: int, ask: bool) -> bool:
        if plan.output is not None:
            return False
        if ask:
            plan.nodes.append((self._count, tensor))
            return self._name(tensor) == self._awaited(plan)
        return self._computed(plan, tensor)

    def _reached(self, plan: _Plan, tensor: int, ask: bool) -> bool:
        if ask:
            if self._name(tensor) != self._awaited(plan):
                # Of another make than the one that was learnt. Nothing behind the last event is computed yet.
                plan.restore()
                self._next = None
                self._idle = {}
                return False
            self._next = self._count + 1
            return True
        return self._computed(plan, tensor)

    def _computed(self, plan: _Plan, tensor: int) -> bool:
        """The node that was awaited has its values, and was asked about just before."""
        do = self._leave if plan.entered else self._enter
        return do(plan, tensor, self._count - 1)

    def _awaited(self, plan: _Plan) -> bytes:
        """The name of the node that matters next."""
        first, last = plan.kind[2:]
        if not plan.entered and first == 0 and self._entrance is not None:
            return self._entrance.encode()
        return f"l_out-{last - 1 if plan.entered else first - 1}".encode()

    def _enter(self, plan: _Plan, tensor: int, at: int) -> bool:
        plan.restore()
        self._check(tensor, len(plan.rows))
        self._ggml.ggml_backend_tensor_set(tensor, plan.rows.ctypes.data, 0, plan.rows.nbytes)
        plan.entered, plan.entered_at, plan.entrance = True, at, tensor
        self._next = plan.layout.leave if plan.layout is not None and self._next is not None else None
        return True

    def _leave(self, plan: _Plan, tensor: int, at: int) -> bool:
        # Some architectures leave out the rows that are no outputs in the last layer, others behind it.
        count = len(plan.rows) if self._ggml.ggml_nbytes(tensor) == plan.rows.nbytes else plan.wanted
        self._check(tensor, count)
        output = np.empty((count, self._width), np.float32)
        self._ggml.ggml_backend_tensor_get(tensor, output.ctypes.data, 0, output.nbytes)
        plan.output = output
        if self._next is None:
            while len(self._layouts) >= _MAX_KINDS:
                self._layouts.pop(next(iter(self._layouts)))
            self._layouts[plan.kind] = _Layout(plan.entered_at, at, self._idle_nodes(plan))
        self._next = -1
        return False  # what follows belongs to nobody

    def _idle_nodes(self, plan: _Plan) -> dict[int, int]:
        """The nodes before the entrance on which none behind it depends, but through the entrance."""
        if plan.entered_at is None or not self._may_idle or not plan.learnt_whole:
            return {}
        early = {tensor: at for at, tensor in plan.nodes if at <= plan.entered_at}
        needed: set[int] = set()
        ahead = [tensor for at, tensor in plan.nodes if at > plan.entered_at]
        seen = set(ahead)
        while ahead:
            for source in _sources(ahead.pop()):
                if source not in seen and source != plan.entrance:
                    seen.add(source)
                    if source in early:
                        needed.add(source)
                        ahead.append(source)
        return {at: _operation(tensor).value for tensor, at in early.items() if tensor not in needed}

    def _set_idle(self, plan: _Plan, tensor: int, count: int) -> bool:
        operation = _operation(tensor)
        if operation.value == self._idle[count]:
            plan.idled.append((operation, operation.value))
            operation.value = _OP_NONE
        return False

    def _name(self, tensor: int) -> bytes:
        at = self._ggml.ggml_get_name(tensor)
        if at != tensor + _NAME:
            self._may_idle = False
        return ctypes.string_at(at)

    def _check(self, tensor: int, rows: int) -> None:
        nbytes = self._ggml.ggml_nbytes(tensor)
        if nbytes != rows * self._width * 4 or ctypes.c_int32.from_address(tensor).value != _F32:
            raise InternalError(f"{rows} rows of {self._width} values were expected, not {nbytes} bytes")


@attrs.define
class _Plan:
    """One evaluation."""

    kind: _GraphKind
    layout: _Layout | None
    rows: Rows
    wanted: int
    """Rows of the result."""
    entered: bool = False
    entered_at: int | None = None
    entrance: int = 0
    nodes: list[tuple[int, int]] = attrs.field(factory=list)
    """While a graph is learnt: each node asked about, and at which callback."""
    idled: list[tuple[ctypes.c_int32, int]] = attrs.field(factory=list)
    output: Rows | None = None
    error: Exception | None = None

    @property
    def learnt_whole(self) -> bool:
        return bool(self.nodes) and self.nodes[0][0] == 1

    def restore(self) -> None:
        """Let idle nodes do again what they did: the graph may be used for the next evaluation."""
        for operation, value in self.idled:
            operation.value = value
        self.idled.clear()


def _operation(tensor: int) -> ctypes.c_int32:
    return ctypes.c_int32.from_address(tensor + _OP)


def _sources(tensor: int) -> list[int]:
    found = (ctypes.c_void_p * 10).from_address(tensor + _SOURCES)
    view = ctypes.c_void_p.from_address(tensor + _VIEW_SOURCE).value
    return [source for source in (*found, view) if source]
