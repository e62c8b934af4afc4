"""Datagrams over loopback, read one at a time and many at a time."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import attrs
import pytest

pytest.importorskip("aiortc", reason="needs the extra webrtc")

from swarmcore_transports.webrtc.aiortc.sockets import read_in_batches


class Receiver(asyncio.DatagramProtocol):
    def __init__(self) -> None:
        self.received: list[bytes] = []
        self.errors: list[Exception] = []
        self.enough = asyncio.Event()
        self.on_close: Callable[[], None] = lambda: None

    def datagram_received(self, data: bytes, addr: tuple[Any, ...]) -> None:
        self.received.append(data)
        if data == b"last":
            self.enough.set()
        if data == b"close":
            self.on_close()

    def error_received(self, exc: Exception) -> None:
        self.errors.append(exc)


@attrs.frozen
class Pair:
    sender: socket.socket
    receiver: Receiver
    transport: asyncio.DatagramTransport

    def send(self, *datagrams: bytes) -> None:
        for datagram in datagrams:
            self.sender.sendto(datagram, self.transport.get_extra_info("sockname"))


@asynccontextmanager
async def pair() -> AsyncIterator[Pair]:
    loop = asyncio.get_running_loop()
    transport, receiver = await loop.create_datagram_endpoint(Receiver, local_addr=("127.0.0.1", 0))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        receiver.on_close = transport.close
        try:
            yield Pair(sender, receiver, transport)
        finally:
            transport.close()


@pytest.mark.every_loop
async def test_what_is_there_is_read_at_once_and_in_order() -> None:
    async with pair() as both:
        read_in_batches(both.receiver, both.transport)
        numbers = [bytes([number]) for number in range(100)]
        both.send(*numbers, b"last")
        async with asyncio.timeout(5):
            await both.receiver.enough.wait()
        assert both.receiver.received == [*numbers, b"last"]
        both.receiver.enough.clear()
        both.send(b"last")  # the transport's socket is as it was
        async with asyncio.timeout(5):
            await both.receiver.enough.wait()


@pytest.mark.parametrize(("batches", "wakes"), [(False, 101), (True, 4)])
async def test_a_batch_costs_one_turn_of_the_event_loop(batches: bool, wakes: int) -> None:
    async with pair() as both:
        if batches:
            read_in_batches(both.receiver, both.transport)
        both.send(*[b"x"] * 100, b"last")
        turns = 0
        async with asyncio.timeout(5):
            while not both.receiver.enough.is_set():
                turns += 1
                await asyncio.sleep(0)
        assert wakes <= turns <= wakes + 3


async def test_a_transport_that_is_closed_meanwhile_gives_no_more() -> None:
    async with pair() as both:
        read_in_batches(both.receiver, both.transport)
        both.send(b"first", b"close", b"last")
        async with asyncio.timeout(5):
            while not both.transport.is_closing():
                await asyncio.sleep(0)
        assert both.receiver.received == [b"first", b"close"]


async def test_an_error_of_the_socket_is_told_as_asyncio_tells_it() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as nobody:
        nobody.bind(("127.0.0.1", 0))
        place = nobody.getsockname()
    loop = asyncio.get_running_loop()
    transport, receiver = await loop.create_datagram_endpoint(Receiver, remote_addr=place)
    read_in_batches(receiver, transport)
    transport.sendto(b"is anybody there?")
    receiver.datagram_received(b"one", place)
    assert [type(error) for error in receiver.errors] == [ConnectionRefusedError]
    assert receiver.received == [b"one"]
    transport.close()


async def test_a_transport_without_a_socket_is_left_alone() -> None:
    receiver = Receiver()
    read_in_batches(receiver, asyncio.DatagramTransport())
    assert "datagram_received" not in vars(receiver)
