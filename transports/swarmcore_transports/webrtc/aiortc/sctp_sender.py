"""The sending half of our SCTP: what may be in flight, and what is taken for lost.

aiortc's sender follows RFC 9260 to the letter. That lets a lost tail wait for a timeout of a second or more
(section 6.3.1), and needs three later packets to notice any other loss (7.2.4): a token is few packets, of
which the last is lost as often as any. So losses are detected by time instead, as TCP does it today: RACK
with a tail loss probe, RFC 8985 (https://www.rfc-editor.org/rfc/rfc8985). What may be in flight is decided by
`congestion`. The wire format is SCTP's as before, so the peer may be anything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from aiortc import rtcsctptransport
from aiortc.rtcsctptransport import DataChunk, HeartbeatChunk, SackChunk

from swarmcore_transports.webrtc.aiortc.congestion import CongestionWindow
from swarmcore_transports.webrtc.aiortc.sctp_receiver import (
    ACK_DELAY,
    TSN_MODULO,
    DelayedSackReceiver,
    at_or_after,
)

_FIRST_RTO = 1.0
_MIN_RTO_SLACK = 0.2
_MAX_RTO = 60.0
_UNANSWERED_TIMEOUTS = 3
"""Timeouts in a row, the probe being the first: about a second on most paths."""

_HEARTBEAT_INFO = 1
"""The parameter of a heartbeat that comes back with its answer, whatever is in it."""


class RackSctpTransport(DelayedSackReceiver):
    """`RTCSctpTransport` with another sender's and receiver's behaviour, the same association."""

    def __init__(self, transport: Any, port: int = 5000) -> None:
        super().__init__(transport, port)
        self._rto = _FIRST_RTO
        self._window = CongestionWindow(rtcsctptransport.USERDATA_MAX_LENGTH)
        self._peer_window = self._advertised_rwnd
        # What the latest acknowledgements told: RACK's state, by RFC 8985's names in brackets.
        self._min_rtt = float("inf")  # RACK.min_RTT
        self._newest_rtt = 0.0  # RACK.rtt
        self._newest_sent_at = float("-inf")  # RACK.xmit_ts: of what arrived, when the latest had left
        self._highest_acked = self._last_sacked_tsn  # RACK.fack
        self._reorders = False  # RACK.reordering_seen
        self._has_lost_chunks = False
        self._retransmit_at_once = False
        self._has_abandoned_chunks = False
        self._reorder_deadline: float | None = None
        # The probe and the timeout that follows it.
        self._progress_at = 0.0
        self._timeouts = 0
        self.on_unanswered: Callable[[], None] = lambda: None
        """Called when `unanswered` has become true."""
        self._probed: int | None = None
        self._loss_timer: asyncio.TimerHandle | None = None
        self._loss_timer_at = 0.0
        self._pace_timer: asyncio.TimerHandle | None = None
        self._idle_since: float | None = None
        self._sending = False
        self._send_again = False

    def _set_state(self, state: Any) -> None:
        if state is self.State.ESTABLISHED and self._association_state is not state:
            # Where the base keeps what INIT advertised: it never looks at the peer's window again, which
            # RFC 9260, 6.1 (A) does not allow to exceed.
            self._peer_window = self._ssthresh
        super()._set_state(state)

    def _data_channel_closed(self, stream_id: int) -> None:
        """Called for each channel when the association ends: who hears of one may have closed another."""
        if stream_id in self._data_channels:
            super()._data_channel_closed(stream_id)

    def _t1_expired(self) -> None:
        self._rto = min(2 * self._rto, _MAX_RTO)  # RFC 9260, 6.3.3 (E2), which the base leaves out
        super()._t1_expired()

    def _t3_cancel(self) -> None:
        """Called when the association ends: the base's T3 never runs here."""
        super()._t3_cancel()
        for timer in (self._loss_timer, self._pace_timer):
            if timer is not None:
                timer.cancel()
        self._loss_timer = self._pace_timer = None

    def _update_rto(self, R: float) -> None:
        super()._update_rto(R)
        assert self._srtt is not None and self._rttvar is not None
        # RFC 9260, 6.3.1 asks for a second at least. As Linux does it: the least slack lies above the round
        # trip instead, since a peer may delay its acknowledgement for 200 ms (6.2), whatever the distance.
        self._rto = min(self._srtt + max(4 * self._rttvar, _MIN_RTO_SLACK), _MAX_RTO)

    @property
    def unanswered(self) -> bool:
        """Whether several timeouts have passed without any acknowledgement."""
        return self._timeouts >= _UNANSWERED_TIMEOUTS

    def path_changed(self) -> None:
        """Packets take another path from now on, of which nothing is known: send at once what is missing.

        Window, round trip and timeout belong to a path (RFC 9260, 6.3 and 7.2): they begin anew. What was in
        flight on the old path may have died with it; to wait for a timeout would stop every stream.
        """
        now = self._clock.time()
        self._window = CongestionWindow(rtcsctptransport.USERDATA_MAX_LENGTH)
        self._min_rtt = float("inf")
        self._timeouts = 0
        self._rto = _FIRST_RTO
        self._progress_at = now
        for chunk in self._sent_queue:
            if not chunk._acked:
                self._mark_lost(chunk)
        self._update_advanced_peer_ack_point()
        self._send_soon(self._probe_path)

    async def _probe_path(self) -> None:
        """Send a heartbeat (RFC 9260, 8.3) by the new path, though nothing be missing, and then what is.

        A browser over there stays with the old path, where nobody listens, until something comes by the new.
        """
        if self._association_state is self.State.ESTABLISHED:
            heartbeat = HeartbeatChunk()
            heartbeat.params = [(_HEARTBEAT_INFO, b"path")]
            await self._send_chunk(heartbeat)
        await self._send_more()

    # Sending

    async def _transmit(self) -> None:
        self._send_again = True
        # A send over TURN may wait, and this is called again meanwhile: the first call then goes round once
        # more, so that packets leave in the order of their TSNs.
        if self._sending or self._association_state is self.State.CLOSED:
            return
        self._sending = True
        try:
            while self._send_again:
                self._send_again = False
                await self._send_what_fits()
        finally:
            self._sending = False
            self._cwnd = self._window.size
            self._set_loss_timer()

    async def _send_more(self) -> None:
        await self._transmit()
        await self._data_channel_flush()  # cuts up the next messages once nothing else waits, and sends

    async def _send_what_fits(self) -> None:
        if self._forward_tsn_chunk is not None:
            forward, self._forward_tsn_chunk = self._forward_tsn_chunk, None
            await self._send_chunk(forward)
        if self._has_lost_chunks:
            lost = [chunk for chunk in self._sent_queue if chunk._retransmit]
            for chunk in lost:
                if not self._retransmit_at_once and not self._may_send(self._window.size):
                    return
                if chunk._retransmit:
                    self._retransmit_at_once = False
                    await self._send_data(chunk)
            self._has_lost_chunks = False
        if self._outbound_queue and self._idle_since is not None:
            self._window.resumed(self._clock.time() - self._idle_since)
            self._idle_since = None
        while self._outbound_queue and self._may_send(min(self._window.size, self._peer_window)):
            chunk = self._outbound_queue.popleft()
            self._sent_queue.append(chunk)
            await self._send_data(chunk)

    def _may_send(self, limit: int) -> bool:
        if self._flight_size == 0:
            return True  # also what probes a window that the peer has closed (RFC 9260, 6.1 A)
        if self._flight_size >= limit:
            return False
        now = self._clock.time()
        delay = self._window.delay(self._srtt, now)
        if delay and self._pace_timer is None:
            self._pace_timer = self._clock.call_at(now + delay, self._paced)
        return not delay

    def _paced(self) -> None:
        self._pace_timer = None
        self._send_soon(self._send_more)

    async def _send_data(self, chunk: DataChunk) -> None:
        now = self._clock.time()
        chunk._retransmit = False
        chunk._sent_count += 1
        chunk._sent_time = now
        self._flight_size_increase(chunk)
        self._window.sent(chunk._book_size, self._flight_size, now)
        self._progress_at = now
        await self._send_chunk(chunk)

    # What the peer acknowledges

    async def _receive_sack_chunk(self, chunk: SackChunk) -> None:
        acknowledged = (chunk.cumulative_tsn - self._last_sacked_tsn) % TSN_MODULO
        if acknowledged > (self._local_tsn - 1 - self._last_sacked_tsn) % TSN_MODULO:
            return  # older than what was heard, or of what was never sent (RFC 9260, 6.2.1)
        now = self._clock.time()
        self._last_sacked_tsn = chunk.cumulative_tsn
        self._peer_window = chunk.advertised_rwnd
        arrived = self._take_acknowledged(chunk)
        if arrived:
            self._learn_from_acknowledged(arrived, now)
        if chunk.gaps or self._has_lost_chunks or self._reorder_deadline is not None:
            self._detect_losses(sum(max(0, last - first + 1) for first, last in chunk.gaps), now)
        if not self._sent_queue:
            self._idle_since = now
        if self._has_abandoned_chunks:
            self._update_advanced_peer_ack_point()
        await self._send_more()

    def _take_acknowledged(self, sack: SackChunk) -> list[DataChunk]:
        """Chunks that ``sack`` is the first to acknowledge; those below its cumulative TSN are let go."""
        arrived: list[DataChunk] = []
        queue, base = self._sent_queue, sack.cumulative_tsn
        while queue and at_or_after(base, queue[0].tsn):
            chunk = queue.popleft()
            self._flight_size_decrease(chunk)
            if not chunk._acked:
                arrived.append(chunk)
        if sack.gaps:
            gaps = iter(sorted(sack.gaps))
            first, last = next(gaps)
            for chunk in queue:
                offset = (chunk.tsn - base) % TSN_MODULO
                while offset > last:
                    if (gap := next(gaps, None)) is None:
                        return arrived
                    first, last = gap
                if offset >= first and not chunk._acked:
                    chunk._acked = True
                    self._flight_size_decrease(chunk)
                    arrived.append(chunk)
        return arrived

    def _learn_from_acknowledged(self, arrived: list[DataChunk], now: float) -> None:
        newest: DataChunk | None = None
        newest_at = float("-inf")
        for chunk in arrived:
            assert chunk._sent_time is not None
            chunk._retransmit = False
            # Which copy has arrived cannot be told (Karn's ambiguity). If it is too soon for the second, the
            # first was only late: then nothing is learnt of the path (RFC 8985, 6.2 step 2).
            if chunk._sent_count > 1 and now - chunk._sent_time < self._min_rtt / 2:
                continue
            # The probe made up for a loss that nothing else shows: the window has to know (RFC 8985, 7.4).
            if chunk.tsn == self._probed:
                self._probed = None
                self._window.lost(now, now)
            if chunk._sent_time >= newest_at:
                newest, newest_at = chunk, chunk._sent_time
            if at_or_after(chunk.tsn, self._highest_acked):
                self._highest_acked = chunk.tsn
            elif chunk._sent_count == 1:
                self._reorders = True
        self._progress_at = now
        self._timeouts = 0
        if newest is None:
            return
        rtt = now - newest_at
        if newest._sent_count == 1:
            self._min_rtt = min(self._min_rtt, rtt)
            self._update_rto(rtt)
        if newest_at >= self._newest_sent_at:
            self._newest_sent_at, self._newest_rtt = newest_at, rtt
        count = sum(chunk._book_size for chunk in arrived)
        self._window.acknowledged(count, newest_at, self._srtt or rtt, now)

    def _detect_losses(self, beyond: int, now: float) -> None:
        """Take for lost what left before something that arrived (RFC 8985, 6.2 step 5).

        Where packets were seen to overtake each other, or fewer than three tell so, they may yet come: they
        get a quarter of a round trip, the reordering window. ``beyond`` is how many arrived above a gap.
        """
        patience = 0.0 if beyond >= 3 and not self._reorders else self._min_rtt / 4
        self._reorder_deadline = None
        latest_lost = float("-inf")
        for chunk in self._sent_queue:
            assert chunk._sent_time is not None
            if chunk._sent_time > self._newest_sent_at:
                if chunk._sent_count == 1:
                    break  # so did all that follow: they were sent in this order
                continue
            older = chunk._sent_time < self._newest_sent_at or at_or_after(self._highest_acked, chunk.tsn)
            if chunk._acked or not chunk._in_flight or not older:
                continue
            due = chunk._sent_time + self._newest_rtt + patience
            if patience and due > now:
                self._reorder_deadline = min(due, self._reorder_deadline or due)
            else:
                latest_lost = max(latest_lost, chunk._sent_time)
                self._mark_lost(chunk)
        if latest_lost >= 0:
            # The window was just cut, and may be full for half a round trip. One packet goes beyond it, as in
            # RFC 9260, 7.2.4 (3): the reader can take nothing of what follows before it has that.
            self._retransmit_at_once = True
            self._window.lost(latest_lost, now)

    def _mark_lost(self, chunk: DataChunk) -> None:
        if self._maybe_abandon(chunk):
            self._has_abandoned_chunks = True
        else:
            chunk._retransmit = True
            self._has_lost_chunks = True
        self._flight_size_decrease(chunk)

    # The one timer of the sender: a late packet, a probe for a lost tail, then the timeout

    def _loss_deadline(self) -> float | None:
        if self._reorder_deadline is not None:
            return self._reorder_deadline
        if not self._flight_size:
            return None
        if self._timeouts or self._srtt is None or self._rttvar is None:
            return min(
                self._progress_at + self._rto * 2.0 ** max(0, self._timeouts - 1),
                self._progress_at + _MAX_RTO,
            )
        probe_after = max(2 * self._srtt, self._srtt + 4 * self._rttvar) + ACK_DELAY
        return self._progress_at + min(probe_after, self._rto)

    def _set_loss_timer(self) -> None:
        """Pushing the deadline back costs nothing: a timer that fires early is set again."""
        deadline = self._loss_deadline()
        if deadline is None or self._association_state is self.State.CLOSED:
            return
        if self._loss_timer is not None:
            if self._loss_timer_at <= deadline:
                return
            self._loss_timer.cancel()
        self._loss_timer_at = deadline  # uvloop's handles do not tell it where the delay is nought
        self._loss_timer = self._clock.call_at(deadline, self._loss_timer_fired)

    def _loss_timer_fired(self) -> None:
        self._loss_timer = None
        deadline, now = self._loss_deadline(), self._clock.time()
        if deadline is None:
            return
        if deadline > now:
            self._set_loss_timer()
        elif self._reorder_deadline is not None:
            self._detect_losses(0, now)
            self._send_soon(self._send_more)
        elif self._timeouts == 0 and self._srtt is not None:
            self._timeouts = 1
            self._send_soon(self._probe)
        else:
            self._timed_out(now)

    async def _probe(self) -> None:
        """Send the last packet again (RFC 8985, 7.3): its acknowledgement tells what is missing before it.

        Without one nothing would: a lost tail has nothing behind it whose arrival shows the gap.
        """
        tail = next((chunk for chunk in reversed(self._sent_queue) if chunk._in_flight), None)
        if tail is not None:
            self._probed = tail.tsn
            await self._send_data(tail)
        self._set_loss_timer()

    def _timed_out(self, now: float) -> None:
        self._timeouts += 1
        self._window.timed_out(now)
        for chunk in self._sent_queue:
            if self._timeouts > 2:
                # A receiver may drop what it acknowledged above a gap (RFC 9260, 6.2.1): after so many
                # timeouts it is likely that it did.
                chunk._acked = False
            if not chunk._acked:
                self._mark_lost(chunk)
        self._update_advanced_peer_ack_point()
        self._send_soon(self._send_more)
        if self._timeouts == _UNANSWERED_TIMEOUTS:
            self.on_unanswered()
