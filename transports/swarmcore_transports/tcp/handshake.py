"""Who is at the other end: both peer ids are proven inside TLS 1.3, before the first stream.

The listener's certificate carries its identity key, and TLS proves that it holds that key: the dialler
compares the key with the id it dialled. Then the listener sends a challenge (``HELLO``) and the dialler signs
it together with the listener's certificate, the TLS channel binding and both ids (``PROOF``), so that the
signature is worth nothing on any other connection.
"""

from __future__ import annotations

import datetime
import hashlib
import secrets
import ssl
import tempfile
from pathlib import Path

import attrs
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat
from cryptography.x509.oid import NameOID

from swarmcore.errors import AddressError, PeerIdentityError, ProtocolError
from swarmcore.identity import Identity, peer_id, verify
from swarmcore.types import PeerId, short
from swarmcore_transports.framed.frames import SETTINGS_BYTES, Settings

ALPN = "swarmcore/1"
"""Names the protocol and its version inside the TLS handshake."""


def listener_context(identity: Identity) -> tuple[ssl.SSLContext, bytes]:
    """The context that accepts connections as ``identity``, and its certificate in DER.

    No session tickets: resuming was measured to save nothing over a full handshake with Ed25519.
    """
    certificate = _self_signed(identity)
    context = _context(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0
    _load(context, certificate, identity)
    return context, certificate.public_bytes(Encoding.DER)


def dialler_context() -> ssl.SSLContext:
    """The context that dials. It trusts no authority: `check_certificate` pins the peer's key instead."""
    context = _context(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _context(protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols([ALPN])
    return context


def _self_signed(identity: Identity) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, identity.peer)])
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(identity.private_key.public_key())
        .serial_number(x509.random_serial_number())
        # A pinned key does not expire, and the two ends' clocks need not agree.
        .not_valid_before(datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC))
        .not_valid_after(datetime.datetime(9999, 12, 31, tzinfo=datetime.UTC))
        .sign(identity.private_key, None)
    )


def _load(context: ssl.SSLContext, certificate: x509.Certificate, identity: Identity) -> None:
    # The ssl module reads keys from files only; the key is encrypted, so that it never lies open on a disk.
    password = secrets.token_hex(32)
    key = identity.private_key.private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(password.encode())
    )
    with tempfile.TemporaryDirectory(prefix="swarmcore-") as folder:
        path = Path(folder, "certificate.pem")
        path.write_bytes(certificate.public_bytes(Encoding.PEM) + key)
        context.load_cert_chain(path, password=password)


CHALLENGE_BYTES = 32

_DOMAIN = b"swarmcore tcp dialler proof 1\0"
_SIGNATURE_BYTES = 64
_KEY_BYTES = 32


@attrs.frozen
class SecureChannel:
    """What both ends of one TLS connection know and no other connection shares."""

    certificate: bytes
    """SHA-256 of the listener's certificate."""
    binding: bytes
    """The client's TLS Finished message: a MAC over the whole TLS handshake."""

    @classmethod
    def of(cls, tls: ssl.SSLObject, certificate: bytes) -> SecureChannel:
        """Raise `ProtocolError` when the other end speaks TLS but not this protocol."""
        if tls.selected_alpn_protocol() != ALPN:
            raise ProtocolError(f"the peer does not speak {ALPN}")
        return cls(hashlib.sha256(certificate).digest(), tls.get_channel_binding("tls-unique") or b"")

    def statement(self, challenge: bytes, dialler: PeerId, listener: PeerId) -> bytes:
        """What the dialler signs."""
        binding = len(self.binding).to_bytes(2, "little") + self.binding
        ids = dialler.encode() + b"\0" + listener.encode()
        return _DOMAIN + challenge + self.certificate + binding + ids


def check_certificate(certificate: bytes, expected: PeerId) -> None:
    """Raise `PeerIdentityError` unless the certificate's key is that of the peer id ``expected``."""
    try:
        key = x509.load_der_x509_certificate(certificate).public_key()
    except ValueError as exc:
        raise PeerIdentityError("the peer's TLS certificate cannot be read") from exc
    found = peer_id(key) if isinstance(key, Ed25519PublicKey) else None
    if found != expected:
        reached = short(found) if found else "a peer without an Ed25519 key"
        raise PeerIdentityError(
            f"dialled {short(expected)} and reached {reached}; the address is out of date, or intercepted"
        )


def make_hello(challenge: bytes, settings: Settings) -> bytes:
    """The listener's first frame."""
    return challenge + settings.encode()


def answer_hello(
    hello: bytes, identity: Identity, listener: PeerId, channel: SecureChannel, settings: Settings
) -> tuple[bytes, Settings]:
    """The dialler's proof, and the listener's settings. Raise `ProtocolError` on a malformed hello."""
    if len(hello) != CHALLENGE_BYTES + SETTINGS_BYTES:
        raise ProtocolError(f"a hello of {len(hello)} bytes")
    theirs = Settings.decode(hello[CHALLENGE_BYTES:])
    signature = identity.sign(channel.statement(hello[:CHALLENGE_BYTES], identity.peer, listener))
    key = identity.private_key.public_key().public_bytes_raw()
    return key + signature + settings.encode(), theirs


def check_proof(
    proof: bytes, challenge: bytes, listener: PeerId, channel: SecureChannel
) -> tuple[PeerId, Settings]:
    """The dialler's id and settings. Raise `PeerIdentityError` when it does not prove its id."""
    if len(proof) != _KEY_BYTES + _SIGNATURE_BYTES + SETTINGS_BYTES:
        raise ProtocolError(f"a proof of {len(proof)} bytes")
    key, signature = proof[:_KEY_BYTES], proof[_KEY_BYTES:-SETTINGS_BYTES]
    try:
        dialler = peer_id(Ed25519PublicKey.from_public_bytes(key))
    except (ValueError, AddressError) as exc:
        raise PeerIdentityError("the dialler's key is not an Ed25519 key") from exc
    if not verify(dialler, channel.statement(challenge, dialler, listener), signature):
        raise PeerIdentityError(f"the dialler did not prove that it is {short(dialler)}")
    return dialler, Settings.decode(proof[-SETTINGS_BYTES:])
