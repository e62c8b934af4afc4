"""What gossip costs: ``python -m swarmcore.bench.gossip 10 30 100``.

Runs whole swarms of the given sizes in this process, on virtual time and a memory network with 20 ms of delay
each way, and prints how fast news spreads, how fast deaths do, and what each member sends, message headers
included.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import aclosing
from random import Random
from typing import Any

import attrs

from swarmcore.identity import Identity
from swarmcore.testing import clock
from swarmcore.testing.faulty import Faults, FaultyTransport
from swarmcore.testing.gossip import GossipSwarm
from swarmcore.testing.memory import MemoryNetwork
from swarmcore.testing.registry_contract import Member
from swarmcore.transport import Buffer, OnStream, Stream, Transport
from swarmcore.types import Address, ModelInfo, ServerInfo, Span

TTL = 300.0
REFRESH = TTL / 3
DELAY = 0.02
MODEL = ModelInfo("org/some-model-70B", "f" * 64, blocks=80, hidden_size=8192)


@attrs.define
class Traffic:
    nbytes: int = 0


@attrs.frozen
class Cost:
    """One swarm's figures."""

    members: int
    most_know: float
    """Seconds from an announcement until 9 in 10 members know it."""
    all_know: float
    """Seconds until the last one does."""
    killed: float
    """Seconds from the end of a process until it is in nobody's view."""
    hung: float
    """The same for one that falls silent, its connections still open."""
    calls: float
    """Calls per second that a member makes when nothing happens but refreshes."""
    rate: float
    """Bytes per second that a member sends then, answers included."""


class CountingTransport(Transport):
    """Counts the bytes that pass through another transport, both ways of the streams it opens."""

    def __init__(self, inner: Transport, traffic: Traffic) -> None:
        super().__init__(inner.identity, limits=inner.limits, listen_on=inner.listen_on)
        self.scheme = inner.scheme  # type: ignore[misc]
        self.inner = inner
        self._traffic = traffic

    async def listen(self, on_stream: OnStream) -> tuple[Address, ...]:
        return await self.inner.listen(on_stream)

    async def open_stream(self, address: Address) -> Stream:
        return _CountingStream(await self.inner.open_stream(address), self._traffic)

    async def close(self) -> None:
        await self.inner.close()


class _CountingStream(Stream):
    def __init__(self, inner: Stream, traffic: Traffic) -> None:
        self.remote, self.path = inner.remote, inner.path
        self._inner = inner
        self._traffic = traffic

    async def send(self, *buffers: Buffer) -> None:
        self._traffic.nbytes += sum(map(len, buffers))
        await self._inner.send(*buffers)

    async def receive(self) -> memoryview:
        message = await self._inner.receive()
        self._traffic.nbytes += message.nbytes
        return message

    async def end(self) -> None:
        await self._inner.end()

    async def close(self) -> None:
        await self._inner.close()

    def abort(self, reason: str) -> None:
        self._inner.abort(reason)


async def measure(members: int, seed: int = 0) -> Cost:
    """Run one swarm; takes no virtual time of anybody else's loop."""
    network, traffic, random = MemoryNetwork(), Traffic(), Random(seed)

    def transport(identity: Identity, listen: bool) -> Transport:
        counting = CountingTransport(network.transport(identity, listen=listen), traffic)
        return FaultyTransport(counting, random, Faults(delay=DELAY))

    async with aclosing(GossipSwarm(transport, seed=seed)) as swarm:
        peers = [await swarm.join() for _ in range(members)]
        for peer in peers:
            await peer.registry.announce(_info(peer), TTL)
        for peer in peers:
            await swarm.until(peer, lambda view: len(view) == members)
        await asyncio.sleep(REFRESH)

        sent, seconds = traffic.nbytes, REFRESH
        calls = swarm.calls()
        await asyncio.sleep(seconds)
        calls_rate = (swarm.calls() - calls) / seconds / members
        rate = (traffic.nbytes - sent) / seconds / members

        started = asyncio.get_running_loop().time()
        news = _info(peers[0], cache_tokens_free=1)
        await peers[0].registry.announce(news, TTL)
        learned = await asyncio.gather(*(_seconds_until_known(swarm, p, news, started) for p in peers))
        learned.sort()

        killed, hung = peers.pop(), peers.pop()
        await swarm.crash(killed)
        killed_known = await _seconds_until_gone(swarm, [hung, *peers], killed)
        await asyncio.sleep(30.0)
        swarm.hang(hung)
        hung_known = await _seconds_until_gone(swarm, peers, hung)
        return Cost(
            members, learned[int(0.9 * members) - 1], learned[-1], killed_known, hung_known, calls_rate, rate
        )


async def _seconds_until_gone(swarm: GossipSwarm, peers: list[Member], gone: Member) -> float:
    started = asyncio.get_running_loop().time()
    for peer in peers:
        await swarm.until(peer, lambda view: gone.identity.peer not in view.servers)
    return asyncio.get_running_loop().time() - started


async def _seconds_until_known(swarm: GossipSwarm, peer: Member, news: ServerInfo, started: float) -> float:
    await swarm.until(peer, lambda view: view.servers.get(news.peer) == news)
    return asyncio.get_running_loop().time() - started


def _info(member: Member, **fields: Any) -> ServerInfo:
    return member.info(model=MODEL, span=Span(0, 10), dtype="bfloat16", cache_tokens=8192, **fields)


def main(sizes: list[int]) -> None:
    print(f"ttl {TTL:g} s; news are known by 9 in 10 and by all; deaths by all; at rest, per member:")  # noqa: T201
    print("members   9 in 10      all   killed     hung   calls/s   bytes/s")  # noqa: T201
    for size in sizes:
        cost = clock.run(measure(size))
        spread = "  ".join(f"{s:5.2f} s" for s in (cost.most_know, cost.all_know, cost.killed, cost.hung))
        print(f"{size:7}   {spread}   {cost.calls:7.2f}   {cost.rate:7.0f}", flush=True)  # noqa: T201


if __name__ == "__main__":
    main([int(size) for size in sys.argv[1:]] or [10, 30, 100])
