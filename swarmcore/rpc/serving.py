"""The accepting side: from the first message of a stream to a handler, and from its outcome to the caller."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from swarmcore.errors import (
    DeadlineExceededError,
    InputError,
    ProtocolError,
    RemoteFaultError,
    SwarmError,
)
from swarmcore.resources import Priority, Resource, ResourceManager
from swarmcore.rpc.channel import Channel, ReadAhead
from swarmcore.tasks import deadline_after, deadline_at
from swarmcore.transport import Buffer, Stream
from swarmcore.types import short
from swarmcore.wire.failure import Failure, to_failure
from swarmcore.wire.framing import decode_header, decode_message, encode_message, kinds_of
from swarmcore.wire.limits import Limits
from swarmcore.wire.method import Caller, Method, Protocol

logger = logging.getLogger(__name__)

MAX_TIMEOUT = 86_400.0
"""Longest deadline, in seconds, that a caller can set."""
_SHORT = 4096
_GROWTH = 16
"""Most bytes of memory that a byte of a header takes as a record: small objects in long lists."""
UNREAD_TIMEOUT = 60.0
"""Seconds in which a caller has to take the answer to its call, however late its deadline."""
_REFUSAL_TIMEOUT = 5.0
"""Seconds in which a failure has to get through to a peer that may not be reading."""

CallHandler = Callable[[Any, Caller], Awaitable[Any]]
ChannelHandler = Callable[[Channel], Awaitable[None]]


class Server:
    """The methods and protocols that a node serves, and how one incoming stream is served."""

    def __init__(self, limits: Limits, resources: ResourceManager) -> None:
        self._limits = limits
        self._resources = resources
        self._calls: dict[str, tuple[Method[Any, Any], CallHandler]] = {}
        self._channels: dict[str, tuple[Protocol, ChannelHandler]] = {}

    def add_call(self, method: Method[Any, Any], handler: CallHandler) -> None:
        self._check_new(method.name)
        self._calls[method.name] = (method, handler)

    def add_channel(self, protocol: Protocol, handler: ChannelHandler) -> None:
        self._check_new(protocol.name)
        self._channels[protocol.name] = (protocol, handler)

    def _check_new(self, name: str) -> None:
        if name in self.names():
            raise InputError(f"{name} has a handler already")

    @property
    def methods(self) -> dict[str, Method[Any, Any]]:
        """Those that are served, by name."""
        return {name: method for name, (method, _) in self._calls.items()}

    @property
    def protocols(self) -> dict[str, Protocol]:
        """Those that are served, by name."""
        return {name: protocol for name, (protocol, _) in self._channels.items()}

    def names(self) -> list[str]:
        """What is served, sorted."""
        return sorted([*self._calls, *self._channels])

    async def serve(self, stream: Stream) -> None:
        """Read the opening message and run its handler to the end, whatever the peer does meanwhile."""
        failure: Failure | None = None
        try:
            data = await self._opening(stream)
            with self._resources.reserve(stream.remote, Resource.BYTES, self._cost(len(data))):
                name = decode_header(data, self._limits).method
                if name in self._calls:
                    await self._serve_call(stream, data, *self._calls[name])
                elif name in self._channels:
                    await self._serve_channel(stream, data, *self._channels[name])
                else:
                    failure = to_failure(self._unknown(name))
        except _PeerGone as gone:
            logger.debug("%s left: %s", short(stream.remote), gone)
        except SwarmError as exc:
            # Not the error itself: its traceback holds what the peer has sent for as long as it is kept.
            failure = to_failure(exc)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                stream.abort("the peer is shutting down")
                raise
            failure = to_failure(self._fault(stream, "was cancelled from inside"))
        except Exception:
            failure = to_failure(self._fault(stream, "failed"))
        if failure is not None:
            await self.refuse(stream, failure)

    def _cost(self, nbytes: int) -> int:
        """Most memory that an opening message takes, decoded and as it came; short ones are free."""
        return 0 if nbytes <= _SHORT else nbytes + _GROWTH * min(nbytes, self._limits.max_header)

    async def refuse(self, stream: Stream, failure: Failure) -> None:
        """Send ``failure`` in place of an answer and release the stream."""
        with contextlib.suppress(SwarmError, TimeoutError):
            async with asyncio.timeout(_REFUSAL_TIMEOUT):
                await stream.send(*encode_message(failure, (), self._limits))
                await stream.close()

    async def _opening(self, stream: Stream) -> memoryview:
        seconds = self._limits.connect_timeout

        def silent() -> ProtocolError:
            return ProtocolError(f"no message came within {seconds:g} s of opening the stream")

        async with deadline_after(seconds, silent):
            try:
                return await stream.receive()
            except SwarmError as exc:
                raise _PeerGone(exc.message) from exc

    async def _serve_call(
        self, stream: Stream, data: memoryview, method: Method[Any, Any], handler: CallHandler
    ) -> None:
        timeout = decode_header(data, self._limits).timeout
        if timeout is None or not timeout > 0:
            raise ProtocolError(f"a call of {method.name} needs a timeout above zero, got {timeout}")
        message = decode_message(data, kinds_of(method.request), self._limits)
        deadline = asyncio.get_running_loop().time() + min(timeout, MAX_TIMEOUT)
        caller = Caller(stream.remote, stream.path, deadline)

        async def answer(_ahead: ReadAhead) -> None:
            reply = await handler(message.record, caller)
            if type(reply) is not method.reply:
                raise TypeError(f"the handler of {method.name} returned {type(reply).__name__}")
            await self._send_answer(stream, encode_message(reply, (), self._limits))

        await _run_until_gone(stream, deadline, method.name, answer)

    async def _send_answer(self, stream: Stream, buffers: Sequence[Buffer]) -> None:
        """Send the answer to a call, counted for the caller until it has taken it."""
        nbytes = sum(map(len, buffers))
        if nbytes <= _SHORT:
            nbytes = 0
        with self._resources.reserve(stream.remote, Resource.BYTES, nbytes, priority=Priority.MEDIUM):
            async with deadline_after(UNREAD_TIMEOUT, f"the answer was not taken in {UNREAD_TIMEOUT:g} s"):
                await stream.send(*buffers)

    async def _serve_channel(
        self, stream: Stream, data: memoryview, protocol: Protocol, handler: ChannelHandler
    ) -> None:
        opening = decode_message(data, kinds_of(*protocol.openings), self._limits)

        async def converse(ahead: ReadAhead) -> None:
            channel = Channel(
                stream,
                opening,
                self._limits,
                sends=protocol.to_opener,
                receives=protocol.to_acceptor,
                receive=ahead.receive,
                on_close=ahead.disarm,
            )
            try:
                await handler(channel)
            except SwarmError as exc:
                if exc is channel.remote_end:
                    raise _PeerGone(exc.message) from exc
                raise
            finally:
                channel.remote_end = None  # as in `ReadAhead.stop`

        await _run_until_gone(stream, None, protocol.name, converse)

    def _unknown(self, name: str) -> ProtocolError:
        stem = name.rpartition("/")[0] + "/"
        versions = [known for known in self.names() if known.rpartition("/")[0] + "/" == stem]
        spoken = ", ".join(versions or self.names()) or "nothing"
        return ProtocolError(f"this peer does not serve {name[:128]!r}; it serves {spoken}")

    def _fault(self, stream: Stream, what: str) -> RemoteFaultError:
        logger.exception("a handler %s while serving %s", what, short(stream.remote))
        return RemoteFaultError("the peer failed while it served the call; its log has the traceback")


class _PeerGone(Exception):
    """The other side ended, aborted or vanished: there is nobody left to answer."""


async def _run_until_gone(
    stream: Stream, deadline: float | None, name: str, run: Callable[[ReadAhead], Awaitable[None]]
) -> None:
    """Run a handler; cancel it at ``deadline`` and when the peer is gone."""
    handler = asyncio.current_task()
    lost: SwarmError | None = None

    def on_lost(error: SwarmError) -> None:
        nonlocal lost
        lost = error
        if handler is not None and handler.cancelling():
            return  # its clean-up is not to be cut short
        with contextlib.suppress(RuntimeError):  # the handler is through, or is being cancelled already
            clock.reschedule(asyncio.get_running_loop().time())

    def reason() -> Exception:
        if lost is not None:
            return _PeerGone(lost.message)
        return DeadlineExceededError(f"the caller's deadline passed while {name} ran")

    ahead = ReadAhead(stream, on_lost)
    try:
        async with deadline_at(deadline, reason) as clock:
            await run(ahead)
    finally:
        await ahead.stop()
