"""What is measured: a transport, or one engine of a transport that has several."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import attrs

from swarmcore.errors import InputError
from swarmcore.identity import Identity
from swarmcore.transport import Transport, transport_class

_PLACES = {"libp2p": "/ip4/{host}/tcp/0"}


@attrs.frozen
class Contender:
    """Transport ``scheme``; ``engine`` is what its class is made with, its own choice when empty."""

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
