"""Both sides name themselves and sign the other's challenge, before the first message."""

from __future__ import annotations

import asyncio
import secrets

from swarmcore.errors import PeerIdentityError
from swarmcore.identity import Identity, verify
from swarmcore.types import PeerId, short

_DOMAIN = b"swarmcore unix handshake 1\0"
_CHALLENGE_BYTES = 32
_PEER_ID_BYTES = 52
_SIGNATURE_BYTES = 64


async def prove(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    identity: Identity,
    *,
    dialled: PeerId | None,
) -> PeerId:
    """Prove ``identity`` and return the other side's peer id.

    Raise `PeerIdentityError` when it does not prove one, or not the one that was ``dialled``.
    """
    challenge = secrets.token_bytes(_CHALLENGE_BYTES)
    writer.write(challenge + identity.peer.encode())
    theirs = await reader.readexactly(_CHALLENGE_BYTES)
    remote = PeerId((await reader.readexactly(_PEER_ID_BYTES)).decode("ascii", errors="replace"))
    if dialled not in (None, remote):
        raise PeerIdentityError(f"dialled {short(dialled or '')} and reached {short(remote)}")
    # The role is signed too: a signature cannot be sent back to the side that made it.
    roles = (b"dialler\0", b"listener\0") if dialled else (b"listener\0", b"dialler\0")
    writer.write(identity.sign(_statement(roles[0], theirs, identity.peer, remote)))
    signature = await reader.readexactly(_SIGNATURE_BYTES)
    if not verify(remote, _statement(roles[1], challenge, remote, identity.peer), signature):
        raise PeerIdentityError(f"the other side did not prove that it is {short(remote)}")
    return remote


def _statement(role: bytes, challenge: bytes, signer: PeerId, other: PeerId) -> bytes:
    return _DOMAIN + role + challenge + signer.encode() + b"\0" + other.encode()
