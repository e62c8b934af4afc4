"""Transports over an emulated link, measured as ``swarmcore bench transport --delay`` does."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from asyncio.subprocess import PIPE

import pytest

from swarmcore.bench.link_dialler import LinkEffort
from swarmcore.bench.link_pump import EARLY, LEFT, RIGHT
from swarmcore.bench.long_link import Link, long_link
from swarmcore.bench.namespaces import command
from swarmcore.bench.transport_over_link import bench_over_link

ROUND_TRIPS = """
import json, socket, time
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
    client.connect(("198.18.0.2", 4001))
    client.settimeout(0.5)
    sent = {}
    times = []
    for number in range(40):
        sent[number] = time.perf_counter()
        client.send(bytes([number]))
    try:
        while True:
            [number] = client.recv(10)
            times.append(time.perf_counter() - sent[number])
    except TimeoutError:
        print(json.dumps(times))
"""

ECHO = """
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
    server.bind(("198.18.0.2", 4001))
    print("bound", flush=True)
    while True:
        server.sendto(*server.recvfrom(10))
"""


async def test_a_link_delays_loses_and_leaves_nothing() -> None:
    async with long_link(Link(delay=10, loss=20, seed=1)) as network:
        echo = await network.run(RIGHT, "-c", ECHO)
        assert echo.stdout
        assert await echo.stdout.readline() == b"bound\n"
        client = await network.run(LEFT, "-c", ROUND_TRIPS)
        times = json.loads((await client.communicate())[0])
        assert network.run_id in command("ip", "netns", "list")
    assert network.run_id not in command("ip", "netns", "list")
    assert echo.returncode == -signal.SIGKILL
    assert min(times) >= 0.02 - 2 * EARLY
    assert network.carried is not None
    assert network.carried.lost == 40 - len(times) > 0


async def test_webrtc_is_about_as_quick_as_tcp_over_a_long_link() -> None:
    pytest.importorskip("swarmcore_transports.webrtc", reason="needs the extra webrtc")
    effort = LinkEffort(turns=1, echoes={"16 KB": 24, "256 KB": 12}, stream_seconds=0)
    report = await bench_over_link(["tcp", "webrtc"], Link(delay=25), effort)
    found = {figure.name: figure.value for figure in report.figures["webrtc"]}
    assert found["16 KB echo, median, over tcp's"] <= 1.25
    assert found["256 KB echo, median, over tcp's"] <= 2
    assert report.carried
    assert report.carried.dropped == 0


async def test_an_interrupted_measurement_leaves_nothing() -> None:
    argv = ["-m", "swarmcore", "bench", "transport", "--transport", "tcp", "--delay", "5"]
    bench = await asyncio.create_subprocess_exec(sys.executable, *argv, stdout=PIPE, stderr=PIPE)
    try:
        async with asyncio.timeout(20):
            while f"-{bench.pid}-" not in command("ip", "netns", "list"):
                await asyncio.sleep(0.02)
            bench.send_signal(signal.SIGINT)
            _, said = await bench.communicate()
    finally:
        if bench.returncode is None:
            bench.kill()
    assert bench.returncode == 128 + signal.SIGINT
    assert b"Traceback" not in said
    assert f"-{bench.pid}-" not in command("ip", "netns", "list")
