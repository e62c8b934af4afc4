"""The network that the NAT tests stand on: what gets through a router, and what does not."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from asyncio.subprocess import PIPE

import pytest
from nat_lab import Kind, NatLab, nat_lab, unavailable

SOURCE_PORT = 4321

TELL_WHERE_FROM = """
import socket
server = socket.create_server(("0.0.0.0", 4001))
print("listening", flush=True)
for _ in range(2):
    connection, (address, port) = server.accept()
    connection.sendall(f"{address}:{port}".encode())
    connection.close()
"""

CONNECT = """
import socket, sys
try:
    with socket.create_connection((sys.argv[1], 4001), timeout=float(sys.argv[3]),
                                  source_address=("0.0.0.0", int(sys.argv[2]))) as connection:
        print(connection.recv(100).decode())
except TimeoutError:
    print("nothing")
"""


async def connect(
    lab: NatLab, host, to: str, *, patience: float = 5.0, source_port: int = SOURCE_PORT
) -> str:
    argv = [sys.executable, "-c", CONNECT, to, str(source_port), str(patience)]
    process = await lab.run(host, argv, stdout=PIPE)
    return (await process.communicate())[0].decode().strip()


async def serve(lab: NatLab, host) -> None:
    process = await lab.run(host, [sys.executable, "-c", TELL_WHERE_FROM], stdout=PIPE)
    assert await process.stdout.readline() == b"listening\n"


@pytest.mark.parametrize(("kind", "keeps_port"), [("cone", True), ("symmetric", False)])
async def test_a_router_lets_its_home_out_under_its_own_address(kind: Kind, keeps_port: bool):
    async with nat_lab(kind_a=kind) as lab:
        await serve(lab, "public")
        address, port = (await connect(lab, "a", lab.address("public"))).split(":")
        assert address == lab.seen_as("a")
        assert (int(port) == SOURCE_PORT) is keeps_port


async def test_nobody_gets_in_unasked():
    async with nat_lab() as lab:
        await serve(lab, "b")
        tries = [
            connect(lab, host, to, patience=0.3, source_port=0)
            for host in ("a", "public")
            for to in (lab.address("b"), lab.seen_as("b"))
        ]
        assert await asyncio.gather(*tries) == ["nothing"] * 4


MAP_A_PORT = """
import miniupnpc
router = miniupnpc.UPnP()
router.discoverdelay = 200
print(router.discover())
router.selectigd()
router.addportmapping(4001, "TCP", router.lanaddr, 4001, "test", "", 60)
print(router.externalipaddress(), flush=True)
"""


@pytest.mark.skipif(unavailable(upnp=True) is not None, reason=f"no UPnP lab: {unavailable(upnp=True)}")
async def test_a_router_maps_a_port_when_asked():
    pytest.importorskip("miniupnpc", reason="needs the extra libp2p")
    async with nat_lab() as lab:
        await lab.map_ports("b")
        asker = await lab.run("b", [sys.executable, "-c", MAP_A_PORT], stdout=PIPE)
        assert (await asker.communicate())[0].split() == [b"1", lab.seen_as("b").encode()]
        await serve(lab, "b")
        address, _ = (await connect(lab, "a", lab.seen_as("b"))).split(":")
        assert address == lab.seen_as("a")


async def test_a_lab_leaves_nothing_and_clears_what_a_killed_run_left():
    killed = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        "import asyncio, nat_lab as n\n"
        "async def main():\n"
        "    async with n.nat_lab() as lab:\n"
        "        await lab.run('a', ['sleep', '60'], stdout=asyncio.subprocess.DEVNULL)\n"
        "        print(lab.run_id, flush=True)\n"
        "        await asyncio.sleep(60)\n"
        "asyncio.run(main())",
        stdout=PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    left = (await killed.stdout.readline()).decode().strip()
    killed.send_signal(signal.SIGKILL)
    await killed.wait()
    assert left in await namespaces()
    async with nat_lab() as lab:
        assert lab.run_id in await namespaces()
    assert left not in await namespaces()
    assert lab.run_id not in await namespaces()


async def namespaces() -> str:
    listing = await asyncio.create_subprocess_exec("ip", "netns", "list", stdout=PIPE)
    return (await listing.communicate())[0].decode()


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda program: None)
    assert unavailable() == "missing: ip (Debian package iproute2), nft (Debian package nftables)"
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert unavailable() == "network namespaces need root"
