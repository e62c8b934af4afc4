"""The soak program, and that Ctrl-C leaves no process of it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.asyncio(loop_scope="session")]


def descendants(pid: int) -> set[int]:
    """The processes that ``pid`` started, and those that they started."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = set(children.get(pid, []))
    return found.union(*(descendants(child) for child in found))


def alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def test_ctrl_c_ends_a_soak_with_its_summary(smollm2_folder: Path) -> None:
    soak = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "swarmcore", "bench", "soak", "--seconds", "0", "--seed", "5"),
        *("--model", str(smollm2_folder), "--clients", "1", "--stages", "2", "--tokens", "8"),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "OMP_WAIT_POLICY": "passive"},
    )
    try:
        assert soak.stderr is not None
        while b"Ctrl-C ends it" not in (line := await soak.stderr.readline()):
            assert line, "it ended by itself"
        await asyncio.wait([asyncio.create_task(soak.wait())], timeout=4.0)
        started = descendants(soak.pid)
        assert len(started) >= 1 + 1 + 2, (
            "the fork server, the bootstrap peer, servers that are not being replaced"
        )
        soak.send_signal(signal.SIGINT)
        stdout, stderr = await soak.communicate()
    finally:
        if soak.returncode is None:
            soak.kill()
            await soak.wait()
    assert soak.returncode == 0, stderr
    assert b"seed 5" in stdout
    assert b"FAULT" not in stdout
    assert not [pid for pid in started if alive(pid)]
