"""What can be called on a peer: a name, a version, and the records that travel."""

from __future__ import annotations

import re
from typing import Any, Generic, TypeVar

import attrs

from swarmcore.errors import InputError
from swarmcore.types import PeerId

Req = TypeVar("Req")
Rep = TypeVar("Rep")

_NAME = re.compile(r"(/[a-z0-9_.-]+)+/[1-9][0-9]{0,5}")
_NAME_LENGTH = 128


def _check_name(_instance: Any, _field: Any, name: str) -> None:
    if len(name) > _NAME_LENGTH or not _NAME.fullmatch(name):
        raise InputError(
            f"{name!r} does not name a method; expected a path that ends in its version: /app/verb/1"
        )


@attrs.frozen
class Method(Generic[Req, Rep]):
    """A unary call: one ``request`` record, one ``reply`` record.

    The number at the end of ``name`` is the version: a change that an older peer would misread takes a new
    one.
    """

    name: str = attrs.field(validator=_check_name)
    request: type[Req]
    reply: type[Rep]


@attrs.frozen
class Protocol:
    """A two-way channel: an opening record, then records and tensors in both directions in any order."""

    name: str = attrs.field(validator=_check_name)
    openings: tuple[type, ...]
    """Record types that may open the channel."""
    to_acceptor: tuple[type, ...]
    """What the opener may send afterwards."""
    to_opener: tuple[type, ...]
    """What the acceptor may send."""


@attrs.frozen
class Caller:
    """Who calls, and until when an answer is of use."""

    peer: PeerId
    """Proven by the transport."""
    path: str
    """How the caller is connected: ``"direct"``, ``"hole-punched"`` or ``"relayed"``."""
    deadline: float
    """Loop time at which the handler is cancelled."""
