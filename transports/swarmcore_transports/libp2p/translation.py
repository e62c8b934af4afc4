"""The one place where errors of trio and libp2p become errors of swarmcore."""

from __future__ import annotations

import errno
import os
import re

import trio
from libp2p.exceptions import BaseLibp2pError
from libp2p.host.exceptions import StreamFailure
from libp2p.io.exceptions import IOException
from libp2p.network.exceptions import SwarmException
from libp2p.network.stream.exceptions import StreamEOF, StreamError
from libp2p.stream_muxer.exceptions import MuxedStreamError
from libp2p.transport.exceptions import OpenConnectionError, SecurityUpgradeFailure, UpgradeFailure

from swarmcore.errors import (
    ConnectionLostError,
    InternalError,
    PeerIdentityError,
    PeerUnreachableError,
    ProtocolError,
    StreamClosedError,
    SwarmError,
)

_IDENTITY_SIGNS = ("peer id mismatch", "does not match", "doesn't match", "does not correspond")

_OTHER_PEER = re.compile(r"remote_peer_id_from_pubkey=(\w+)")
_UNKNOWN_PROTOCOL = "not supported"
_NO_SUCH_NAME = "IP address not found in multiaddr"

_UNREACHABLE = (SwarmException, OpenConnectionError, OSError, trio.TooSlowError, BaseLibp2pError)


def translated(error: BaseException) -> SwarmError:
    """What ``error`` means to swarmcore. A `SwarmError` is returned as it is."""
    error = _innermost(error)
    if isinstance(error, SwarmError):
        return error
    chain = _chain(error)
    text = _text(chain)
    if any(sign in text.lower() for sign in _IDENTITY_SIGNS):
        found = _OTHER_PEER.search(text)
        other = found[1] if found else "another"
        return PeerIdentityError(
            f"the peer that answered is not the one that was dialled, but {other}: it has a new key, or "
            f"another one has its place; ask for the new address"
        )
    if any(isinstance(link, SecurityUpgradeFailure) for link in chain):
        return PeerIdentityError(
            f"what answers does not prove who it is by Noise; is it a libp2p peer, at this port? {text}"
        )
    if any(isinstance(link, StreamFailure) for link in chain) and _UNKNOWN_PROTOCOL not in text:
        return PeerUnreachableError(
            f"the connection broke before the peer took the stream: {text}; try again"
        )
    if any(isinstance(link, UpgradeFailure | StreamFailure) for link in chain):
        return ProtocolError(
            f"the peer does not speak what was asked; is it a peer of swarmcore, in this version? {text}"
        )
    if isinstance(error, StreamEOF):
        return StreamClosedError("the peer has ended the stream")
    if isinstance(error, StreamError | MuxedStreamError | IOException | trio.BrokenResourceError):
        return ConnectionLostError(f"the connection broke: {text}")
    if _NO_SUCH_NAME in text:
        return PeerUnreachableError(
            "no address is known for that name; check its spelling and the connection"
        )
    if isinstance(error, _UNREACHABLE):
        return PeerUnreachableError(f"cannot reach the peer: {text}")
    if isinstance(error, trio.Cancelled):
        return StreamClosedError("this transport is closed")
    return InternalError(f"libp2p failed unexpectedly: {type(error).__name__}: {text}")


def _innermost(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup) and error.exceptions:
        error = error.exceptions[0]
    return error


def _chain(error: BaseException) -> list[BaseException]:
    found: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in found:
        found.append(link)
        link = link.__cause__ and _innermost(link.__cause__)
    return found


def _text(chain: list[BaseException]) -> str:
    """The first words of the chain that say something, and the reason at its end."""
    for link in reversed(chain):
        if isinstance(link, OSError) and link.errno:
            return os.strerror(link.errno) if link.errno != errno.EINPROGRESS else "it does not answer"
    for link in reversed(chain):
        if str(link).strip():
            return " ".join(str(link).split())[:300]
    return type(chain[0]).__name__
