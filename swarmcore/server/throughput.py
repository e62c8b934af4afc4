"""How fast a server is: its computation and its network, measured when it starts."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import attrs
import msgspec

from swarmcore.errors import SwarmError
from swarmcore.executor.base import BlockExecutor, ScheduledChunk, Segment, SequenceId
from swarmcore.executor.loader import THREADS_WORTH
from swarmcore.rpc.node import Node
from swarmcore.types import ServerInfo
from swarmcore.wire.messages import Ping
from swarmcore.wire.protocols import PING_METHOD
from swarmcore.wire.tensors import ITEM_BYTES, Tensor

logger = logging.getLogger(__name__)

PREFILL_TOKENS = 128
"""Tokens of the pass that forward speed is measured with."""

COMPUTE_SECONDS = 0.6
"""Seconds after which each of the two measurements of computation is not repeated once more."""

MAX_REPEATS = 16

MAX_PEERS = 3
"""Peers that the network rate is measured to; the best of them counts, since others may be slower than we."""

PAYLOAD = 256 * 1024
"""Bytes that travel to a peer and back at each measurement of the network."""

PAYLOADS = 3
"""Measurements to one peer: the first ones find out how much the connection takes."""

PEER_TIMEOUT = 5.0
"""Most seconds spent on one peer."""

_SCRATCH = SequenceId(-1)


@attrs.frozen
class ComputeSpeed:
    """How fast one block is computed on this machine."""

    decode_rps: float
    """Steps of one token per second."""
    forward_rps: float
    """Tokens per second when there are many in one pass."""
    decode_threads: int = 0
    """Compute threads with which few tokens go fastest; 0 where there was nothing to choose."""
    forward_threads: int = 0
    """Compute threads with which many tokens go fastest."""


@attrs.frozen
class ServerSpeed:
    """All that is known of a server's speed before it has served anyone. 0 stands for what is not known."""

    compute: ComputeSpeed = ComputeSpeed(0.0, 0.0)
    network_rps: float = 0.0
    """Tokens per second that can come in and go out."""
    stated: float = 0.0
    """What the user says the server carries through its whole span, in tokens per second."""

    def throughput(self, blocks: int) -> float:
        """Tokens per second through ``blocks`` blocks, all sessions together: the least of what limits it."""
        limits = [self.compute.forward_rps / blocks, self.network_rps]
        return self.stated or min((limit for limit in limits if limit > 0), default=0.0)

    def describe(self, blocks: int) -> str:
        """In words, for people."""
        if self.stated:
            return f"{self.stated:,.0f} tokens/s through {blocks} blocks, as stated"
        network = f"{self.network_rps:,.0f} tokens/s by network" if self.network_rps else "network unknown"
        speed = self.compute
        threads = ""
        if speed.decode_threads:
            threads = f", with {speed.decode_threads} and {speed.forward_threads} threads"
        return (
            f"{speed.decode_rps / blocks:,.1f} decode steps/s and "
            f"{speed.forward_rps / blocks:,.0f} tokens/s through {blocks} blocks{threads}; {network}"
        )


