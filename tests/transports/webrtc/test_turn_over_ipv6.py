"""A real TURN server at an IPv6 address: coturn on ::1."""

from __future__ import annotations

import asyncio
import shutil
import socket
from asyncio.subprocess import PIPE, STDOUT
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest

pytest.importorskip("swarmcore_transports.webrtc", reason="needs the extra webrtc")
from webrtc_peers import dialler, echo

from swarmcore_transports.webrtc.ice import IceServers


def free_port() -> int | None:
    """A port of ::1; None on a machine without IPv6."""
    try:
        with closing(socket.socket(socket.AF_INET6, socket.SOCK_STREAM)) as found:
            found.bind(("::1", 0))
            port: int = found.getsockname()[1]
            return port
    except OSError:
        return None


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[str]:
    """Where the server is, whose secret is ``s``."""
    port, program = free_port(), shutil.which("turnserver")
    if port is None or program is None:
        pytest.skip("needs coturn and IPv6")
    server = await asyncio.create_subprocess_exec(
        *(program, "-n", "-L", "::1", "-p", str(port), "-E", "::1", "--allow-loopback-peers"),
        *("--allocation-default-address-family=keep", "--use-auth-secret", "--static-auth-secret=s"),
        *("--realm", "here", "--no-cli", "--no-tls", "--no-dtls", "--log-file", "stdout"),
        *("--pidfile", str(tmp_path / "pid"), "--userdb", str(tmp_path / "users")),
        stdout=PIPE,
        stderr=STDOUT,
    )
    reading = None
    try:
        assert server.stdout
        async with asyncio.timeout(20):
            while b"Total General servers" not in (line := await server.stdout.readline()):
                assert line, "it ended instead of listening"
        reading = asyncio.create_task(server.stdout.read())
        yield f"[::1]:{port}"
    finally:
        if server.returncode is None:
            server.kill()
        await server.wait()
        if reading:
            await reading


@pytest.mark.parametrize("transport", ["udp", "tcp"])
async def test_it_tells_addresses_and_relays(place: str, transport: str) -> None:
    ice = [f"stun:{place}", f"turn-secret:s@{place}?transport={transport}"]
    servers = IceServers(ice)
    assert [str(one) for one in await servers.choose()] == [ice[0], f"turn:{place}?transport={transport}"]
    await servers.close()
    async with (
        dialler(ice=ice, relay_only=True, listen_on=["127.0.0.1:0"]) as listener,
        dialler(ice=ice, relay_only=True) as client,
    ):
        [address] = await listener.listen(echo)
        stream = await client.open_stream(address)
        await stream.send(b"there and back")
        assert bytes(await stream.receive()) == b"there and back"
        assert stream.path == "relayed"
        [managed] = client._connector.connections._all
        [candidate] = managed.connection._agent_in_use().local_candidates
        assert (candidate.type, candidate.host) == ("relay", "::1")
