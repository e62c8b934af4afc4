"""Where py-libp2p's own log messages go."""

from __future__ import annotations

import logging
import os

logger = logging.getLogger(__name__)


class _Demoted(logging.Handler):
    """Says again at level DEBUG, in the name of this module, what the library says at whatever level.

    What it warns of is daily life on the Internet: peers that go, scanners, handshakes that fail. What a user
    should know of that, this transport says itself.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("%s: %s", record.name, record.getMessage())


def demote_library() -> None:
    """From now on, nothing of py-libp2p is above DEBUG, and its talk about every frame is left out.

    Without this, Python would print its warnings on stderr. Where ``LIBP2P_DEBUG`` is set in the environment,
    the library logs as it says there.
    """
    library = logging.getLogger("libp2p")
    if not os.environ.get("LIBP2P_DEBUG") and not any(isinstance(one, _Demoted) for one in library.handlers):
        library.addHandler(_Demoted())
        library.setLevel(logging.INFO)
    addresses = logging.getLogger("multiaddr")
    if addresses.level == logging.NOTSET:
        addresses.setLevel(logging.INFO)  # at DEBUG it tells of every byte of every address
    _bind_root_messages()


def _bind_root_messages() -> None:
    """One module logs through the root logger, which gives every program that uses it a handler on stderr."""
    from libp2p.network.connection import swarm_connection

    if vars(swarm_connection).get("logging") is logging:
        swarm_connection.logging = logging.getLogger(swarm_connection.__name__)  # type: ignore[assignment, attr-defined]
