"""Those who send it: bytes to the bare port, frames before the proof, messages and frames after it."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import struct
from collections import Counter
from random import Random
from typing import Any

import attrs

from swarmcore.errors import SwarmError
from swarmcore.identity import Identity
from swarmcore.testing.executor import COUNTING_MODEL
from swarmcore.testing.fuzz.records import RecordMaker, mutate
from swarmcore.testing.fuzz.target import FuzzTarget
from swarmcore.transport import Stream, Transport, transport_class
from swarmcore.wire.framing import encode_message
from swarmcore.wire.limits import Limits
from swarmcore.wire.tensors import Tensor

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
