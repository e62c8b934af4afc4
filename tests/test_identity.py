"""Peer ids are libp2p's, and key files are private, checked, and made once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import base58
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from swarmcore.errors import AddressError, IdentityFileError
from swarmcore.identity import Identity, peer_id, public_key, verify
from swarmcore.types import short

# The test vectors of the libp2p specification (peer-ids/peer-ids.md): an Ed25519 key pair as protobuf. The
# peer id of that pair is the one that rust-libp2p's test of the same vectors expects.
SPEC_PRIVATE = bytes.fromhex(
    "080112407e0830617c4a7de83925dfb2694556b12936c477a0e1feb2e148ec9da60fee7d"
    "1ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e"
)
SPEC_PUBLIC = bytes.fromhex("080112201ed1e8fae2c4a144b8be8fd4b47bf3d3b34b871c3cacf6010f0e42d474fce27e")
SPEC_PEER_ID = "12D3KooWBtg3aaRMjxwedh83aGiUkwSxDwUZkzuJcfaqUmo7R3pq"
# The Ed25519 peer id that the specification shows in its section on string representation.
SPEC_EXAMPLE = "12D3KooWD3eckifWpRn9wQpMG9R9hX3sD158z7EqHWmweQAJU5SA"


def test_the_specifications_vectors() -> None:
    seed = SPEC_PRIVATE[4:36]
    identity = Identity(Ed25519PrivateKey.from_private_bytes(seed))
    assert identity.private_key.public_key().public_bytes_raw() == SPEC_PUBLIC[4:] == SPEC_PRIVATE[36:]
    assert identity.peer == SPEC_PEER_ID
    # The id of a small key is its identity multihash: 00, its length, the protobuf itself.
    assert base58.b58decode(identity.peer) == bytes([0, len(SPEC_PUBLIC)]) + SPEC_PUBLIC


@pytest.mark.parametrize("peer", [SPEC_PEER_ID, SPEC_EXAMPLE])
def test_the_key_is_inside_the_id(peer: str) -> None:
    assert peer_id(public_key(peer)) == peer


@pytest.mark.parametrize(
    "peer",
    [
        "",
        "0OIl",
        "12D3Koo",
        SPEC_PEER_ID[:-1],
        SPEC_PEER_ID + "1",
        "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N",  # the specification's example of an RSA key
        "ñ",
    ],
)
def test_what_is_no_ed25519_peer_id(peer: str) -> None:
    with pytest.raises(AddressError):
        public_key(peer)
    assert not verify(peer, b"data", bytes(64))


def test_signatures_prove_the_peer_id() -> None:
    identity, other = Identity.generate(), Identity.generate()
    signature = identity.sign(b"data")
    assert verify(identity.peer, b"data", signature)
    assert not verify(identity.peer, b"other data", signature)
    assert not verify(other.peer, b"data", signature)
    assert not verify(identity.peer, b"data", signature[:-1])
    assert not verify(identity.peer, b"data", b"")


def test_only_the_short_peer_id_is_shown() -> None:
    identity = Identity.generate()
    assert repr(identity) == f"<Identity {short(identity.peer)}>"


def test_a_key_file_is_made_once_and_private(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "identity.pem"
    identity = Identity.load_or_create(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert Identity.load_or_create(str(path)).peer == identity.peer
    assert [file.name for file in path.parent.iterdir()] == ["identity.pem"]


def test_a_key_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "identity.pem"
    Identity.load_or_create(path)
    path.chmod(0o644)
    with pytest.raises(IdentityFileError, match=f"chmod 600 {path}"):
        Identity.load_or_create(path)


def pem(key: Ed25519PrivateKey, password: bytes | None = None) -> bytes:
    encryption = BestAvailableEncryption(password) if password else NoEncryption()
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not an unencrypted PEM private key"),
        (b"\x00\xff" * 100, "is not an unencrypted PEM private key"),
        (pem(Ed25519PrivateKey.generate())[:60], "is not an unencrypted PEM private key"),
        (pem(Ed25519PrivateKey.generate(), b"password"), "is not an unencrypted PEM private key"),
        (
            generate_private_key(SECP256R1()).private_bytes(
                Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
            ),
            "not Ed25519",
        ),
    ],
    ids=["empty", "garbage", "cut off", "encrypted", "of another kind"],
)
def test_a_bad_key_file_is_left_alone_and_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "identity.pem"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(IdentityFileError, match=message) as raised:
        Identity.load_or_create(path)
    assert str(path) in raised.value.message
    assert path.read_bytes() == content


def test_a_place_where_no_file_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in tmp_path / "file" / "identity.pem", tmp_path:
        with pytest.raises(IdentityFileError, match=str(path)):
            Identity.load_or_create(path)
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        with pytest.raises(IdentityFileError, match="Permission denied"):
            Identity.load_or_create(tmp_path / "identity.pem")


def test_a_home_that_there_is_not() -> None:
    with pytest.raises(IdentityFileError, match="in a home that there is not"):
        Identity.load_or_create("~no-such-user/key")


def test_processes_that_start_together_agree_on_one_key(tmp_path: Path) -> None:
    path = tmp_path / "identity.pem"
    program = (
        "import sys; from swarmcore.identity import Identity; input(); "
        "print(Identity.load_or_create(sys.argv[1]).peer)"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    peers = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert peers == {Identity.load_or_create(path).peer}
    assert [file.name for file in tmp_path.iterdir()] == ["identity.pem"]
