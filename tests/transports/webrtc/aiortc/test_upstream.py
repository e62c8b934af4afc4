"""Each fault of aiortc and aioice that is repaired here is still in the installed versions.

A test that fails says that upstream has fixed it. Then its repair is to be taken out of `REPAIRS` and of the
class that it names, once the versions without it are no longer supported.
"""

from __future__ import annotations

import asyncio
import inspect
import socket
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import pytest

pytest.importorskip("aiortc", reason="needs the extra webrtc")
from aioice import Connection, stun
from aioice import ice as aioice
from aioice.candidate import Candidate
from aioice.ice import CandidatePair, StunProtocol
from aiortc import RTCPeerConnection, rtcsctptransport
from aiortc.rtcdatachannel import RTCDataChannel, RTCDataChannelParameters
from aiortc.rtcsctptransport import DataChunk, HeartbeatChunk, InboundStream, RTCSctpTransport, SackChunk
from sctp_pair import DATA, DELAY, SACK, Wire, associated, deliver, numbered
from webrtc_engines import pair

from swarmcore_transports.webrtc.aiortc.repairs import REPAIRS

SHOWN: set[str] = set()


def shows(repair: str) -> Callable[[Any], Any]:
    """The test shows the fault that ``repair`` is for."""
    SHOWN.add(repair)
    return lambda test: test


def test_every_repair_is_needed() -> None:
    assert {repair.name for repair in REPAIRS} == SHOWN
    assert len(REPAIRS) == len(SHOWN)


# --- SCTP -------------------------------------------------------------------------------------------------


def upstream() -> Any:
    return associated(RTCSctpTransport, RTCSctpTransport)


@shows("congestion window")
@pytest.mark.virtual_time
async def test_a_first_message_takes_round_trips() -> None:
    async with upstream() as (one, two):
        assert one.transport._cwnd < 6 * rtcsctptransport.USERDATA_MAX_LENGTH
        assert await deliver(one, two, 16 * 1024) > 3 * DELAY


@shows("loss detection")
@pytest.mark.virtual_time
async def test_a_lost_tail_is_noticed_after_a_second() -> None:
    async with upstream() as (one, two):
        await deliver(one, two, 1000)
        one.wire.drops = numbered({0})
        assert await deliver(one, two, 1000) > 1.0


@shows("INIT backoff")
@pytest.mark.virtual_time
async def test_init_is_repeated_at_a_constant_pace() -> None:
    loop = asyncio.get_running_loop()
    transport = RTCSctpTransport(cast(Any, Wire("client")))
    transport._t1_chunk, transport._t1_failures = HeartbeatChunk(), 0
    pauses = []
    for _ in range(3):
        transport._t1_expired()
        assert transport._t1_handle is not None
        pauses.append(transport._t1_handle.when() - loop.time())
        transport._t1_handle.cancel()
    assert pauses[0] == pytest.approx(pauses[1]) == pytest.approx(pauses[2])
    await asyncio.sleep(0)


@shows("peer's window")
@pytest.mark.virtual_time
async def test_a_window_that_the_peer_has_closed_is_not_heeded() -> None:
    async with upstream() as (one, two):
        two.wire.drops = lambda data: data[12] == SACK
        closed = SackChunk()
        closed.cumulative_tsn, closed.advertised_rwnd = one.transport._last_sacked_tsn, 0
        await one.transport._receive_sack_chunk(closed)
        before = one.wire.count(DATA)
        one.channel.send(bytes(16 * 1024))
        await asyncio.sleep(DELAY)
        assert one.wire.count(DATA) - before > 1


@shows("unsent acknowledged")
@pytest.mark.virtual_time
async def test_what_was_never_sent_can_be_acknowledged() -> None:
    async with upstream() as (one, _):
        sack = SackChunk()
        sack.cumulative_tsn, sack.advertised_rwnd = one.transport._local_tsn + 1000, 1 << 20
        await one.transport._receive_sack_chunk(sack)
        assert one.transport._last_sacked_tsn == sack.cumulative_tsn


@shows("delayed acknowledgement")
@pytest.mark.virtual_time
async def test_every_packet_is_acknowledged() -> None:
    async with upstream() as (one, two):
        data, acknowledgements = one.wire.count(DATA), two.wire.count(SACK)
        await deliver(one, two, 100 * 1024)
        await asyncio.sleep(1)
        assert two.wire.count(SACK) - acknowledgements == one.wire.count(DATA) - data > 80


