"""coturn on the public host of a lab: a STUN and TURN server at port 3478."""

from __future__ import annotations

import asyncio
from asyncio.subprocess import PIPE

from nat_lab import ADDRESSES, PATIENCE, PROGRAMS, NatLab

from swarmcore.bench.namespaces import why_not
from swarmcore.errors import UnavailableError

SECRET = "shared with the server"
PLACE = f"{ADDRESSES['public']}:3478"


def unavailable() -> str | None:
    """Why no such server can run here, or None."""
    return why_not(PROGRAMS | {"turnserver": "coturn"})


async def turn_server(lab: NatLab) -> asyncio.subprocess.Process:
    """Start it; it lets in who knows `SECRET`."""
    argv = ["turnserver", "-n", "-L", ADDRESSES["public"], "--use-auth-secret", "--realm", "lab", "--no-cli"]
    argv += [f"--static-auth-secret={SECRET}", "--no-tls", "--no-dtls", "--log-file", "stdout"]
    argv += ["--pidfile", str(lab.folder / "turnserver.pid"), "--userdb", str(lab.folder / "turnserver.db")]
    server = await lab.run("public", argv, stdout=PIPE, stderr=asyncio.subprocess.STDOUT)
    assert server.stdout
    async with asyncio.timeout(PATIENCE):
        while line := await server.stdout.readline():
            if b"Total General servers" in line:
                lab.watching.append(asyncio.create_task(server.stdout.read()))
                return server
    raise UnavailableError("turnserver ended instead of listening")
