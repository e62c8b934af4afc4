"""The baseline for TCP: a blocking TLS 1.3 socket, nothing on top, read into one buffer and thrown away."""

from __future__ import annotations

import contextlib
import datetime
import socket
import ssl
import struct
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from swarmcore.bench.contender import Yardstick

_REQUEST = struct.Struct("<QQ")  # bytes that come in all, bytes that go back for each so many
_ACKNOWLEDGEMENT = b"\x01"


class BareTls(Yardstick):
    """Each request is how many bytes will come, and how many of them are echoed at a time, 0 for none."""

    name = "bare TLS socket"

    def serve(self) -> str:
        context = _listener_context()
        listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=_accept, args=(listener, context), daemon=True).start()
        return str(listener.getsockname()[1])

    def round_trips(self, place: str, size: int, count: int) -> list[float]:
        body, times = memoryview(bytearray(size)), []
        with _connected(place) as tls:
            tls.sendall(_REQUEST.pack(size * count, size))
            for _ in range(count):
                started = time.perf_counter()
                tls.sendall(body)
                _read(tls, body, size)
                times.append(time.perf_counter() - started)
        return times

    def rate(self, place: str, size: int, count: int) -> float:
        body = memoryview(bytearray(size))
        with _connected(place) as tls:
            started = time.perf_counter()
            tls.sendall(_REQUEST.pack(size * count, 0))
            for _ in range(count):
                tls.sendall(body)
            tls.recv(1)
            return size * count / (time.perf_counter() - started)


def _listener_context() -> ssl.SSLContext:
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
    return context


def _accept(listener: socket.socket, context: ssl.SSLContext) -> None:
    sink = memoryview(bytearray(2**20))
    while True:
        plain, _ = listener.accept()
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with context.wrap_socket(plain, server_side=True) as tls:
            while request := tls.recv(_REQUEST.size):
                missing, echoed = _REQUEST.unpack(request)
                while missing:
                    if echoed:
                        _read(tls, sink, echoed)
                        tls.sendall(sink[:echoed])
                        missing -= echoed
                    else:
                        missing -= tls.recv_into(sink, min(missing, len(sink)))
                if not echoed:
                    tls.sendall(_ACKNOWLEDGEMENT)


@contextlib.contextmanager
def _connected(place: str) -> Iterator[ssl.SSLSocket]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    with (
        socket.create_connection(("127.0.0.1", int(place))) as plain,
        context.wrap_socket(plain) as tls,
    ):
        tls.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield tls


def _read(tls: ssl.SSLSocket, into: memoryview, size: int) -> None:
    got = 0
    while got < size:
        got += tls.recv_into(into[got:size], size - got)