async def measure_compute(executor: BlockExecutor) -> ComputeSpeed:
    """Run a prompt and single tokens through all blocks of ``executor``, which nobody else uses yet.

    Where it has a choice of threads, the fastest are found for both, and used from then on. Takes a second or
    two for each number of threads that is tried, more where one pass takes longer than that.
    """
    executor.reserve(_SCRATCH, -(-(PREFILL_TOKENS + 1) // executor.page) * executor.page)
    try:
        forward, forward_threads = await _fastest(executor, 0, PREFILL_TOKENS)
        decode, decode_threads = await _fastest(executor, PREFILL_TOKENS, 1)
    finally:
        executor.release(_SCRATCH)
    if decode_threads:
        executor.use_threads(decode_threads, forward_threads)
    blocks = len(executor.span)
    return ComputeSpeed(
        blocks / decode if decode > 0 else 0.0,
        PREFILL_TOKENS * blocks / forward if forward > 0 else 0.0,
        decode_threads,
        forward_threads,
    )


async def measure_network(
    node: Node, servers: Sequence[ServerInfo], token_bytes: int, rng: random.Random
) -> float:
    """Tokens of ``token_bytes`` per second between this peer and a few of ``servers``; 0 when none answers.

    Each of at most `MAX_PEERS` peers echoes `PAYLOADS` messages of `PAYLOAD` bytes.
    """
    others = [server for server in servers if server.peer != node.peer and server.addresses]
    chosen = rng.sample(others, min(MAX_PEERS, len(others)))
    rates = [await _rate_to(node, server) for server in chosen]
    return max(rates, default=0.0) / token_bytes


async def _fastest(executor: BlockExecutor, start: int, count: int) -> tuple[float, int]:
    """The seconds of `_pass_seconds` with the best number of threads, and that number; 0: no choice.

    Fewer are tried for as long as they take hardly longer (`THREADS_WORTH`): waking and joining threads for
    each small operation can cost more than they bring.
    """
    taken, threads = math.inf, 0
    for choice in executor.thread_choices:
        executor.use_threads(choice, choice)
        seconds = await _pass_seconds(executor, start, count)
        if seconds > THREADS_WORTH * taken:
            break
        taken, threads = seconds, choice
    return (taken, threads) if threads else (await _pass_seconds(executor, start, count), 0)


async def _pass_seconds(executor: BlockExecutor, start: int, count: int) -> float:
    """Seconds that ``count`` tokens at position ``start`` take, the first time not counted; the median."""
    loop = asyncio.get_running_loop()
    hidden = _hidden(executor, count)
    segment = Segment(_SCRATCH, start, count)
    seconds: list[float] = []
    began = loop.time()
    for repeat in range(MAX_REPEATS + 1):
        before = loop.time()
        [result] = await executor.step([ScheduledChunk(hidden, 0, executor.span, (segment,), reply="last")])
        if isinstance(result, SwarmError):
            raise result
        after = loop.time()
        if repeat:
            seconds.append(after - before)
            if after - began > COMPUTE_SECONDS:
                break
    return statistics.median(seconds)


def _hidden(executor: BlockExecutor, tokens: int) -> Tensor:
    """Hidden states of ones and minus ones: any values do, as long as norms have something to divide by."""
    one, minus_one = {
        "float32": (b"\x00\x00\x80\x3f", b"\x00\x00\x80\xbf"),
        "bfloat16": (b"\x80\x3f", b"\x80\xbf"),
        "float16": (b"\x00\x3c", b"\x00\xbc"),
    }[executor.dtype]
    width = executor.model.hidden_size
    values = (one + minus_one) * -(-tokens * width // 2)
    size = tokens * width * ITEM_BYTES[executor.dtype]
    return Tensor("hidden", executor.dtype, (tokens, width), memoryview(values)[:size])


async def _rate_to(node: Node, server: ServerInfo) -> float:
    """Bytes per second to ``server`` and back, both ways at once; 0 when it does not answer in time."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + PEER_TIMEOUT
    empty, best = math.inf, 0.0
    try:
        for payload in (*[b""] * PAYLOADS, *[bytes(PAYLOAD)] * PAYLOADS):
            before = loop.time()
            await node.call(server.dialable, PING_METHOD, Ping(payload), timeout=deadline - before)
            seconds = loop.time() - before
            if not payload:
                empty = min(empty, seconds)  # the first one has dialled
            elif seconds > empty:
                # It went there first and came back then; tokens do both at a time.
                best = max(best, 2 * PAYLOAD / (seconds - empty))
    except SwarmError as exc:
        logger.info("the network to %s was not measured to the end: %s", server, exc)
    return best


MAX_AGE = 30 * 24 * 3600.0
"""Seconds after which a speed is measured anew: what slowed the machine that day is not for good."""


@attrs.frozen
class SpeedFile:
    """Measured speeds on disk, one small file for each ``key``: whatever the speed depends on."""

    folder: Path
    key: Mapping[str, str]
    wall_clock: Callable[[], float] = time.time
    """Seconds since 1970."""

    @property
    def path(self) -> Path:
        digest = hashlib.sha256(msgspec.json.encode(sorted(self.key.items()))).hexdigest()
        return self.folder / f"{digest[:32]}.json"

    def read(self) -> ComputeSpeed | None:
        """What was measured in the last `MAX_AGE` seconds; None when there is nothing, or nothing that makes
        sense."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as exc:
            logger.warning("the measured throughput in %s cannot be read, measuring anew: %s", self.path, exc)
            return None
        try:
            record = msgspec.json.decode(content, type=_Record)
        except (msgspec.DecodeError, UnicodeDecodeError) as exc:
            logger.warning("the measured throughput in %s is damaged, measuring anew: %s", self.path, exc)
            return None
        fresh = 0 <= self.wall_clock() - record.measured_at < MAX_AGE
        if record.key != dict(self.key) or not fresh:
            return None
        return ComputeSpeed(
            record.decode_rps, record.forward_rps, record.decode_threads, record.forward_threads
        )

    def write(self, speed: ComputeSpeed) -> None:
        """Keep ``speed``, all or nothing. A disk that refuses costs a warning: it is measured again then."""
        from swarmcore.checkpoint.storage import write_file

        record = _Record(key=dict(self.key), measured_at=self.wall_clock(), **attrs.asdict(speed))
        try:
            write_file(self.path, msgspec.json.format(msgspec.json.encode(record)))
        except OSError as exc:
            logger.warning("the measured throughput could not be kept: %s", exc)


class _Record(msgspec.Struct):
    key: dict[str, str]
    decode_rps: Annotated[float, msgspec.Meta(gt=0)]
    forward_rps: Annotated[float, msgspec.Meta(gt=0)]
    measured_at: float = 0.0
    decode_threads: Annotated[int, msgspec.Meta(ge=0)] = 0
    forward_threads: Annotated[int, msgspec.Meta(ge=0)] = 0
