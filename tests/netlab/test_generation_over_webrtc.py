"""Real text over WebRTC from a server in one home for a client in another, each behind its router."""

from __future__ import annotations

import pytest
from lab_texts import generate, pieces, plain_text, server_in, swarmcore_in
from nat_lab import ADDRESSES, nat_lab
from turn_server import PLACE, turn_server, unavailable

pytest.importorskip("swarmcore_transports.webrtc", reason="needs the extra webrtc")

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(unavailable() is not None, reason=f"no STUN server: {unavailable()}"),
]

SIGNALLING = f"{ADDRESSES['public']}:4001"
TOKENS = 12
WEBRTC = ("--transport", "webrtc", "--listen")


async def test_all_that_is_public_dies_once_they_are_connected_and_nothing_stops(
    smollm2_folder, plain_smollm2
):
    ice = f"stun:{PLACE}"
    async with nat_lab("cone", "cone") as lab:
        stun = await turn_server(lab)
        bootstrap, address = await swarmcore_in(lab, "public", "bootstrap", *WEBRTC, SIGNALLING)
        listen = (*WEBRTC, f"webrtc:ws://{SIGNALLING}", "--ice", ice)
        await server_in(lab, "a", smollm2_folder, "--bootstrap", address, *listen)
        client = await generate(lab, smollm2_folder, address, TOKENS, webrtc={"ice": [ice]})
        said = await pieces(client, 3)
        bootstrap.kill()
        stun.kill()
        said += await pieces(client)
        assert said.pop() == {"done": True}
        assert {line["path"] for line in said} == {"hole-punched"}
        assert "".join(line["piece"] for line in said) == plain_text(plain_smollm2, smollm2_folder, TOKENS)
