"""How soon two homes are connected directly, by our DCUtR or by that of py-libp2p; prints seconds.

PYTHONPATH=tests/support python -m hole_punching_times [--library] [--rounds 3]
"""

from __future__ import annotations

import argparse
import asyncio
import time

import trio
from lab_peer import LabPeer
from libp2p.abc import INetConn
from libp2p.relay.circuit_v2.dcutr import DCUtRProtocol
from libp2p.tools.anyio_service import background_trio_service
from nat_lab import nat_lab

from swarmcore.types import PeerId
from swarmcore_transports.libp2p.host import is_direct
from swarmcore_transports.libp2p.nat.hole_punching import HolePuncher

ANYWHERE = "/ip4/0.0.0.0/tcp"
PATIENCE = 60.0


def use_library() -> None:
    """Let py-libp2p's own DCUtR run in this process where ours would."""

    async def run(self: HolePuncher) -> None:
        host = self._host

        def connected(connection: INetConn) -> None:
            peer = connection.muxed_conn.peer_id
            if is_direct(connection) and not all(map(is_direct, host.connections(peer))):
                host.hole_punched.add(connection)
                host.on_direct(PeerId(str(peer)))

        host.events.on_connected.append(connected)
        async with background_trio_service(DCUtRProtocol(host.libp2p)):
            await trio.sleep_forever()

    HolePuncher.run = run  # type: ignore[method-assign]


async def measure(*, library: bool, listens: bool) -> str:
    """Seconds from the first stream through the relay to a message on a direct connection."""
    async with nat_lab() as lab:
        relay = await LabPeer(lab, "public", listen_on=[f"{ANYWHERE}/4001"]).start()
        [at] = await relay.call("addresses")
        options = {"relays": [at], "upnp": False, "library_dcutr": library}
        server = await LabPeer(lab, "a", listen_on=[f"{ANYWHERE}/4101"], **options).start()
        client = await LabPeer(lab, "b", listen_on=[f"{ANYWHERE}/4201"] if listens else [], **options).start()
        for peer in (server, client) if listens else (server,):
            addresses = await peer.until("addresses", shows=lambda found: "p2p-circuit" in found[-1])
            if peer is server:
                address = addresses[-1]
        stream = await client.call("open_stream", address)
        began = time.monotonic()
        while (passed := time.monotonic() - began) < PATIENCE:
            if await client.call("path", stream) != "relayed":
                return f"{passed:.2f} s"
            await asyncio.sleep(0.05)
        return f"not within {PATIENCE:g} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", action="store_true", help="use py-libp2p's own DCUtR")
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    for listens in (False, True):
        for _ in range(chosen.rounds):
            took = asyncio.run(measure(library=chosen.library, listens=listens))
            print("both listen:" if listens else "the client listens nowhere:", took, flush=True)


if __name__ == "__main__":
    main()
