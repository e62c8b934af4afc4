"""Something is said from the first second on, and never takes back what it said."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import subprocess
import sys

import pytest
from click.testing import CliRunner

from swarmcore.cli import main
from swarmcore.cli.output import can_redraw
from swarmcore.cli.terminal import TerminalProgress


def test_what_has_no_size_is_over_when_the_next_begins() -> None:
    with TerminalProgress() as progress:
        progress("loading torch", 0, 0)
        assert list(progress._tasks) == ["loading torch"]
        assert progress._bars is not None
        cells = [str(column(progress._bars.tasks[0])) for column in progress._bars.columns[2:]]
        assert cells == ["", "", "0:00:00", ""], "no bytes of none"
        progress("reading", 1, 10)
        assert list(progress._tasks) == ["reading"]
        progress("waiting", 0, 0)
        progress("reading", 10, 10)
        assert progress._bars is None, "all that began is done"


@pytest.mark.parametrize("what", [["routing", "--servers", "20", "--blocks", "8", "--rounds", "3"]])
def test_benchmarks_say_what_they_are_at(what: list[str]) -> None:
    done = CliRunner().invoke(main, ["bench", *what, "--json"])
    assert done.exit_code == 0, done.output
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["event"] for event in events[:2]] == ["progress", "progress"]
    assert events[-1]["event"] == what[0]


def test_a_command_says_that_it_loads_torch_before_it_does() -> None:
    pytest.importorskip("torch")
    program = (
        "import builtins, sys\n"
        "from swarmcore.cli import main\n"
        "real = builtins.__import__\n"
        "def imported(name, *args, **options):\n"
        "    if name == 'torch': raise SystemExit(77)\n"
        "    return real(name, *args, **options)\n"
        "builtins.__import__ = imported\n"
        "main(['convert', 'nowhere.gguf'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 77
    assert done.stderr == "loading torch and Transformers\n"


def test_the_bars_of_a_terminal_are_drawn_at_once() -> None:
    master, slave = pty.openpty()
    program = (
        "import sys; from swarmcore.cli.output import Output\n"
        "with Output().progress() as progress:\n"
        "    progress('loading torch', 0, 0); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stderr=slave,
        env={**os.environ, "TERM": "xterm"},
    )
    try:
        drawn = b""
        while b"loading torch" not in drawn:
            assert select.select([master], [], [], 30)[0], drawn
            drawn += os.read(master, 4096)
    finally:
        process.kill()
        process.communicate()
        os.close(master)
        os.close(slave)


@pytest.mark.parametrize(("term", "redrawn"), [("xterm", True), ("dumb", False), ("unknown", False)])
def test_nothing_is_redrawn_where_it_cannot_be(
    term: str, redrawn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", term)
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal, os.fdopen(master, "rb", buffering=0):
        assert can_redraw(terminal) == redrawn
    assert not can_redraw(io.StringIO())
