"""A closed swarm's list in a file: read again, and never half."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

import pytest

from swarmcore.errors import InputError, PeerNotAllowedError
from swarmcore.identity import Identity
from swarmcore.registry.allow_file import MAX_BYTES, AllowFile, parse
from swarmcore.registry.memory import MemoryDirectory, MemoryRegistry
from swarmcore.rpc.node import Node
from swarmcore.testing.memory import MemoryNetwork
from swarmcore.types import PeerId
from swarmcore.wire.messages import Ping, Pong
from swarmcore.wire.protocols import PING_METHOD

ALICE, BOB = (Identity.from_seed(bytes([n]) * 32) for n in (1, 2))


def write(path: Path, *lines: str) -> None:
    """All at once, and never with the stamp that it had."""
    part = path.with_name("part")
    part.write_text("\n".join(lines))
    part.replace(path)


def test_ids_and_remarks() -> None:
    text = f"# friends\n\n{ALICE.peer}  # Alice\n  {BOB.peer}\r\n{ALICE.peer}"
    assert parse(text, "it") == {ALICE.peer, BOB.peer}
    with pytest.raises(InputError, match=r"it, line 2: .*12D3nonsense"):
        parse(f"{ALICE.peer}\n12D3nonsense", "it")


def test_what_is_read_and_when(tmp_path: Path) -> None:
    path = tmp_path / "friends"
    with pytest.raises(InputError, match="cannot be read: No such file"):
        AllowFile(path)
    write(path, ALICE.peer)
    listed = AllowFile(path, always=[BOB.peer])
    assert listed.peers == {ALICE.peer, BOB.peer}
    assert not listed.read()
    write(path)
    assert listed.read()
    assert listed.peers == {BOB.peer}
    for bad in (b"\xff\xfe", b"x" * (MAX_BYTES + 1), b"nonsense"):
        path.write_bytes(bad)
        with pytest.raises(InputError):
            listed.read()
    assert listed.peers == {BOB.peer}


@pytest.mark.virtual_time
async def test_who_is_added_gets_in_and_who_is_taken_off_does_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "swarmcore")
    path = tmp_path / "friends"
    write(path, ALICE.peer)
    listed = AllowFile(path)
    network, owner = MemoryNetwork(), Identity.generate()

    async def pong(request: Ping, caller: object) -> Pong:
        return Pong(request.payload)

    async def call(identity: Identity) -> None:
        async with Node(identity, [network.transport(identity, listen=False)]) as client:
            await client.call(server.addresses, PING_METHOD, Ping(b""))

    async with Node(owner, [network.transport(owner)], allowed_peers=listed.peers) as server:
        server.serve(PING_METHOD, pong)
        following = asyncio.create_task(
            listed.follow(server, MemoryRegistry(PeerId(owner.peer), MemoryDirectory()))
        )
        await call(ALICE)
        for _ in range(3):
            with pytest.raises(PeerNotAllowedError, match=rf"allow {BOB.peer}, and keep that identity"):
                await call(BOB)
        assert caplog.text.count(f"{BOB.peer} was refused") == 1
        write(path, BOB.peer)
        await asyncio.sleep(10)
        await call(BOB)
        with pytest.raises(PeerNotAllowedError):
            await call(ALICE)
        path.unlink()
        await asyncio.sleep(10)
        await call(BOB)
        assert caplog.text.count("the list stays as it was") == 1
        following.cancel()
        await asyncio.wait([following])


def test_the_stamp_sees_a_file_that_took_the_place_of_another(tmp_path: Path) -> None:
    path = tmp_path / "friends"
    write(path, ALICE.peer)
    listed = AllowFile(path)
    before = path.stat()
    write(path, BOB.peer)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert listed.read()
    assert listed.peers == {BOB.peer}