@shows("receive window")
@pytest.mark.virtual_time
async def test_data_beyond_the_window_is_taken() -> None:
    async with upstream() as (one, two):
        two.transport._advertised_rwnd = 0
        chunk = DataChunk(flags=3)
        chunk.tsn, chunk.user_data = one.transport._local_tsn + 1, bytes(1000)
        await two.transport._receive_data_chunk(chunk)
        assert chunk.tsn in two.transport._sack_misordered


class CountedSet(set[int]):
    """How many of its elements were looked at one by one."""

    looked_at = 0

    def __iter__(self) -> Iterator[int]:
        CountedSet.looked_at += len(self)
        return super().__iter__()


@shows("cost of gaps")
@pytest.mark.virtual_time
async def test_everything_above_a_gap_is_looked_at_for_each_packet() -> None:
    transport = RTCSctpTransport(cast(Any, Wire("client")))
    transport._last_received_tsn = 0
    transport._sack_misordered = CountedSet(range(10, 1000))
    transport._mark_received(2000)
    assert CountedSet.looked_at > 900


class CountedList(list[DataChunk]):
    looked_at = 0

    def __getitem__(self, index: Any) -> Any:
        CountedList.looked_at += 1
        return super().__getitem__(index)


@shows("cost of fragments")
def test_all_fragments_are_looked_at_for_each_packet() -> None:
    stream = InboundStream()
    stream.reassembly = CountedList()
    for number in range(100):
        chunk = DataChunk(flags=2 if number == 0 else 0)
        chunk.tsn, chunk.stream_seq, chunk.user_data = number, 0, b"x"
        stream.reassembly.append(chunk)
    assert not list(stream.pop_messages())
    assert CountedList.looked_at >= 100


@shows("closed twice")
@pytest.mark.virtual_time
async def test_the_end_of_a_channel_that_closes_another_fails() -> None:
    async with upstream() as (one, _):
        other = RTCDataChannel(one.transport, RTCDataChannelParameters(label="y", negotiated=True, id=1))
        one.channel.on("close", other.close)
        with pytest.raises(KeyError):
            await one.transport.stop()


@shows("DTLS closed")
async def test_an_error_of_openssl_gets_through() -> None:
    from OpenSSL import SSL

    async with pair() as found:
        await found.connect()
        sctp = found.dialler._sctp  # type: ignore[attr-defined]
        sctp.transport._ssl.shutdown()
        with pytest.raises(SSL.Error):
            await RTCSctpTransport._send_chunk(sctp, HeartbeatChunk())


# --- ICE --------------------------------------------------------------------------------------------------


def silent_server(family: socket.AddressFamily, host: str) -> socket.socket:
    """A STUN server that answers nothing."""
    server = socket.socket(family, socket.SOCK_DGRAM)
    server.bind((host, 0))
    server.setblocking(False)
    return server


def hosts(*addresses: str) -> Callable[..., list[str]]:
    return lambda *, use_ipv4, use_ipv6: list(addresses)


@shows("trickle")
async def test_no_candidate_comes_before_the_servers_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aioice, "get_host_addresses", hosts("127.0.0.1"))
    with silent_server(socket.AF_INET, "127.0.0.1") as server:
        agent = Connection(ice_controlling=True, stun_server=server.getsockname())
        gathering = asyncio.create_task(agent.gather_candidates())
        async with asyncio.timeout(10):
            await asyncio.get_running_loop().sock_recv(server, 2000)
        assert not gathering.done() and not agent.local_candidates
        gathering.cancel()
        await asyncio.wait([gathering])
        await agent.close()


@shows("STUN over IPv6")
async def test_servers_are_not_asked_over_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        server = silent_server(socket.AF_INET6, "::1")
    except OSError:
        pytest.skip("needs IPv6")
    monkeypatch.setattr(aioice, "get_host_addresses", hosts("::1"))
    with server:
        agent = Connection(ice_controlling=True, stun_server=server.getsockname()[:2])
        async with asyncio.timeout(10):
            await agent.gather_candidates()
        assert [candidate.host for candidate in agent.local_candidates] == ["::1"]
        with pytest.raises(BlockingIOError):
            server.recv(2000)
        await agent.close()


