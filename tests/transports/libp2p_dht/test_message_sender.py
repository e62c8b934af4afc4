"""The streams that are kept open to nodes of the DHT."""

from __future__ import annotations

from unittest.mock import AsyncMock, Mock

import pytest

pytest.importorskip("libp2p", reason="needs the extra libp2p")

import trio
from libp2p.peer.id import ID
from yamux_pairs import virtual

from swarmcore_transports.libp2p_dht.rpc import MessageSender, _OpenStream


def test_a_stream_that_is_taken_while_another_one_is_closed_is_left_alone() -> None:
    async def main() -> None:
        sender = MessageSender(Mock(), timeout=1.0)
        first, second, third = [
            _OpenStream(Mock(close=AsyncMock()), trio.current_time(), trio.current_time()) for _ in range(3)
        ]
        nodes = [ID(name) for name in (b"first", b"second", b"third")]
        sender._idle.update(zip(nodes, (first, second, third), strict=True))

        async def take_the_second() -> None:
            sender._idle.pop(nodes[1], None)

        first.stream.close.side_effect = take_the_second
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sender.run)
            await trio.sleep(10)
            nursery.cancel_scope.cancel()
        assert not sender._idle
        assert [one.stream.close.await_count for one in (first, second, third)] == [1, 0, 1]

    virtual(main)
