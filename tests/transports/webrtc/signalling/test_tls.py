"""Signalling services with TLS, and what is said of those that cannot be used."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import logging
import socket
import ssl
from pathlib import Path

import pytest

from swarmcore.errors import PeerUnreachableError
from swarmcore.identity import Identity

webrtc = pytest.importorskip("swarmcore_transports.webrtc", reason="needs the extra webrtc")
from cryptography import x509  # noqa: E402
from cryptography.hazmat.primitives import hashes  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import ec  # noqa: E402
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat  # noqa: E402
from raw_signalling import registered  # noqa: E402
from webrtc_peers import dialler, echo, exchanged, service  # noqa: E402

from swarmcore_transports.webrtc.addresses import ServiceAddress  # noqa: E402


def certificate(folder: Path, subject: x509.GeneralName) -> Path:
    """Of ``subject``, signed by itself, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "signalling service")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([subject]), critical=False)
        .sign(key, hashes.SHA256())
    )
    file = folder / "both.pem"
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    file.write_bytes(pem + made.public_bytes(Encoding.PEM))
    return file


def contexts(file: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """For the service with this certificate, and for those who believe it."""
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(file)
    return tls, ssl.create_default_context(cafile=str(file))


async def test_a_service_with_a_certificate_of_its_own(tmp_path: Path) -> None:
    tls, trusted = contexts(certificate(tmp_path, x509.IPAddress(ipaddress.ip_address("127.0.0.1"))))
    async with dialler(listen_on=["127.0.0.1:0"], tls=tls) as listener:
        [address] = await listener.listen(echo)
        assert str(address).startswith("webrtc:wss://127.0.0.1:")
        async with dialler(trusted=trusted) as a, dialler() as suspicious:
            await exchanged(a, address)
            with pytest.raises(PeerUnreachableError, match="its certificate is not to be believed"):
                await suspicious.open_stream(address)


async def test_a_service_with_a_certificate_for_a_domain(tmp_path: Path) -> None:
    """Nobody but the peer that runs it reaches it by another name."""
    tls, trusted = contexts(certificate(tmp_path, x509.DNSName("localhost")))
    async with dialler(listen_on=["127.0.0.1:0"], tls=tls) as listener, dialler(trusted=trusted) as a:
        [by_number] = await listener.listen(echo)
        port = ServiceAddress.parse(by_number.location).port
        await exchanged(a, ServiceAddress("localhost", port, tls=True).address(by_number.peer))
    async with dialler(listen_on=["127.0.0.1:0"], tls=tls) as listener, dialler(trusted=trusted) as a:
        [by_number] = await listener.listen(echo)
        with pytest.raises(PeerUnreachableError, match="its certificate is not to be believed"):
            await a.open_stream(by_number)


async def test_where_nobody_listens_it_says_so() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        nowhere = ServiceAddress("127.0.0.1", bound.getsockname()[1]).address(Identity.generate().peer)
        async with dialler() as a:
            with pytest.raises(
                PeerUnreachableError, match="cannot be connected to: Connection refused"
            ) as told:
                await a.open_stream(nowhere)
        assert "ssl" not in str(told.value)


UPGRADE = (
    b"GET /swarmcore/signalling/1 HTTP/1.1\r\nHost: here\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


async def test_who_hangs_up_at_once_fills_no_log(caplog: pytest.LogCaptureFixture) -> None:
    async with service() as running:
        for _ in range(20):
            _, writer = await asyncio.open_connection("127.0.0.1", running.place.port)
            writer.write(UPGRADE)
            writer.close()
            await writer.wait_closed()
        async with registered(running.place):  # who comes after them is served
            assert running.counters["registered"] == 1
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_requests_that_are_none_fill_no_log(caplog: pytest.LogCaptureFixture) -> None:
    async with service() as running:
        for request in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"GET\r\n\r\n"):
            reader, writer = await asyncio.open_connection("127.0.0.1", running.place.port)
            writer.write(request)
            async with asyncio.timeout(10):
                assert b" 400 " in await reader.readline()
            writer.close()
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
