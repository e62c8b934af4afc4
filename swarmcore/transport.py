"""The transport seam: ordered, reliable, authenticated streams of whole messages between two peers.

A backend subclasses `Transport` and `Stream` and registers itself under the entry-point group
``swarmcore.transports``; nothing else in swarmcore knows which backends exist. `swarmcore.testing` ships the
contract suite that a backend has to pass.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection, Sequence
from importlib.metadata import EntryPoint
from typing import ClassVar

from swarmcore.errors import (
    InputError,
    StreamClosedError,
    UnavailableError,
    UnknownTransportError,
)
from swarmcore.identity import Identity
from swarmcore.plugins import PluginGroup
from swarmcore.resources import ResourceManager
from swarmcore.types import Address, PeerId
from swarmcore.wire.limits import Limits

logger = logging.getLogger(__name__)

Buffer = bytes | bytearray | memoryview
"""What `Stream.send` takes. A memoryview must be C-contiguous and of format ``"B"``."""

TRANSPORTS = PluginGroup(
    "transport",
    "swarmcore.transports",
    extras={"libp2p": "libp2p", "webrtc": "webrtc"},
    unknown=UnknownTransportError,
)
"""The installed backends; the name of each is its scheme."""


class Stream(ABC):
    """A two-way sequence of messages with one authenticated peer.

    Messages arrive whole, in order, once. `send` and `receive` may each be used by one task at a time. Every
    method may be cancelled; a cancelled `send` aborts the stream when part of the message is already under
    way, a cancelled `receive` loses nothing.
    """

    remote: PeerId
    """The peer at the other end, proven by the transport before the stream opened."""
    path: str
    """How the bytes travel: ``"direct"``, ``"hole-punched"`` or ``"relayed"``."""

    @abstractmethod
    async def send(self, *buffers: Buffer) -> None:
        """Send one message, the concatenation of ``buffers``; wait while the peer is slow to read.

        The buffers may be reused once this returns. Raise `MessageTooLargeError` above ``limits.max_message``
        (the stream stays usable), `StreamClosedError` after `end` or `close`, `StreamAbortedError` or
        `ConnectionLostError` when the other side is gone.
        """

    @abstractmethod
    async def receive(self) -> memoryview:
        """Wait for the next whole message; the caller owns its memory, which is writable.

        Raise `StreamClosedError` after the remote's last message, `StreamAbortedError` when it aborted,
        `ConnectionLostError` when the connection broke.
        """

    @abstractmethod
    async def end(self) -> None:
        """Half-close: no more messages from this side. The remote still receives all that was sent."""

    @abstractmethod
    async def close(self) -> None:
        """Release the stream in good order: what was sent is still delivered, what comes in is dropped.

        Returns within seconds even when the remote does not answer. Closing twice is harmless.
        """

    @abstractmethod
    def abort(self, reason: str) -> None:
        """Drop the stream at once; the remote's calls raise `StreamAbortedError` with ``reason``.

        ``reason`` is cut to 200 characters. Safe to call at any time, from a `finally` too.
        """


OnStream = Callable[[Stream], Awaitable[None]]
"""Called in a task of its own for each incoming stream; the stream is closed when it returns."""


class Transport(ABC):
    """Opens streams to peers and accepts theirs. Connections, pools and relays are its own business.

    ``listen_on`` are the places to listen, in the backend's own notation (for TCP ``"host:port"``);
    ``announce`` replaces the addresses that `listen` returns, for hosts behind a forwarded port.
    """

    scheme: ClassVar[str]
    """The scheme of its addresses: ``"tcp"``, ``"libp2p"``, …"""
    default_places: ClassVar[tuple[str, ...]] = ()
    """Where a server listens that was not told where; none when no place works everywhere. ``{port}`` in them
    stands for a port that is chosen for it."""
    finds_neighbours: ClassVar[bool] = False
    """Whether `find_neighbours` works."""

    def __init__(
        self,
        identity: Identity,
        *,
        limits: Limits | None = None,
        listen_on: Sequence[str] = (),
        announce: Sequence[str] = (),
    ) -> None:
        self.identity = identity
        self.limits = limits or Limits()
        self.listen_on = tuple(listen_on)
        self.announce = tuple(announce)
        self.resources = ResourceManager.of_calls(self.limits.max_calls, self.limits.max_calls_per_peer)
        """What remote peers hold here. Whoever runs several transports sets one for all of them before they
        are used."""
        self.on_addresses: Callable[[tuple[Address, ...]], None] = lambda addresses: None
        """For whoever runs this transport to set: called with the addresses to announce whenever they are no
        longer those that `listen` returned, as when a relay is found or lost."""

    @abstractmethod
    async def listen(self, on_stream: OnStream) -> tuple[Address, ...]:
        """Start to accept streams and return the addresses to announce, each ending in this peer's id.

        Raise `AddressInUseError` or `AddressError` when a place cannot be listened on.
        """

    def allow_only(self, peers: Collection[PeerId]) -> None:  # noqa: B027 - most have nothing to do
        """The swarm is closed: do nothing by itself for others than ``peers``, such as relaying.

        Called before `listen`, and again whenever the list has changed. Streams of others are accepted
        still: whoever handles them refuses them with a reason.
        """

    def notes(self) -> Sequence[str]:
        """What whoever runs this transport should know about how it is reached, a sentence each.

        Nothing when all is as it should be.
        """
        return ()

    def preference(self, address: Address) -> int:
        """Which of a peer's addresses to try first: the lowest, at equality the first announced."""
        return 0

    @classmethod
    def address_at(cls, place: str, peer: PeerId) -> Address:
        """The address of ``peer`` at a place in the notation of ``announce``, such as ``example.org:4001``.

        Raise `AddressError` when it is none.
        """
        location = place.removesuffix(f"/{peer}")
        return Address(cls.scheme, location if location.startswith("/") else f"//{location}", peer)

    async def find_neighbours(self, on_found: Callable[[tuple[Address, ...]], None]) -> None:
        """Look for peers on the local network until closed, and let them find this one if it listens.

        ``on_found`` gets the addresses of one peer at a time, which nobody has proven. Raise `InputError`
        when this transport has no way to look, `UnavailableError` when this machine does not let it.
        """
        raise InputError(f"transport {self.scheme!r} does not find peers on the local network")

    @abstractmethod
    async def open_stream(self, address: Address) -> Stream:
        """Open a stream to ``address.peer`` and no other.

        Raise `PeerUnreachableError` when nobody answers within ``limits.connect_timeout`` seconds and
        `PeerIdentityError` when somebody else does.
        """

    @abstractmethod
    async def close(self) -> None:
        """Stop listening, abort every open stream, release every socket and task. Harmless when repeated."""


