import pytest

from swarmcore.bench.contender import Figure
from swarmcore.bench.link_dialler import Turn
from swarmcore.bench.link_pump import Carried
from swarmcore.bench.long_link import Link
from swarmcore.bench.transport_over_link import (
    LinkReport,
    bench_over_link,
    figures_of,
    link_table,
    percentile,
)
from swarmcore.errors import UnavailableError


def turn(contender: str, factor: float, rate: float = 2e6) -> Turn:
    times = [0.05 * factor] * 9 + [0.3 * factor]
    return Turn(contender, 0.1 * factor, {"16 KB": times, "256 KB": times}, rate)


def test_a_percentile_is_one_of_the_values():
    values = list(range(1, 201))
    assert [percentile(values, percent) for percent in (1, 50, 99, 100)] == [2, 100, 198, 200]
    assert percentile([7.0], 99) == 7.0


def test_echoes_of_all_turns_count_and_connects_by_their_median():
    figures = figures_of([turn("tcp", factor) for factor in (1, 1, 20)])
    assert {figure.name: (pytest.approx(figure.value), figure.unit) for figure in figures["tcp"]} == {
        "connect, until the first answer": (100, "ms"),
        "16 KB echo, median": (50, "ms"),
        "16 KB echo, 99th percentile": (6000, "ms"),
        "256 KB echo, median": (50, "ms"),
        "256 KB echo, 99th percentile": (6000, "ms"),
        "64 KB messages": (2, "MB/s"),
    }


def test_others_are_set_in_relation_to_tcp_where_it_is_there():
    figures = figures_of([turn("webrtc", 3, 1e6), turn("tcp", 1)])
    ratios = {figure.name: figure.value for figure in figures["webrtc"] if figure.unit == "ratio"}
    assert ratios["16 KB echo, median, over tcp's"] == pytest.approx(3)
    assert ratios["64 KB messages, over tcp's"] == pytest.approx(0.5)
    assert "ratio" not in {figure.unit for figure in figures["tcp"]}
    assert "ratio" not in {figure.unit for figure in figures_of([turn("webrtc", 3)])["webrtc"]}


def test_a_rate_that_was_not_measured_is_no_figure():
    assert "64 KB messages" not in {figure.name for figure in figures_of([turn("tcp", 1, 0)])["tcp"]}


def test_the_table_says_what_the_link_was_and_did():
    report = LinkReport({"tcp": [Figure("16 KB echo, median", 51.0, "ms")]}, Carried(1234, 5, 6, 7))
    table = link_table(Link(25, 0.5, 10), report)
    assert table.title == "transports over a link: 25 ms one way, 0.5 % lost, 10 Mbit/s"
    assert str(table.caption).startswith(
        "TCP is the kernel's, with cubic; the emulated link carried 1,234 packets"
    )
    assert table.row_count == 1


async def test_where_no_link_can_be_emulated_that_is_said_with_the_cure(monkeypatch):
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(UnavailableError, match="network namespaces need root; without --delay"):
        await bench_over_link(["tcp"], Link(5))
