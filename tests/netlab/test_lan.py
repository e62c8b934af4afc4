"""Peers on one local network find each other with no address given."""

from __future__ import annotations

import asyncio
import json
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from typing import Any

import pytest
from lan_lab import Lan, lan

pytest.importorskip("libp2p", reason="needs the extra libp2p")

PATIENCE = 20.0
BOOTSTRAP = ["bootstrap", "--transport", "libp2p", "--mdns", "--no-upnp"]


async def swarmcore(lab: Lan, host: int, *arguments: str) -> Process:
    argv = [sys.executable, "-m", "swarmcore", *arguments, "--json"]
    return await lab.run(host, argv, stdin=DEVNULL, stdout=PIPE)


async def next_event(process: Process, kind: str) -> dict[str, Any]:
    assert process.stdout is not None
    async with asyncio.timeout(PATIENCE):
        async for line in process.stdout:
            event: dict[str, Any] = json.loads(line)
            if event["event"] == kind:
                return event
    raise AssertionError(f"it ended without the event {kind!r}")


async def seen_from(lab: Lan, host: int) -> set[str]:
    status = await swarmcore(lab, host, "status", "--mdns", "--once")
    found = await next_event(status, "status")
    await status.wait()
    return {server["peer"] for server in found["servers"]}


async def test_two_peers_that_begin_at_the_same_moment_form_one_swarm() -> None:
    async with lan(hosts=3) as lab:
        peers = [await swarmcore(lab, host, *BOOTSTRAP) for host in (0, 1)]
        online = [await next_event(peer, "online") for peer in peers]
        for host, said in enumerate(online):
            assert [url.split("/")[2] for url in said["addresses"]] == [lab.address(host)]
        both = {said["peer"] for said in online}
        async with asyncio.timeout(PATIENCE):
            while await seen_from(lab, 2) != both:  # a client that knows nobody either
                pass


async def test_a_client_alone_on_its_network_is_told_so() -> None:
    async with lan(hosts=1) as lab:
        status = await swarmcore(lab, 0, "status", "--mdns", "--once")
        said = await next_event(status, "error")
        assert said["error"] == "PeerUnreachableError"
        assert "no member of a swarm was found on the local network" in said["message"]
        assert await status.wait() == 1
