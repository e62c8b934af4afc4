"""A peer in a network namespace: a process that a test drives, one line of JSON for each call."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE
from collections.abc import Awaitable, Callable
from typing import Any, Self

from nat_lab import Host, NatLab

from swarmcore.transport import Stream

PATIENCE = 30.0
_LONGEST_LINE = 2**20


class LabPeer:
    """Runs on ``host`` of ``lab`` until the lab ends.

    ``options`` are those of the transport ``scheme``; ``keepalive`` is one of `Limits`.
    """

    def __init__(self, lab: NatLab, host: Host, *, scheme: str = "libp2p", **options: Any) -> None:
        self._lab = lab
        self._host = host
        self._options = options | {"scheme": scheme}

    async def start(self) -> Self:
        """Start it, listening where ``listen_on`` says."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        argv = [sys.executable, "-m", "lab_peer", json.dumps(self._options)]
        self.process = await self._lab.run(
            self._host, argv, stdin=PIPE, stdout=PIPE, env=environment, limit=_LONGEST_LINE
        )
        self.peer: str = await self._answer()
        return self

    async def call(self, name: str, *arguments: Any) -> Any:
        """What the function ``name`` below returns for ``arguments``."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps([name, *arguments]).encode() + b"\n")
        return await self._answer()

    async def until(self, name: str, *arguments: Any, shows: Callable[[Any], object]) -> Any:
        """Call ``name`` again and again until ``shows`` of the answer is true; that answer."""
        async with asyncio.timeout(PATIENCE):
            while not shows(answer := await self.call(name, *arguments)):
                await asyncio.sleep(0.02)
            return answer

    async def _answer(self) -> Any:
        assert self.process.stdout
        async with asyncio.timeout(PATIENCE):
            line = await self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer on {self._host} ended")
        return json.loads(line)

    async def kill(self) -> None:
        """End it at once, without a word to its peers."""
        self.process.kill()
        await self.process.wait()

    async def close(self) -> None:
        """End it as a user would, and wait until it has."""
        assert self.process.stdin
        self.process.stdin.close()
        async with asyncio.timeout(PATIENCE):
            await self.process.wait()


class Flow:
    """Numbered messages over ``stream`` and back, without end until `stop`."""

    _UNDER_WAY = 8
    _SIZE = 30_000

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._room = asyncio.Semaphore(self._UNDER_WAY)
        self._enough = False
        self.back = 0
        self._done = asyncio.gather(self._send(), self._receive())

    def so_far(self) -> int:
        if self._done.done():
            self._done.result()
        return self.back

    async def stop(self) -> int:
        self._enough = True
        await self._done
        return self.back

    async def _send(self) -> None:
        number = 0
        while not self._enough:
            await self._room.acquire()
            await self._stream.send(self._message(number))
            number += 1
        await self._stream.send(b"the end")

    async def _receive(self) -> None:
        while (message := bytes(await self._stream.receive())) != b"the end":
            assert message == self._message(self.back)
            self.back += 1
            self._room.release()

    def _message(self, number: int) -> bytes:
        return number.to_bytes(8, "little") + bytes([number % 251]) * self._SIZE


async def _serve(options: dict[str, Any]) -> None:
    from swarmcore.errors import SwarmError
    from swarmcore.identity import Identity
    from swarmcore.transport import transport_class
    from swarmcore.types import Address, PeerId
    from swarmcore.wire.limits import Limits

    if options.pop("library_dcutr", False):
        from hole_punching_times import use_library

        use_library()
    make: Callable[..., Any] = transport_class(options.pop("scheme"))
    limits = Limits(keepalive=options.pop("keepalive", Limits().keepalive))
    transport = make(Identity.generate(), limits=limits, **options)
    streams: list[Stream] = []
    flows: dict[int, Flow] = {}
    listening: list[Address] = []

    async def echo(stream: Stream) -> None:
        while True:
            await stream.send(await stream.receive())

    async def addresses() -> list[str]:
        found = transport._announced() if hasattr(transport, "_announced") else listening
        return [str(address) for address in found]

    async def open_stream(address: str) -> int:
        streams.append(await transport.open_stream(Address.parse(address)))
        return len(streams) - 1

    async def exchange(number: int, sizes: list[int]) -> None:
        """Send a message of each size over the stream, and compare what comes back."""
        for size in sizes:
            await streams[number].send(bytes(size))
            assert bytes(await streams[number].receive()) == bytes(size)

    async def flow(number: int) -> None:
        """Send messages over the stream from now on, some of them under way at a time, and check the echo."""
        flows[number] = Flow(streams[number])

    async def flowed(number: int) -> int:
        """How many messages have come back. Raise what has ended the flow, if something has."""
        return flows[number].so_far()

    async def stop(number: int) -> int:
        """Send no more; how many messages have come back, once all have."""
        return await flows[number].stop()

    async def restarts() -> int:
        return int(transport._connector.restarter.begun)

    async def end(number: int) -> str:
        """How the stream ends, once it does."""
        try:
            await streams[number].receive()
        except SwarmError as exc:
            return type(exc).__name__
        return "a message"

    async def path(number: int) -> str:
        """Of the stream, after a message there and back."""
        await streams[number].send(b"message")
        assert bytes(await streams[number].receive()) == b"message"
        return streams[number].path

    async def connections(peer: str) -> list[str]:
        from libp2p.peer.id import ID

        assert transport._host
        return [
            str(one.get_connection_type().name) for one in transport._host.connections(ID.from_string(peer))
        ]

    async def status(peer: str) -> str:
        assert transport._services
        return transport._services.hole_puncher.status(PeerId(peer))

    async def reached() -> str:
        assert transport._services
        return transport._services.autonat.status

    async def notes() -> list[str]:
        return list(transport.notes())

    functions: list[Callable[..., Awaitable[Any]]] = [
        addresses,
        open_stream,
        exchange,
        path,
        flow,
        flowed,
        stop,
        restarts,
        end,
        connections,
        status,
        reached,
        notes,
    ]
    calls = {function.__name__: function for function in functions}
    if transport.listen_on:
        listening += await transport.listen(echo)
    print(json.dumps(transport.identity.peer), flush=True)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        name, *arguments = json.loads(line)
        print(json.dumps(await calls[name](*arguments)), flush=True)
    await transport.close()


if __name__ == "__main__":
    asyncio.run(_serve(json.loads(sys.argv[1])))
