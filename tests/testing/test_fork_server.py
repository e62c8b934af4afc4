"""Forked servers are processes like any other: killed, frozen, stopped, and their end is reported."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from swarmcore.errors import RemoteFaultError
from swarmcore.testing.fork_server import ForkServer
from swarmcore.testing.processes import ServerProcess

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(not Path("/proc").exists(), reason="needs Linux"),
]
pytest.importorskip("torch")

BOOTSTRAP = ("bootstrap", "--listen", "127.0.0.1:0")
LIGHT = ["swarmcore.cli"]
"""What the bootstrap peers need."""


async def ended(pid: int) -> None:
    """Wait for the end of a process that need not be a child of this one."""
    gone = asyncio.Event()
    loop = asyncio.get_running_loop()
    descriptor = os.pidfd_open(pid)
    loop.add_reader(descriptor, gone.set)
    try:
        async with asyncio.timeout(30):
            await gone.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


async def test_each_server_is_a_process_and_a_peer_of_its_own(fork_server: ForkServer) -> None:
    async with await fork_server.start(*BOOTSTRAP) as first:
        async with await fork_server.start(*BOOTSTRAP, "--bootstrap", first.address) as second:
            assert first.peer != second.peer
            assert len({os.getpid(), first.pid, second.pid}) == 3
            assert os.getsid(first.pid) == first.pid
            assert "2 running" in repr(fork_server)
        assert second.returncode == 0
        assert first.returncode is None
    assert first.returncode == 0
    assert "0 running" in repr(fork_server)


async def test_the_signal_that_ended_a_server_is_told(fork_server: ForkServer) -> None:
    server = await fork_server.start(*BOOTSTRAP)
    server.signal(signal.SIGSTOP)
    assert await server.kill() == -signal.SIGKILL
    server.signal(signal.SIGTERM)  # to nobody
    assert await server.stop() == -signal.SIGKILL


async def test_a_frozen_server_can_be_stopped(fork_server: ForkServer) -> None:
    server = await fork_server.start(*BOOTSTRAP)
    server.signal(signal.SIGSTOP)
    assert await server.stop() == 0


async def test_last_words_are_in_the_error(fork_server: ForkServer) -> None:
    with pytest.raises(RemoteFaultError, match="status 2, never online:\nerror: no such file"):
        await fork_server.start("serve", "--model", "/nowhere", "--listen", "127.0.0.1:0")
    with pytest.raises(RemoteFaultError, match="No such command 'server'"):
        await fork_server.start("server")


async def test_a_start_that_is_cancelled_leaves_nothing(fork_server: ForkServer) -> None:
    for delay in (0.0, 0.01, 0.02):
        start = asyncio.create_task(fork_server.start(*BOOTSTRAP))
        await asyncio.sleep(delay)
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start
    async with await fork_server.start(*BOOTSTRAP) as alone:
        assert alone.returncode is None
        async with asyncio.timeout(30):
            while "1 running" not in repr(fork_server):
                await asyncio.sleep(0.01)


async def test_leaving_the_fork_server_kills_its_servers() -> None:
    async with ForkServer(preload=LIGHT) as short_lived:
        server = await short_lived.start(*BOOTSTRAP)
    assert server.returncode == -signal.SIGKILL
    with pytest.raises(RuntimeError, match="async with"):
        await short_lived.start(*BOOTSTRAP)


async def test_without_the_fork_server_its_servers_live_until_their_program_ends() -> None:
    async with ForkServer(preload=LIGHT) as doomed:
        server = await doomed.start(*BOOTSTRAP)
        assert doomed.pid is not None
        os.kill(doomed.pid, signal.SIGKILL)
        with pytest.raises(RemoteFaultError, match="fork server"):
            while True:
                await doomed.start(*BOOTSTRAP)
        assert server.returncode is None
        server.signal(signal.SIGTERM)
        await ended(server.pid)
        assert await server.stop() == -signal.SIGKILL  # nobody told how it ended
    assert isinstance(server, ServerProcess)


async def test_a_program_has_the_arguments_environment_and_streams_that_it_is_given(
    fork_server: ForkServer, tmp_path: Path
) -> None:
    (tmp_path / "sibling.py").write_text("status = 7\n")
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, sibling\n"
        "assert __name__ == '__main__'\n"
        "print(sys.argv[1:], os.environ['WHO'], 'HOME' in os.environ, sys.stdin.read())\n"
        "sys.exit(sibling.status)\n"
    )
    (stdin, typed), (printed, stdout) = os.pipe(), os.pipe()
    with (
        fork_server.launch([str(program), "one", "two"], stdin, stdout, stdout, env={"WHO": "me"}) as control,
        control.makefile() as statuses,
    ):
        os.close(stdin)
        os.close(stdout)
        with os.fdopen(typed, "w") as writer:
            writer.write("typed")
        with os.fdopen(printed) as reader:
            assert reader.read() == "['one', 'two'] me False typed\n"
        pid, status = map(int, statuses)
    assert pid != os.getpid()
    assert status == 7
