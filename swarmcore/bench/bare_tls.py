"""The yardstick: a blocking TLS 1.3 socket with nothing on top, read into one buffer and thrown away."""

from __future__ import annotations

import datetime
import socket
import ssl
import tempfile
import threading
import time
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

_ACKNOWLEDGEMENT = b"\x01"
_LENGTH_BYTES = 8


def serve_bare_tls() -> int:
    """Listen on a free loopback port, in a daemon thread, and return it.

    Each connection sends a length and so many bytes, again and again, and gets one byte back each time.
    """
    key = Ed25519PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bench")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC))
        .not_valid_after(datetime.datetime(9999, 12, 31, tzinfo=datetime.UTC))
        .sign(key, None)
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "throwaway.pem")
        path.write_bytes(
            certificate.public_bytes(Encoding.PEM)
            + key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        )
        context.load_cert_chain(path)
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_accept, args=(listener, context), daemon=True).start()
    return int(listener.getsockname()[1])


def _accept(listener: socket.socket, context: ssl.SSLContext) -> None:
    sink = bytearray(2**20)
    while True:
        plain, _ = listener.accept()
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with context.wrap_socket(plain, server_side=True) as tls:
            while announced := tls.recv(_LENGTH_BYTES):
                missing = int.from_bytes(announced, "little")
                while missing:
                    missing -= tls.recv_into(sink, min(missing, len(sink)))
                tls.sendall(_ACKNOWLEDGEMENT)


def bare_tls_rate(port: int, size: int, count: int) -> float:
    """Bytes per second of ``count`` writes of ``size`` bytes, from the first to the acknowledgement."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    body = memoryview(bytearray(size))
    with (
        socket.create_connection(("127.0.0.1", port)) as plain,
        context.wrap_socket(plain) as tls,
    ):
        tls.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        started = time.perf_counter()
        tls.sendall((size * count).to_bytes(_LENGTH_BYTES, "little"))
        for _ in range(count):
            tls.sendall(body)
        tls.recv(1)
        return size * count / (time.perf_counter() - started)
