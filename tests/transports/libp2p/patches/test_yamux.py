"""Yamux with one writer, over pipes in memory and on virtual time."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest

pytest.importorskip("libp2p", reason="needs the extra libp2p")

import trio
from libp2p.stream_muxer.exceptions import MuxedStreamError
from libp2p.stream_muxer.yamux.yamux import Yamux
from trio.testing import lockstep_stream_pair
from yamux_pairs import (
    DATA,
    GO_AWAY,
    PEER,
    PING,
    SYN,
    WINDOW,
    Pipe,
    busy_both_ways,
    header,
    muxer_and_bytes,
    pair,
    read_exactly,
    virtual,
)

from swarmcore.wire.limits import Limits
from swarmcore_transports.libp2p.patches import yamux
from swarmcore_transports.libp2p.patches.host import install_yamux
from swarmcore_transports.libp2p.patches.yamux import PatientStream, QueuedYamux

LIMITS = Limits(max_calls_per_peer=256, keepalive=3.0)


def queued(pipe: Pipe, limits: Limits = LIMITS) -> QueuedYamux:
    return QueuedYamux(pipe, PEER, limits)  # type: ignore[arg-type]


def test_much_both_ways_does_not_stop() -> None:
    async def main() -> None:
        async with pair(queued) as ends:
            await busy_both_ways(ends, 2 * 2**20)

    virtual(main)


def test_a_reader_may_rest_for_minutes() -> None:
    async def main() -> None:
        async with pair(queued) as (left, right):
            stream = await left.open_stream()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.write, bytes(2**20))
                other = await right.accept_stream()
                await trio.sleep(300)
                assert stream.send_window == 0
                assert len(right.stream_buffers[stream.stream_id]) == 256 * 1024
                assert await read_exactly(other, 2**20) == bytes(2**20)

    virtual(main)


def test_small_messages_cause_no_frames_back() -> None:
    async def main() -> None:
        async with muxer_and_bytes(queued) as (peer, muxer):
            await peer.send_all(header(WINDOW, SYN, 1, 0))
            stream = await muxer.accept_stream()
            for _ in range(100):
                await peer.send_all(header(DATA, 0, 1, 1000) + bytes(1000))
                assert await stream.read(2000) == bytes(1000)
            await trio.sleep(1)
            # A ping and the acknowledgement of the stream.
            assert len(await peer.receive_some()) == 24
            for _ in range(100):
                await peer.send_all(header(DATA, 0, 1, 1000) + bytes(1000))
                await stream.read(2000)
            await trio.sleep(1)
            update = await peer.receive_some()
            assert len(update) == 12 and update[1] == WINDOW

    virtual(main)


def test_many_streams_at_once() -> None:
    async def main() -> None:
        async def echo() -> None:
            while True:
                nursery.start_soon(echo_one, await right.accept_stream())

        async def echo_one(stream: Any) -> None:
            await stream.write(await stream.read(100))

        async def call(n: int) -> None:
            stream = await left.open_stream()
            opened.append(stream)
            if len(opened) == 300:
                all_open.set()
            await all_open.wait()
            await stream.write(b"%d" % n)
            assert await stream.read(100) == b"%d" % n

        opened: list[Any] = []
        all_open = trio.Event()
        async with pair(queued) as (left, right), trio.open_nursery() as nursery:
            nursery.start_soon(echo)
            async with trio.open_nursery() as calls:
                for n in range(300):
                    calls.start_soon(call, n)
            nursery.cancel_scope.cancel()

    virtual(main)


def test_a_cancelled_write_leaves_the_connection_whole() -> None:
    async def main() -> None:
        async with pair(queued) as (left, right):
            stuck, other = await left.open_stream(), await left.open_stream()
            with trio.move_on_after(60) as scope:
                await stuck.write(bytes(2**20))
            assert scope.cancelled_caught
            await stuck.reset()
            await other.write(b"still here")
            await right.accept_stream()
            assert await (await right.accept_stream()).read(100) == b"still here"

    virtual(main)


def test_writers_that_wait_hear_of_the_end() -> None:
    async def main() -> None:
        async with pair(queued) as (left, right):
            stream = await left.open_stream()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_fails, stream.write, bytes(2**20))
                other = await right.accept_stream()
                await trio.sleep(10)
                await other.reset()

    virtual(main)


async def _fails(write: Callable[[bytes], Awaitable[None]], data: bytes) -> None:
    with pytest.raises(MuxedStreamError):
        await write(data)


def test_what_was_written_before_a_close_leaves_first() -> None:
    async def main() -> None:
        left, right = lockstep_stream_pair()
        muxer = queued(Pipe(right, False))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(muxer.start)
            await muxer.event_started.wait()
            await left.send_all(header(WINDOW, SYN, 1, 0))
            stream = await muxer.accept_stream()
            await stream.write(b"last words")
            nursery.start_soon(muxer.close)
            received = b""
            while data := await left.receive_some():
                received += bytes(data)
            assert received.endswith(header(DATA, 0, 1, 10) + b"last words" + header(GO_AWAY, 0, 0, 0))

    virtual(main)


def test_a_silent_peer_is_lost_and_one_that_only_reads_is_not() -> None:
    async def main() -> None:
        async with muxer_and_bytes(queued) as (_, muxer):
            with trio.fail_after(3.1 * LIMITS.keepalive):
                await muxer.event_closed.wait()
        async with pair(queued) as (left, _):
            await trio.sleep(1000)
            assert not left.is_closed

    virtual(main)


def test_a_peer_that_asks_and_does_not_read_is_dropped() -> None:
    async def main() -> None:
        sent = 0
        left, right = lockstep_stream_pair()
        muxer = queued(Pipe(right, False))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(muxer.start)
            await muxer.event_started.wait()
            with pytest.raises(trio.BrokenResourceError):
                while True:
                    await left.send_all(header(PING, SYN, 0, 7) * 100)
                    sent += 1200
            assert sent < 3 * 64 * 1024
            nursery.cancel_scope.cancel()

    virtual(main)


def test_a_peer_that_ignores_windows_is_made_to_wait_and_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yamux, "_MAX_UNREAD", 10 * 2**20)
    mebibyte = bytes(2**20)

    async def main() -> None:
        async with muxer_and_bytes(queued) as (peer, muxer):
            for stream_id in range(1, 25, 2):
                await peer.send_all(header(DATA, SYN, stream_id, len(mebibyte)) + mebibyte)
            await trio.sleep(1)
            assert sum(map(len, muxer.stream_buffers.values())) == 10 * 2**20
            await (await muxer.accept_stream()).read(2**20)
            await (await muxer.accept_stream()).reset()
            await trio.sleep(1)
            assert sum(map(len, muxer.stream_buffers.values())) == 10 * 2**20
            assert not muxer.is_closed
            await peer.send_all(header(DATA, SYN, 101, len(mebibyte)) + mebibyte)
            with trio.fail_after(2.1 * LIMITS.keepalive):
                await muxer.event_closed.wait()

    virtual(main)


def test_a_peer_that_sends_a_large_frame_is_dropped() -> None:
    async def main() -> None:
        async with muxer_and_bytes(queued) as (peer, muxer):
            await peer.send_all(header(DATA, SYN, 1, 2**20 + 1))
            with trio.fail_after(1):
                await muxer.event_closed.wait()

    virtual(main)


def test_connections_share_what_may_wait_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yamux, "_MAX_UNREAD_IN_ALL", 6 * 2**20)
    mebibyte = bytes(2**20)

    async def main() -> None:
        async with muxer_and_bytes(queued) as (greedy, first), muxer_and_bytes(queued) as (later, second):
            for peer in (greedy, later):
                for stream_id in range(1, 25, 2):
                    await peer.send_all(header(DATA, SYN, stream_id, len(mebibyte)) + mebibyte)
                await trio.sleep(1)
            assert sum(map(len, first.stream_buffers.values())) == 6 * 2**20
            assert sum(map(len, second.stream_buffers.values())) == 2**20
            with trio.fail_after(2.1 * LIMITS.keepalive):
                await first.event_closed.wait()
                await second.event_closed.wait()

    virtual(main)


def test_a_peer_that_opens_too_many_streams_has_the_further_ones_reset() -> None:
    async def main() -> None:
        limited = partial(queued, limits=Limits(max_calls_per_peer=2))
        async with muxer_and_bytes(limited) as (peer, muxer), trio.open_nursery() as nursery:
            nursery.start_soon(_accept_forever, muxer)
            await peer.send_all(b"".join(header(WINDOW, SYN, 2 * n + 1, 0) for n in range(50)))
            await trio.sleep(1)
            assert len(muxer.streams) == 8
            nursery.cancel_scope.cancel()

    virtual(main)


async def _accept_forever(muxer: Yamux) -> None:
    while True:
        await muxer.accept_stream()


def test_a_window_beyond_all_bounds_is_only_a_window() -> None:
    async def main() -> None:
        async with muxer_and_bytes(queued) as (peer, muxer):
            await peer.send_all(header(WINDOW, SYN, 1, 2**32 - 1) + header(WINDOW, 0, 1, 2**32 - 1))
            stream = await muxer.accept_stream()
            assert isinstance(stream, PatientStream)
            with trio.move_on_after(5):
                await stream.write(bytes(1000))
            assert not math.isinf(stream.send_window)

    virtual(main)


@pytest.mark.parametrize("name", ["_write_frame", "_read_data_body", "_measure_rtt_loop"])
def test_a_changed_library_keeps_its_own_muxer(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Upgrader:
        muxer_multistream = "the library's own"

    class Swarm:
        upgrader = Upgrader()

    monkeypatch.delattr(Yamux, name)
    with caplog.at_level(logging.WARNING):
        install_yamux(Swarm(), LIMITS)  # type: ignore[arg-type]
    assert Swarm.upgrader.muxer_multistream == "the library's own"
    assert f"Yamux.{name}" in caplog.text
