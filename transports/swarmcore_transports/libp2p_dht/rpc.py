"""One message to one node of the DHT, and its reply, over a stream that serves for several."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence

import attrs
import trio
from libp2p.abc import INetStream
from libp2p.kad_dht.pb.kademlia_pb2 import Message
from libp2p.peer.id import ID
from libp2p.peer.peerstore import PeerStoreError
from libp2p.utils.varint import encode_varint_prefixed, read_varint_prefixed_bytes_limited
from multiaddr import Multiaddr

from swarmcore_transports.libp2p.host import Host
from swarmcore_transports.libp2p.multiaddrs import preference
from swarmcore_transports.libp2p_dht.server import KAD

_MAX_REPLY = 2**20
_MAX_DIALLED = 3  # addresses of a node
_CLOSE_SECONDS = 1.0
_IDLE_SECONDS = 5.0
_MAX_AGE_SECONDS = 20.0  # age of a stream, as nodes end them at thirty seconds
_SWEEP_SECONDS = 1.0


@attrs.define
class _OpenStream:
    stream: INetStream
    opened: float
    used: float


class MessageSender:
    """Keeps a stream to each node for some seconds: opening one takes ten times as long as a request."""

    def __init__(self, host: Host, timeout: float) -> None:
        self._host = host
        self._timeout = timeout
        self._idle: dict[ID, _OpenStream] = {}

    async def run(self) -> None:
        """Close streams that are not used any more, and all at the end."""
        try:
            while True:
                await trio.sleep(_SWEEP_SECONDS)
                since = trio.current_time() - _IDLE_SECONDS
                for node, one in list(self._idle.items()):
                    # It may have been taken for a request, and put back, while another one was closed.
                    if one.used < since and self._idle.get(node) is one:
                        del self._idle[node]
                        await _close(one.stream)
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _CLOSE_SECONDS):
                for one in list(self._idle.values()):
                    await _close(one.stream)

    async def send_request(self, node: ID, message: Message) -> Message:
        """The reply of ``node``, however long it takes. Raise whatever libp2p raises when there is none."""
        now = trio.current_time()
        kept = self._idle.pop(node, None)
        if kept is not None and kept.opened > now - _MAX_AGE_SECONDS:
            try:
                return await self._send_over(kept, node, message)
            except Exception:  # closed by the node meanwhile
                if message.type == Message.PUT_VALUE:
                    raise  # that is how it refuses
        return await self._send_over(_OpenStream(await self.open(node), now, now), node, message)

    async def _send_over(self, one: _OpenStream, node: ID, message: Message) -> Message:
        reply = Message()
        try:
            await one.stream.write(encode_varint_prefixed(message.SerializeToString()))
            reply.ParseFromString(await read_varint_prefixed_bytes_limited(one.stream, _MAX_REPLY))
        except BaseException:
            await _close(one.stream)
            raise
        one.used = trio.current_time()
        if node in self._idle:
            await _close(one.stream)
        else:
            self._idle[node] = one
        return reply

    async def send_message(self, node: ID, message: Message) -> None:
        """Send what is not answered, or is by some only. Raise as `send_request` does."""
        stream = await self.open(node)
        try:
            await stream.write(encode_varint_prefixed(message.SerializeToString()))
        finally:
            await _close(stream)

    async def open(self, node: ID) -> INetStream:
        """A new stream to ``node``, connected first if need be."""
        if not self._host.connections(node):
            await self.connect(node, self.addresses(node))
        return await self._host.libp2p.new_stream(node, [KAD])

    async def connect(self, node: ID, addresses: Iterable[Multiaddr]) -> None:
        """Connect to ``node`` at the first of its ``addresses`` that answers; raise the last error."""
        error: Exception = PeerStoreError("no address of it is known")
        for address in sorted(addresses, key=preference)[:_MAX_DIALLED]:
            try:
                with trio.fail_after(self._timeout / 2):
                    await self._host.connect(node, address)
                return
            except Exception as exc:
                error = exc
        raise error

    def addresses(self, node: ID) -> Sequence[Multiaddr]:
        """Where ``node`` may be, as far as is known."""
        try:
            return self._host.libp2p.get_peerstore().addrs(node)
        except PeerStoreError:
            return ()


async def _close(stream: INetStream) -> None:
    scope = trio.CancelScope(shield=True, deadline=trio.current_time() + _CLOSE_SECONDS)
    with scope, contextlib.suppress(Exception):  # it may be closed, or its connection lost
        await stream.close()
