"""Real text from a server in one home for a client in another, each behind its router."""

from __future__ import annotations

from asyncio.subprocess import Process
from pathlib import Path
from typing import Any

import pytest
from lab_texts import generate, pieces, plain_text, server_in, swarmcore_in
from nat_lab import NatLab, nat_lab

pytest.importorskip("swarmcore_transports.libp2p", reason="needs the extra libp2p")

pytestmark = pytest.mark.e2e

RELAY_PORT = 4001
LONG = 100
"""Tokens that last until a hole is punched, though the first attempt fail."""

LISTEN = ("--transport", "libp2p", "--listen")


async def home_with_a_server(lab: NatLab, folder: Path) -> tuple[Process, str]:
    """A public bootstrap peer, which relays, and a server of the whole model in home a."""
    relay, address = await swarmcore_in(lab, "public", "bootstrap", *LISTEN, f"/ip4/0.0.0.0/tcp/{RELAY_PORT}")
    await server_in(lab, "a", folder, "--bootstrap", address, *LISTEN, "/ip4/0.0.0.0/tcp/4101")
    return relay, address


async def test_the_relay_dies_once_the_hole_is_punched_and_nothing_stops(smollm2_folder, plain_smollm2):
    async with nat_lab("cone", "cone") as lab:
        relay, address = await home_with_a_server(lab, smollm2_folder)
        client = await generate(lab, smollm2_folder, address, LONG)
        said: list[dict[str, Any]] = []
        while not said or said[-1].get("path") != "hole-punched":
            line = await pieces(client, 1)
            assert line, "the client ended before the hole was punched"
            assert "piece" in line[0], "all was generated before the hole was punched"
            said += line
        relay.kill()
        said += await pieces(client)
        assert said.pop() == {"done": True}
        assert said[-1]["path"] == "hole-punched"
        assert "".join(line["piece"] for line in said) == plain_text(plain_smollm2, smollm2_folder, LONG)


async def test_symmetric_routers_leave_it_relayed_and_the_text_is_the_same(smollm2_folder, plain_smollm2):
    async with nat_lab("symmetric", "symmetric") as lab:
        _, address = await home_with_a_server(lab, smollm2_folder)
        said = await pieces(await generate(lab, smollm2_folder, address, 8))
        assert said.pop() == {"done": True}
        assert {line["path"] for line in said} == {"relayed"}
        assert "".join(line["piece"] for line in said) == plain_text(plain_smollm2, smollm2_folder, 8)
