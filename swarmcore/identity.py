"""Who a peer is: an Ed25519 key, and the libp2p peer id derived from it."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

import base58
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from swarmcore.errors import AddressError, IdentityFileError
from swarmcore.types import PeerId, short

# libp2p's peer id of a small key is the key itself: multihash "identity" (0x00) of 36 bytes (0x24) that hold
# the protobuf PublicKey {Type: Ed25519 (08 01), Data: 32 bytes (12 20 …)}.
_PEER_ID_PREFIX = bytes.fromhex("002408011220")


class Identity:
    """A peer's private key. `peer` is its public name; `sign` proves that name to others."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self.private_key = key
        self.peer = peer_id(key.public_key())

    @classmethod
    def generate(cls) -> Identity:
        """A new random identity that lives only in memory."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_seed(cls, seed: bytes) -> Identity:
        """The identity whose secret is ``seed``, 32 bytes: for tests and simulations that repeat exactly."""
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    @classmethod
    def load_or_create(cls, path: str | Path) -> Identity:
        """Read the key from a PEM file; on first use create the file, readable by its owner only (0600).

        Raise `IdentityFileError` when the file is no Ed25519 key, is open to other users, or cannot be read
        or created.
        """
        try:
            path = Path(path).expanduser()
            if not path.exists():
                _create_key_file(path)
            if not path.is_file():
                raise IdentityFileError(
                    f"identity file {path} is no file; name one, it is created on first use"
                )
            if os.name == "posix" and stat.S_IMODE(path.stat().st_mode) & 0o077:
                raise IdentityFileError(
                    f"identity file {path} can be read by other users; run: chmod 600 {path}"
                )
            pem = path.read_bytes()
        except RuntimeError as exc:
            raise IdentityFileError(f"identity file {path} is in a home that there is not: {exc}") from exc
        except OSError as exc:
            right = ", or give this user the right to it" if isinstance(exc, PermissionError) else ""
            raise IdentityFileError(
                f"identity file {path} can be neither read nor created: {exc.strerror or exc}; "
                f"name another{right}"
            ) from exc
        try:
            key = load_pem_private_key(pem, password=None)
        except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
            raise IdentityFileError(
                f"identity file {path} is not an unencrypted PEM private key; delete it to get a new identity"
            ) from exc
        if not isinstance(key, Ed25519PrivateKey):
            raise IdentityFileError(f"identity file {path} holds a key that is not Ed25519")
        return cls(key)

    def sign(self, data: bytes) -> bytes:
        """The 64-byte Ed25519 signature of ``data``."""
        return self.private_key.sign(data)

    def __repr__(self) -> str:
        return f"<Identity {short(self.peer)}>"


def _create_key_file(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pem = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    # Written beside and linked into place, so that two processes that start together agree on one key.
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink()


def peer_id(key: Ed25519PublicKey) -> PeerId:
    """The libp2p peer id of a public key."""
    raw = key.public_bytes(Encoding.Raw, PublicFormat.Raw)
    return PeerId(base58.b58encode(_PEER_ID_PREFIX + raw).decode())


def public_key(peer: str) -> Ed25519PublicKey:
    """The public key inside a peer id. Raise `AddressError` when it is not an Ed25519 peer id."""
    try:
        decoded = base58.b58decode(peer)
    except ValueError:
        decoded = b""
    # base58 overlooks white space at the end: one key must not have several names.
    if len(decoded) != 38 or not decoded.startswith(_PEER_ID_PREFIX) or peer != peer.rstrip():
        raise AddressError(
            f"{peer!r} is not the peer id of an Ed25519 key: 52 characters that begin with 12D3Koo, the end "
            f"of its owner's address"
        )
    return Ed25519PublicKey.from_public_bytes(decoded[len(_PEER_ID_PREFIX) :])


def verify(peer: str, data: bytes, signature: bytes) -> bool:
    """Whether ``peer`` signed ``data``. False, never an error, for a malformed peer id or signature."""
    try:
        public_key(peer).verify(signature, data)
    except (InvalidSignature, AddressError, ValueError):
        return False
    return True