@shows("ICE restart")
def test_ice_cannot_be_restarted() -> None:
    assert not hasattr(RTCPeerConnection, "restartIce")
    assert list(inspect.signature(RTCPeerConnection.createOffer).parameters) == ["self"]


class Silent(StunProtocol):
    """Sends nothing, and counts what it should have sent."""

    def __init__(self, receiver: Connection) -> None:
        super().__init__(receiver)
        self.local_candidate = candidate("127.0.0.1", 1)
        self.sent = 0

    def send_stun(self, message: stun.Message, addr: tuple[str, int]) -> None:
        self.sent += 1


def candidate(host: str, port: int) -> Candidate:
    return Candidate("1", 1, "udp", 1, host, port, "host")


def check() -> stun.Message:
    message = stun.Message(stun.Method.BINDING, stun.Class.REQUEST)
    message.attributes["PRIORITY"] = 1
    return message


@shows("triggered check")
async def test_a_check_under_way_is_not_repeated_when_the_peers_comes_through() -> None:
    agent = Connection(ice_controlling=False)
    protocol = Silent(agent)
    remote = candidate("127.0.0.1", 2)
    await agent.add_remote_candidate(remote)
    pair = CandidatePair(protocol, remote)
    pair.state = CandidatePair.State.IN_PROGRESS
    agent._check_list.append(pair)
    agent.check_incoming(check(), ("127.0.0.1", 2), protocol)
    assert protocol.sent == 0 and pair.task is None


@shows("remote candidates")
async def test_every_address_that_checks_come_from_is_remembered() -> None:
    agent = Connection(ice_controlling=False)
    agent.remote_username, agent.remote_password = "x" * 4, "x" * 22
    protocol = Silent(agent)
    for port in range(1, 301):
        agent.check_incoming(check(), ("127.0.0.1", port), protocol)
    assert len(agent.remote_candidates) == len(agent._check_list) == 300
    tasks = [pair.task for pair in agent._check_list if pair.task]
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


@shows("closed while connecting")
async def test_an_agent_that_is_closed_as_it_connects_asks_for_consent() -> None:
    agent = Connection(ice_controlling=True)
    agent._local_candidates_end = agent._check_list_done = True
    agent.remote_username, agent.remote_password = "x" * 4, "x" * 22
    checked = CandidatePair(Silent(agent), candidate("127.0.0.1", 2))
    checked.state = CandidatePair.State.SUCCEEDED
    agent._check_list.append(checked)
    connecting = asyncio.create_task(agent.connect())
    for _ in range(3):
        await asyncio.sleep(0)
    agent._check_list_state.put_nowait(aioice.ICE_COMPLETED)
    await agent.close()
    await connecting
    assert agent._query_consent_task is not None and not agent._query_consent_task.done()
    agent._query_consent_task.cancel()


@shows("closed port")
async def test_nothing_is_done_about_a_closed_port() -> None:
    """Consent expires after half a minute, whatever the network tells."""
    agent = Connection(ice_controlling=True)
    protocol = Silent(agent)
    agent._nominated[1] = CandidatePair(protocol, candidate("127.0.0.1", 2))
    tasks = asyncio.all_tasks()
    protocol.error_received(ConnectionRefusedError())
    assert asyncio.all_tasks() == tasks and protocol.sent == 0 and not agent._closing
    assert aioice.CONSENT_FAILURES * aioice.CONSENT_INTERVAL == 30


class Turns(asyncio.DatagramProtocol):
    """What had been read when the event loop got on to something else, after the first datagram."""

    def __init__(self) -> None:
        self.received = 0
        self.in_one_turn: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.received += 1
        if self.received == 1:
            asyncio.get_running_loop().call_soon(lambda: self.in_one_turn.set_result(self.received))


@shows("one datagram a turn")
async def test_asyncio_reads_one_datagram_a_turn() -> None:
    loop = asyncio.get_running_loop()
    transport, protocol = await loop.create_datagram_endpoint(Turns, local_addr=("127.0.0.1", 0))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        send_all(sender, transport.get_extra_info("sockname"), [b"x"] * 10)
    async with asyncio.timeout(10):
        assert await protocol.in_one_turn == 1
    transport.close()


def send_all(sender: socket.socket, place: Any, datagrams: Iterable[bytes]) -> None:
    for datagram in datagrams:
        sender.sendto(datagram, place)
