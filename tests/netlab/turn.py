"""coturn on the public host of a lab: a STUN and TURN server at port 3478."""

from __future__ import annotations

import asyncio
import tempfile
from asyncio.subprocess import PIPE
from pathlib import Path

from netlab.namespaces import PATIENCE, LabError, why_not
from netlab.netlab import ADDRESSES, PROGRAMS, NatLab

SECRET = "shared with the server"
PLACE = f"{ADDRESSES['public']}:3478"


def unavailable() -> str | None:
    """Why no such server can run here, or None."""
    return why_not(PROGRAMS | {"turnserver": "coturn"})


async def turn_server(lab: NatLab) -> asyncio.subprocess.Process:
    """Start it; it lets in who knows `SECRET`."""
    folder = Path(tempfile.gettempdir(), lab.namespace("public"))
    argv = ["turnserver", "-n", "-L", ADDRESSES["public"], "--use-auth-secret", "--realm", "lab", "--no-cli"]
    argv += [f"--static-auth-secret={SECRET}", "--no-tls", "--no-dtls", "--log-file", "stdout"]
    argv += ["--pidfile", f"{folder}.pid", "--userdb", f"{folder}.db"]
    server = await lab.run("public", argv, stdout=PIPE, stderr=asyncio.subprocess.STDOUT)
    assert server.stdout
    async with asyncio.timeout(PATIENCE):
        while line := await server.stdout.readline():
            if b"Total General servers" in line:
                lab.watching.append(asyncio.create_task(server.stdout.read()))
                return server
    raise LabError("turnserver ended instead of listening")
