"""TLS contexts: 1.3 only, the listener's certificate made with its identity key."""

from __future__ import annotations

import datetime
import secrets
import ssl
import tempfile
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, PrivateFormat
from cryptography.x509.oid import NameOID

from swarmcore.identity import Identity

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
