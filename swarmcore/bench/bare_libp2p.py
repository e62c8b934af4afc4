"""The baseline for libp2p: py-libp2p itself, inside trio, with a length before each message and no more."""

from __future__ import annotations

import queue
import struct
import threading
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio
from libp2p import generate_new_ed25519_identity, new_host
from libp2p.abc import IHost, INetStream
from libp2p.crypto.x25519 import create_new_key_pair
from libp2p.custom_types import TProtocol
from libp2p.network.config import ConnectionConfig
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from multiaddr import Multiaddr

from swarmcore.bench.contender import Yardstick

T = TypeVar("T")

_PROTOCOL = TProtocol("/swarmcore/bare/1")
_HEADER = struct.Struct("<IB")
_ECHO, _SINK, _SINK_LAST = range(3)


class BareLibp2p(Yardstick):
    """TCP, Noise and Yamux as py-libp2p comes, written to and read from by one task a side."""

    name = "bare py-libp2p stream"

    def serve(self) -> str:
        ready: queue.SimpleQueue[str] = queue.SimpleQueue()

        async def main() -> None:
            host = _host()
            listen = Multiaddr("/ip4/127.0.0.1/tcp/0")
            async with host.run(listen_addrs=[listen]):
                host.set_stream_handler(_PROTOCOL, _answer)
                ready.put(str(host.get_addrs()[0]))
                await trio.sleep_forever()

        threading.Thread(target=trio.run, args=(main,), daemon=True).start()
        return ready.get(timeout=30)

    def round_trips(self, place: str, size: int, count: int) -> list[float]:
        async def measure(stream: INetStream) -> list[float]:
            message, times = _HEADER.pack(size, _ECHO) + bytes(size), []
            for _ in range(count):
                started = time.perf_counter()
                await stream.write(message)
                await _read(stream, size)
                times.append(time.perf_counter() - started)
            return times

        return _connected(place, measure)

    def rate(self, place: str, size: int, count: int) -> float:
        async def measure(stream: INetStream) -> float:
            body = bytes(size)
            started = time.perf_counter()
            for left in reversed(range(count)):
                await stream.write(_HEADER.pack(size, _SINK if left else _SINK_LAST) + body)
            await _read(stream, 1)
            return size * count / (time.perf_counter() - started)

        return _connected(place, measure)


def _connected(place: str, measure: Callable[[INetStream], Awaitable[T]]) -> T:
    async def main() -> T:
        host = _host()
        async with host.run(listen_addrs=[]):
            peer = info_from_p2p_addr(Multiaddr(place))
            await host.connect(peer)
            stream = await host.new_stream(peer.peer_id, [_PROTOCOL])
            result = await measure(stream)
            await host.close()
            return result

    return trio.run(main)


def _host() -> IHost:
    keys = generate_new_ed25519_identity()
    noise = NoiseTransport(keys, noise_privkey=create_new_key_pair().private_key)
    config = ConnectionConfig(min_connections=0, low_watermark=0, high_watermark=0)
    return new_host(key_pair=keys, sec_opt={NOISE: noise}, connection_config=config)


async def _answer(stream: INetStream) -> None:
    while True:
        size, kind = _HEADER.unpack(await _read(stream, _HEADER.size))
        body = await _read(stream, size)
        if kind == _ECHO:
            await stream.write(body)
        elif kind == _SINK_LAST:
            await stream.write(b"\x01")


async def _read(stream: INetStream, size: int) -> bytes:
    parts: list[bytes] = []
    while size:
        part = await stream.read(size)
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
