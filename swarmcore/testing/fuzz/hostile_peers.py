"""Random records, and those who send them: bytes to the bare port, frames before the proof and after it."""

from __future__ import annotations

import asyncio
import contextlib
import math
import ssl
import struct
import types
import typing
from collections import Counter
from random import Random
from typing import Any

import attrs

from swarmcore.errors import SwarmError
from swarmcore.identity import Identity
from swarmcore.testing.executor import COUNTING_MODEL
from swarmcore.testing.fuzz.target import FuzzTarget
from swarmcore.transport import Stream, Transport, transport_class
from swarmcore.types import PeerId
from swarmcore.wire.framing import encode_message
from swarmcore.wire.limits import Limits
from swarmcore.wire.tensors import Tensor

_INTS = (0, 1, 2, 3, 5, -1, 2**31 - 1, 2**32, 2**62, 2**63 - 1, -(2**63))
_FLOATS = (0.0, 0.5, 1.0, 5.0, -1.0, 1e300, math.inf, -math.inf, math.nan)
_TEXTS = ("", "x", "raw", "int8", "raw+zstd", "all", "none", "off", "servers", "../../x", "\x1b[2J", "ü" * 50)


class RecordMaker:
    """Makes records of attrs classes. ``plausible`` holds values to choose from, by the name of a field."""

    def __init__(self, rng: Random, plausible: dict[str, tuple[Any, ...]], peers: tuple[PeerId, ...]) -> None:
        self._rng = rng
        self._plausible = plausible
        self._peers = peers

    def make(self, record_type: type, depth: int = 0) -> Any:
        """A record of ``record_type``."""
        hints = typing.get_type_hints(record_type)
        fields = attrs.fields(record_type)
        return record_type(**{field.name: self._field(field, hints, depth) for field in fields})

    def _field(self, field: Any, hints: dict[str, Any], depth: int) -> Any:
        roll = self._rng.random()
        if roll < 0.7 and field.name in self._plausible:
            return self._rng.choice(self._plausible[field.name])
        if roll < 0.5 and field.default is not attrs.NOTHING and not isinstance(field.default, attrs.Factory):  # type: ignore[arg-type]
            return field.default
        return self._value(hints[field.name], depth)

    def _value(self, hint: Any, depth: int) -> Any:
        rng, origin = self._rng, typing.get_origin(hint)
        if origin in (typing.Union, types.UnionType):
            return self._value(rng.choice(typing.get_args(hint)), depth)
        if origin is tuple:
            of = typing.get_args(hint)[0]
            longest = 4 if depth < 3 else 0
            count = rng.randrange(longest + 1) if rng.random() < 0.95 else 30 * longest
            return tuple(self._value(of, depth + 1) for _ in range(count))
        if origin is dict:
            return {}
        if origin is typing.Literal:
            return rng.choice(typing.get_args(hint))
        if attrs.has(hint):
            return self.make(hint, depth + 1)
        if hint is bool:
            return rng.random() < 0.5
        if hint is int:
            return rng.choice(_INTS)
        if hint is float:
            return rng.choice(_FLOATS)
        if hint is bytes:
            return rng.randbytes(rng.choice((0, 8, 16, 64, 2048)))
        if hint is PeerId:
            return rng.choice(self._peers)
        if hint is str:
            return rng.choice(_TEXTS)
        return None


# What msgpack, our frames and our headers read as "so much follows".
_LENGTHS = (b"\xdd", b"\xdf", b"\xc6", b"\xdb", b"\xc9", b"\xdc", b"\xde")
_SIZES = (0, 1, 2**20, 2**26, 2**26 + 1, 2**31, 2**32 - 1)


