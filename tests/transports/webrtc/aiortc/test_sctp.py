"""Our SCTP on a long link, where packets are lost, and with a peer that means no good."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from typing import cast

import pytest

pytest.importorskip("aiortc")

from aiortc import RTCPeerConnection, rtcsctptransport
from aiortc.rtcdatachannel import RTCDataChannel, RTCDataChannelParameters
from aiortc.rtcsctptransport import DataChunk, RTCSctpTransport
from sctp_pair import DATA, DELAY, SACK, associated, deliver, numbered

from swarmcore_transports.webrtc.aiortc import repairs
from swarmcore_transports.webrtc.aiortc.compat import missing_of_sctp
from swarmcore_transports.webrtc.aiortc.ice_agent import TrickleIceAgent
from swarmcore_transports.webrtc.aiortc.repairs import repaired
from swarmcore_transports.webrtc.aiortc.sctp_sender import RackSctpTransport

pytestmark = pytest.mark.virtual_time

HEARTBEAT, HEARTBEAT_ACK = 4, 5


def make_agent(controlling: bool) -> TrickleIceAgent:
    return TrickleIceAgent([], lambda candidate: None, controlling=controlling)


async def test_a_hidden_state_takes_one_way_and_not_a_round_trip_more() -> None:
    async with associated() as (one, two):
        assert await deliver(one, two, 16 * 1024) < 1.25 * DELAY
        assert await deliver(two, one, 16 * 1024) < 1.25 * DELAY


async def test_the_window_opens_within_a_few_round_trips() -> None:
    async with associated() as (one, two):
        assert await deliver(one, two, 32 * 1024, 8) < 12 * DELAY
        assert await deliver(one, two, 32 * 1024, 8) < 3 * DELAY


async def test_understands_the_library_as_it_is() -> None:
    async with associated(RackSctpTransport, RTCSctpTransport) as (one, two):
        await deliver(one, two, 32 * 1024, 20)
        await deliver(two, one, 32 * 1024, 20)


@pytest.mark.parametrize("lost", [{14}, {13, 14}, set(range(5, 15))], ids=["last", "last two", "last ten"])
async def test_a_lost_tail_costs_a_few_round_trips(lost: set[int]) -> None:
    async with associated() as (one, two):
        await deliver(one, two, 1000)  # so that the round trip is known
        one.wire.drops = numbered(lost)
        assert await deliver(one, two, 16 * 1024) < 12 * DELAY
        assert one.wire.dropped == len(lost)


async def test_a_loss_in_the_middle_is_mended_by_what_came_after_it() -> None:
    async with associated() as (one, two):
        one.wire.drops = numbered({3})
        before = one.wire.count(DATA)
        assert await deliver(one, two, 16 * 1024) < 3.5 * DELAY
        assert one.wire.count(DATA) - before == 15 + 1


async def test_few_packets_in_flight_are_enough_to_notice_a_loss() -> None:
    async with associated() as (one, two):
        await deliver(one, two, 1000)
        one.wire.drops = numbered({0})
        assert await deliver(one, two, 2000) < 4 * DELAY


async def test_a_retransmission_that_is_lost_too_is_noticed() -> None:
    async with associated() as (one, two):
        await deliver(one, two, 32 * 1024, 8)
        one.wire.drops = numbered({0, 29, 30, 31})
        assert await deliver(one, two, 32 * 1024, 8) < 0.6


async def test_a_dead_link_is_tried_less_and_less_often() -> None:
    async with associated() as (one, two):
        await deliver(one, two, 1000)
        one.wire.drops = lambda data: True
        before = one.wire.count(DATA)
        one.channel.send(bytes(16 * 1024))
        await asyncio.sleep(60)
        assert 15 < one.wire.count(DATA) - before < 40
        one.wire.drops = lambda data: False
        async with asyncio.timeout(60):
            assert len(await two.received.get()) == 16 * 1024


async def test_reordered_packets_are_not_taken_for_lost_for_ever() -> None:
    async with associated() as (one, two):
        packets = itertools.count()
        one.wire.late = lambda: 0.005 if next(packets) % 6 == 0 else 0.0
        await deliver(one, two, 32 * 1024, 4)
        before = one.wire.count(DATA)
        await deliver(one, two, 32 * 1024, 30)
        assert one.wire.count(DATA) - before < 1.05 * 30 * 29


async def test_a_slow_link_with_a_small_queue_is_kept_busy() -> None:
    async with associated() as (one, two):
        for end in (one, two):
            end.wire.rate = 125_000
        assert await deliver(one, two, 32 * 1024, 32) < 1.3 * 32 * 32 * 1024 / 125_000
        assert one.wire.dropped < 0.1 * one.wire.count(DATA)
        took = await deliver(one, two, 16 * 1024, 1)
        assert took < 5 * 16 * 1024 / 125_000


@pytest.mark.parametrize("seed", range(3))
async def test_losses_both_ways_corrupt_and_stop_nothing(seed: int) -> None:
    async with associated() as (one, two):
        for number, end in enumerate((one, two)):
            chance = random.Random(2 * seed + number)
            end.wire.drops = lambda data, chance=chance: chance.random() < 0.1  # type: ignore[misc]
        await asyncio.gather(deliver(one, two, 32 * 1024, 10), deliver(two, one, 32 * 1024, 10))


async def test_every_second_packet_is_acknowledged_and_every_end_of_a_message() -> None:
    async with associated() as (one, two):
        before = two.wire.count(SACK)
        await deliver(one, two, 100)
        await asyncio.sleep(DELAY)
        assert two.wire.count(SACK) - before == 1
        await deliver(one, two, 32 * 1024, 8)
        await asyncio.sleep(1)
        assert two.wire.count(SACK) - before - 1 <= 8 * 16
        assert one.transport._flight_size == 0


async def test_packets_that_come_together_take_few_acknowledgements_once_the_window_is_open() -> None:
    async with associated() as (one, two):

        async def acknowledgements_of_15_packets() -> int:
            before = two.wire.count(SACK)
            await deliver(one, two, 16 * 1024)
            await asyncio.sleep(1)
            assert one.transport._flight_size == 0
            return two.wire.count(SACK) - before

        assert await acknowledgements_of_15_packets() == 8
        await deliver(one, two, 32 * 1024, 8)
        await asyncio.sleep(1)
        assert await acknowledgements_of_15_packets() == 2
        one.wire.rate = 125_000  # now they come one by one
        assert await acknowledgements_of_15_packets() >= 8


async def test_no_more_is_in_flight_than_the_peer_has_room_for() -> None:
    async with associated() as (one, two):
        await deliver(one, two, 32 * 1024, 60)
        assert one.transport._cwnd > 256 * 1024
        two.transport._advertised_rwnd = 16 * 1024
        await deliver(one, two, 1000)  # which tells how little room there is
        await asyncio.sleep(1)
        most = 0
        send = one.wire._send_data

        async def watched(data: bytes) -> None:
            nonlocal most
            most = max(most, one.transport._flight_size)
            await send(data)

        one.wire._send_data = watched  # type: ignore[method-assign]
        await deliver(one, two, 10_000, 30)
        assert most <= 17 * 1024 + rtcsctptransport.USERDATA_MAX_LENGTH


@pytest.mark.parametrize("size", [1, 1000])
async def test_a_message_without_an_end_is_held_to_a_bound(
    size: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with associated() as (one, two):
        tsn = one.transport._local_tsn
        for number in range(10_000):
            chunk = DataChunk(flags=2 if number == 0 else 0)
            chunk.tsn, chunk.user_data = tsn + number, bytes(size)
            await two.transport._receive_data_chunk(chunk)
            if two.transport.state == "closed":
                break
        assert number < 6200 if size == 1 else number < 1500
        assert "never ended" in caplog.text


async def test_what_follows_a_gap_is_held_to_a_bound() -> None:
    async with associated() as (one, two):
        tsn = one.transport._local_tsn
        for number in range(1, 10_000, 2):
            chunk = DataChunk(flags=3)
            chunk.tsn, chunk.user_data = tsn + number, b"x"
            await two.transport._receive_data_chunk(chunk)
        assert len(two.transport._sack_misordered) == 2048
        assert two.transport.state == "connected"


@pytest.mark.parametrize("made", [RackSctpTransport, RTCSctpTransport])
async def test_the_end_of_one_channel_may_close_the_others(made: type[RTCSctpTransport]) -> None:
    async with associated(made, made) as (one, _):
        other = RTCDataChannel(one.transport, RTCDataChannelParameters(label="y", negotiated=True, id=1))
        one.channel.on("close", other.close)
        if made is RTCSctpTransport:
            with pytest.raises(KeyError):  # what the override is for
                await one.transport.stop()
        else:
            await one.transport.stop()
        assert (one.channel.readyState, other.readyState) == ("closed", "closed")


async def test_acknowledgements_of_what_was_never_sent_change_nothing() -> None:
    async with associated() as (one, two):
        sack = rtcsctptransport.SackChunk()
        sack.cumulative_tsn, sack.advertised_rwnd = one.transport._local_tsn + 5, 1 << 20
        await one.transport._receive_sack_chunk(sack)
        sack.cumulative_tsn = one.transport._last_sacked_tsn
        sack.gaps = [(65535, 1), (1, 65535), (0, 0)] * 300
        await one.transport._receive_sack_chunk(sack)
        await deliver(one, two, 32 * 1024, 2)


async def test_a_peer_connection_made_within_gets_it_and_no_other_does() -> None:
    quick, plain = RTCPeerConnection(), RTCPeerConnection()
    with repaired(make_agent):
        quick.createDataChannel("x")
    plain.createDataChannel("x")
    assert type(quick.sctp) is RackSctpTransport
    assert type(plain.sctp) is RTCSctpTransport
    await quick.close()
    await plain.close()


async def test_a_library_of_another_shape_is_left_alone_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(RTCSctpTransport, "_data_channel_flush")
    monkeypatch.setattr(RTCSctpTransport, "_transmit", lambda self, budget: None)
    monkeypatch.setattr(repairs, "version", lambda name: "9.9")
    assert missing_of_sctp() == ["_transmit", "_data_channel_flush"]
    repairs._missing_of_sctp.cache_clear()
    try:
        for _ in range(2):
            connection = RTCPeerConnection()
            with repaired(make_agent), caplog.at_level(logging.WARNING):
                connection.createDataChannel("x", negotiated=True, id=0)
            assert type(connection.sctp) is RTCSctpTransport
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "aiortc 9.9" in caplog.text
    finally:
        repairs._missing_of_sctp.cache_clear()


async def test_who_has_nothing_to_say_is_heard_on_a_new_path_all_the_same() -> None:
    async with associated() as (a, b):
        before = a.wire.count(DATA)
        cast(RackSctpTransport, a.transport).path_changed()
        await asyncio.sleep(1)
        assert a.wire.count(HEARTBEAT) == b.wire.count(HEARTBEAT_ACK) == 1
        assert a.wire.count(DATA) == before
