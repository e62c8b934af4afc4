"""Transports that are measured, what they are compared with, and the figures that are found."""

from __future__ import annotations

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import attrs
from rich.table import Table

from swarmcore.errors import InputError
from swarmcore.identity import Identity
from swarmcore.transport import Transport, transport_class

_PLACES = {"libp2p": "/ip4/{host}/tcp/0"}

_YARDSTICKS = {
    "tcp": "swarmcore.bench.bare_tls:BareTls",
    "libp2p": "swarmcore.bench.bare_libp2p:BareLibp2p",
}


@attrs.frozen
class Contender:
    """A transport, or one engine of a transport that has several.

    ``engine`` is what its class is made with, its own choice when empty.
    """

    scheme: str
    engine: str = ""

    @classmethod
    def parse(cls, text: str) -> Contender:
        """Read ``SCHEME`` or ``SCHEME:ENGINE``. Raise `InputError`."""
        scheme, colon, engine = text.partition(":")
        if not scheme or (colon and not engine):
            raise InputError(
                f"{text!r} is not of the form SCHEME or SCHEME:ENGINE, such as tcp or webrtc:aiortc"
            )
        return cls(scheme, engine)

    def __str__(self) -> str:
        return f"{self.scheme}:{self.engine}" if self.engine else self.scheme

    def make(self, listen_on: Sequence[str] = ()) -> Transport:
        """A transport with an identity of its own.

        Raise `UnknownTransportError` or `MissingExtraError` when there is no such transport, `InputError`
        when it has no such engine.
        """
        backend: Callable[..., Transport] = transport_class(self.scheme)
        options: dict[str, Any] = {"listen_on": listen_on}
        if self.engine:
            if "engine" not in inspect.signature(backend).parameters:
                raise InputError(
                    f"transport {self.scheme} has no engines to choose from; leave out :{self.engine}"
                )
            options["engine"] = self.engine
        return backend(Identity.generate(), **options)


def contenders(names: Sequence[str], *, place: str = "") -> list[Contender]:
    """Each of ``names`` once, parsed.

    Raise `InputError` when there is none, or several and a ``place``, which is in the notation of one.
    """
    found = [Contender.parse(name) for name in dict.fromkeys(names)]
    if not found:
        raise InputError("nothing to measure; name transports, such as tcp,webrtc")
    if place and len(found) > 1:
        raise InputError(f"{place!r} could be a place of any of {', '.join(names)}; measure one at a time")
    return found


def place_at(scheme: str, host: str) -> str:
    """A free place on ``host``, an IPv4 address, in the notation of ``scheme``, HOST:PORT if not known."""
    return _PLACES.get(scheme, "{host}:0").format(host=host)


class Yardstick(ABC):
    """What a transport is compared with: the plainest use of the library that it builds on, in the same run.

    Echoes and swallows messages between two processes, with nothing of swarmcore's in between.
    """

    name: str

    @abstractmethod
    def serve(self) -> str:
        """Listen on loopback in a thread of its own, until the process ends; return where."""

    @abstractmethod
    def round_trips(self, place: str, size: int, count: int) -> list[float]:
        """Seconds of each of ``count`` echoes of ``size`` bytes, one after the other."""

    @abstractmethod
    def rate(self, place: str, size: int, count: int) -> float:
        """Bytes per second of ``count`` messages of ``size`` bytes, to the receiver's acknowledgement."""


def yardstick_of(scheme: str) -> Yardstick | None:
    """The yardstick for transport ``scheme``; None when it has none."""
    path = _YARDSTICKS.get(scheme)
    if path is None:
        return None
    module, _, name = path.partition(":")
    return cast(Yardstick, getattr(importlib.import_module(module), name)())


@attrs.frozen
class Figure:
    """One measured figure of one contender."""

    name: str
    value: float
    unit: str
    """``"ms"``, ``"MB/s"``, ``"ms/MB"``, ``"KB"`` or ``"ratio"``."""


def figures_table(results: Mapping[str, Sequence[Figure]], *, title: str, caption: str) -> Table:
    """A row for each figure, a column for each contender; what a contender lacks stays empty."""
    table = Table(title=title, caption=caption)
    table.add_column("measured")
    for contender in results:
        table.add_column(contender, justify="right")
    table.add_column("unit")
    fullest_first = sorted(results.values(), key=len, reverse=True)
    rows = {(figure.name, figure.unit): None for figures in fullest_first for figure in figures}
    values = {
        (contender, figure.name): figure.value for contender, figures in results.items() for figure in figures
    }
    for name, unit in rows:
        cells = [_cell(values.get((contender, name)), unit) for contender in results]
        table.add_row(name, *cells, unit)
    return table


def _cell(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    whole = unit == "KB" or (unit == "MB/s" and value >= 100)
    return f"{value:,.{0 if whole else 1 if unit == 'MB/s' else 2}f}"