def mutate(data: bytes, rng: Random) -> bytes:
    """``data`` with a few changes, most of them near its beginning, where the lengths are."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3, 8))):
        at = rng.randrange(min(len(changed), 400) + 1)
        match rng.randrange(7):
            case 0 if changed:
                changed[at % len(changed)] ^= 1 << rng.randrange(8)
            case 1:
                changed[at : at + 1] = rng.choice(_LENGTHS)
            case 2:
                del changed[at : at + rng.randrange(1, 20)]
            case 3:
                changed[at:at] = rng.randbytes(rng.randrange(1, 9))
            case 4:
                changed[at : at + 4] = rng.choice(_SIZES).to_bytes(4, "little")
            case 5:
                changed[at:at] = rng.choice((b"\x91", b"\x81\xa0", b"\xc0")) * rng.randrange(1, 3000)
            case _:
                changed[at:at] = changed[max(0, at - 40) : at]
    return bytes(changed)


_LIMITS = Limits()
_FRAME = struct.Struct("<BII")
_IDENTITIES = 8
_PATIENCE = 10.0


class HostilePeers:
    """Several peers that send what ``rng`` says; `counts` is what they did."""

    def __init__(self, target: FuzzTarget, rng: Random) -> None:
        self.counts: Counter[str] = Counter()
        self._target = target
        self._rng = rng
        self._transports: list[Transport] = []
        kind = transport_class(target.address.scheme)
        for _ in range(_IDENTITIES):
            self._transports.append(kind(Identity.from_seed(rng.randbytes(32))))
        self._sessions = tuple(rng.randbytes(16).hex() for _ in range(16))
        peers = (target.address.peer, *(one.identity.peer for one in self._transports))
        self._maker = RecordMaker(rng, self._plausible(), peers)
        server = target.server.node.served
        self._openings = [
            *((name, (method.request,), ()) for name, method in server.methods.items()),
            *((name, protocol.openings, protocol.to_acceptor) for name, protocol in server.protocols.items()),
        ]

    def _plausible(self) -> dict[str, tuple[Any, ...]]:
        blocks = COUNTING_MODEL.blocks
        return {
            "fingerprint": (COUNTING_MODEL.fingerprint,),
            "start": (0, 0, 0, 3),
            "end": (blocks, blocks, 6),
            "session": self._sessions,
            "sequences": (1, 1, 2),
            "tokens": (0, 16),
            "starts": ((0,), (1,), (0, 0)),
            "lengths": ((1,), (2,), (1, 1)),
            "codec": ("raw",),
            "deadline": (0.5, 5.0),
            "addresses": ((str(self._target.address),),),
            "chain": ((),),
            "adapter": (None,),
            "sources": ((),),
        }

    async def run(self, seconds: float, at_once: int = 12) -> None:
        """Send for so long. Raise `FuzzFailure` as soon as the server has failed."""
        end = asyncio.get_running_loop().time() + seconds

        async def work() -> None:
            while asyncio.get_running_loop().time() < end:
                act = self._rng.choices((self._bytes, self._tls, self._talk), (1, 1, 8))[0]
                try:
                    async with asyncio.timeout(_PATIENCE):
                        await act()
                except (OSError, SwarmError, TimeoutError) as exc:  # ssl.SSLError is an OSError
                    self.counts[type(exc).__name__] += 1
                self._target.check()

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(at_once):
                    group.create_task(work())
        finally:
            await asyncio.gather(*(transport.close() for transport in self._transports))

    def _port(self) -> tuple[str, int]:
        host, _, port = self._target.address.location[2:].rpartition(":")
        return host, int(port)

    async def _bytes(self) -> None:
        """To the port, as from a program that speaks something else."""
        self.counts["connections"] += 1
        _, writer = await asyncio.open_connection(*self._port())
        hello = b"\x16\x03\x01\x02\x00\x01" + self._rng.randbytes(300)
        for _ in range(self._rng.randrange(1, 4)):
            writer.write(
                self._rng.choice(
                    (self._rng.randbytes(200), hello, b"GET / HTTP/1.1\r\n\r\n", b"\x05\x01\x00")
                )
            )
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        writer.transport.abort()

    async def _tls(self) -> None:
        """Frames within TLS, from somebody who proves nothing."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["swarmcore/1"])
        self.counts["connections"] += 1
        _, writer = await asyncio.open_connection(*self._port(), ssl=context, server_hostname="")
        for _ in range(self._rng.randrange(1, 20)):
            writer.write(self._frame())
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        writer.transport.abort()

    async def _talk(self) -> None:
        """A stream with one opening message and what may follow it, more or less."""
        transport = self._rng.choice(self._transports)
        stream = await transport.open_stream(self._target.address)
        self.counts["streams"] += 1
        try:
            name, openings, following = self._rng.choice(self._openings)
            await self._say(stream, self._rng.choice(openings), name, clean=0.8)
            for _ in range(self._rng.randrange(20) if following else 0):
                await self._say(stream, self._rng.choice(following), clean=0.5)
                if self._rng.random() < 0.05:
                    self._write_frames(stream)
            if self._rng.random() < 0.3:
                async with asyncio.timeout(self._rng.random()):
                    await stream.receive()
        finally:
            if self._rng.random() < 0.5:
                stream.abort("enough")
            else:
                await stream.close()

    async def _say(self, stream: Stream, record_type: type, method: str = "", *, clean: float) -> None:
        record = self._maker.make(record_type)
        tensors = [self._tensor(name) for name in self._rng.choice(((), ("hidden",), ("hidden", "other")))]
        timeout = self._rng.choice((None, 1.0, 5.0)) if method else None
        try:
            buffers = encode_message(record, tensors, _LIMITS, method=method, timeout=timeout)
        except (SwarmError, ValueError, TypeError, OverflowError):
            return  # too absurd to be sent
        data = b"".join(buffers)
        if self._rng.random() > clean:
            data = mutate(data, self._rng)
        await stream.send(data)
        self.counts["messages"] += 1

    def _tensor(self, name: str) -> Tensor:
        rows = self._rng.choice((0, 1, 2, 64))
        width = COUNTING_MODEL.hidden_size
        data = bytearray(self._rng.randbytes(4 * width) * rows)
        tensor = Tensor(name, "float32", (rows, width), memoryview(data))
        if self._rng.random() < 0.2:
            return attrs.evolve(tensor, dtype=self._rng.choice(("int64", "float16", "uint8")))
        return tensor

    def _write_frames(self, stream: Stream) -> None:
        """Bytes that are no message into what carries ``stream``, where the transport lets us."""
        connection = getattr(stream, "_connection", None)
        if connection is not None:
            self.counts["frames"] += 1
            connection.write(self._frame())

    def _frame(self) -> bytes:
        rng = self._rng
        sizes = (0, 1, 40, 65536, 2**26, 2**32 - 1)
        frame = _FRAME.pack(rng.choice((*range(16), 255)), rng.choice(sizes), rng.choice(sizes))
        return mutate(frame + rng.randbytes(rng.choice((0, 12, 140))), rng)
