"""In a notebook, loading shows bars without being asked to."""

from __future__ import annotations

import sys
import types

import pytest

from swarmcore.client.swarm import TqdmProgress, notebook_progress


class Bar:
    """As much of tqdm's bars as is used."""

    def __init__(self, *, desc: str, total: int | None, **options: object) -> None:
        self.desc, self.total, self.n, self.closed = desc, total, 0, False
        BARS.append(self)

    def update(self, count: int) -> None:
        self.n += count

    def close(self) -> None:
        self.closed = True


BARS: list[Bar] = []


@pytest.fixture(autouse=True)
def no_bars() -> None:
    BARS.clear()


def test_a_bar_for_each_piece_of_work() -> None:
    progress = TqdmProgress(Bar)
    progress("loading torch", 0, 0)
    progress("reading", 10, 100)
    progress("reading", 40, 100)
    assert [(bar.desc, bar.n, bar.closed) for bar in BARS] == [
        ("loading torch", 0, True),
        ("reading", 40, False),
    ]
    progress("reading", 100, 100)
    assert BARS[1].closed
    progress("reading", 5, 50)  # another one of that name
    assert (len(BARS), BARS[2].n, BARS[2].total) == (3, 5, 50)


def test_only_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    assert notebook_progress() is None
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    assert notebook_progress() is None


def test_with_tqdm_itself(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tqdm = pytest.importorskip("tqdm")
    progress = TqdmProgress(tqdm.tqdm)
    progress("reading a model", 0, 2_000_000)
    progress("reading a model", 2_000_000, 2_000_000)
    shown = capsys.readouterr().err
    assert "reading a model: 100%" in shown
    assert "2.00M/2.00M" in shown