async def serve_stream(stream: Stream, on_stream: OnStream) -> None:
    """Run the handler of an incoming stream and close the stream after it, whatever comes of it.

    What a backend runs, in a task of its own, for each stream that it accepts. Nothing but a cancellation
    comes out: when the handler fails, the stream is aborted, with the reason where the peer or the network
    is to blame, and logged as an error where this side is.
    """
    try:
        await on_stream(stream)
    except StreamClosedError:
        pass  # the peer's last message was the end of the conversation
    except UnavailableError as exc:
        logger.debug("%r: %r", stream, exc)
        stream.abort(exc.message)
    except Exception:
        logger.exception("the handler of %r failed", stream)
        stream.abort("the peer failed to handle the stream")
    finally:
        await stream.close()


def installed_transports() -> dict[str, EntryPoint]:
    """The installed transport backends by scheme."""
    return TRANSPORTS.installed()


def transport_class(scheme: str) -> type[Transport]:
    """Load the backend for ``scheme``.

    Raise `UnknownTransportError` when none is installed, listing those that are, and `MissingExtraError`
    when the backend is there but a library it needs is not.
    """
    loaded = TRANSPORTS.load(scheme)
    if not (isinstance(loaded, type) and issubclass(loaded, Transport)):
        value = TRANSPORTS.installed()[scheme].value
        raise UnknownTransportError(f"entry point {value!r} is not a Transport subclass")
    return loaded
