import pytest

pytest.importorskip("aiortc", reason="needs the extra webrtc")

from swarmcore_transports.webrtc.aiortc.congestion import INITIAL_PACKETS, CongestionWindow

PACKET = 1000
RTT = 0.05


def round_trips(window: CongestionWindow, count: int, start: float = 0.0) -> float:
    """Fill the window and have all of it acknowledged, ``count`` times. The time after it."""
    now = start
    for _ in range(count):
        flight = window.size // PACKET
        for sent in range(flight):
            window.sent(PACKET, (sent + 1) * PACKET, now)
        for _ in range(flight):
            window.acknowledged(PACKET, now, RTT, now + RTT)
        now += RTT
    return now


def test_a_hidden_state_of_16_kb_fits_the_first_window() -> None:
    window = CongestionWindow(1160)
    assert window.size >= 16 * 1024
    assert window.delay(None, 0.0) == 0.0


def test_doubles_each_round_trip_until_something_is_lost() -> None:
    window = CongestionWindow(PACKET)
    now = round_trips(window, 2)
    assert window.size == 4 * INITIAL_PACKETS * PACKET
    window.lost(now, now)
    cut = window.size
    assert cut == pytest.approx(0.7 * 4 * INITIAL_PACKETS * PACKET, abs=1)
    round_trips(window, 1, now)
    assert cut < window.size < cut + 3 * PACKET


def test_doubles_however_few_acknowledgements_tell_of_what_arrived() -> None:
    window = CongestionWindow(PACKET)
    for sent in range(INITIAL_PACKETS):
        window.sent(PACKET, (sent + 1) * PACKET, 0.0)
    for _ in range(2):
        window.acknowledged(INITIAL_PACKETS // 2 * PACKET, 0.0, RTT, RTT)
    assert window.size == 2 * INITIAL_PACKETS * PACKET


def test_one_acknowledgement_of_very_much_does_not_open_the_window_at_once() -> None:
    window = CongestionWindow(PACKET)
    window.sent(PACKET, window.size, 0.0)
    window.acknowledged(100 * INITIAL_PACKETS * PACKET, 0.0, RTT, RTT)
    assert window.size == 2 * INITIAL_PACKETS * PACKET


def test_losses_of_one_flight_cut_once() -> None:
    window = CongestionWindow(PACKET)
    window.lost(0.0, 1.0)
    cut = window.size
    window.lost(0.5, 1.01)
    assert window.size == cut
    window.lost(1.02, 1.1)
    assert window.size < cut


def test_regains_what_it_had_before_a_loss_and_then_probes_beyond() -> None:
    window = CongestionWindow(PACKET)
    now = round_trips(window, 3)
    before = window.size
    window.lost(now, now)
    now = round_trips(window, 20, now)
    assert 0.7 * before < window.size <= 1.01 * before
    round_trips(window, 300, now)
    assert window.size > 1.2 * before


def test_losses_never_take_all_of_it() -> None:
    window = CongestionWindow(PACKET)
    for attempt in range(50):
        window.lost(float(attempt), float(attempt))
    assert window.size == 4 * PACKET


def test_a_timeout_begins_with_one_packet_and_returns_quickly_to_where_it_was_safe() -> None:
    window = CongestionWindow(PACKET)
    window.timed_out(1.0)
    assert window.size == PACKET
    round_trips(window, 6, 1.0)
    assert window.size >= 0.7 * INITIAL_PACKETS * PACKET


def test_does_not_grow_where_it_is_not_used() -> None:
    window = CongestionWindow(PACKET)
    for step in range(100):
        window.sent(PACKET, PACKET, step * RTT)
        window.acknowledged(PACKET, step * RTT, RTT, (step + 1) * RTT)
    assert window.size == INITIAL_PACKETS * PACKET


def test_spreads_what_is_more_than_a_burst() -> None:
    window = CongestionWindow(PACKET)
    now = round_trips(window, 4)
    burst, at_once = window.size // PACKET, 0
    while window.delay(RTT, now) == 0.0:
        window.sent(PACKET, PACKET, now)
        at_once += 1
    assert at_once == INITIAL_PACKETS < burst
    end = now
    for _ in range(burst - at_once):
        end += window.delay(RTT, end)
        window.sent(PACKET, PACKET, end)
    assert RTT / 4 < end - now < RTT


def test_an_idle_window_shrinks_to_the_first_one() -> None:
    window = CongestionWindow(PACKET)
    round_trips(window, 4)
    grown = window.size
    window.resumed(1.0)
    assert window.size == grown
    window.resumed(5.0)
    assert window.size == grown // 2
    window.resumed(3600.0)
    assert window.size == INITIAL_PACKETS * PACKET
