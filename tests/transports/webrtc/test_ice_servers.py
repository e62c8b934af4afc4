from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
from types import SimpleNamespace

import pytest

from swarmcore.errors import AddressError, ProtocolError

ice = pytest.importorskip("swarmcore_transports.webrtc.ice", reason="needs the extra webrtc")
from swarmcore_transports.webrtc.sdp import (  # noqa: E402
    MAX_CANDIDATES,
    check_description,
    path_of,
)


@pytest.mark.parametrize(
    ("text", "url", "user", "password", "secret"),
    [
        ("stun:stun.example:19302", "stun:stun.example:19302", None, None, None),
        ("stun:192.0.2.1", "stun:192.0.2.1:3478", None, None, None),
        ("turn:u:hush@h:99", "turn:h:99?transport=udp", "u", "hush", None),
        ("turn:u:p:@:q@h?transport=tcp", "turn:h:3478?transport=tcp", "u", "p:@:q", None),
        ("turns:u:hush@h", "turns:h:5349?transport=tcp", "u", "hush", None),
        ("turn-secret:s:t@h", "turn:h:3478?transport=udp", None, None, "s:t"),
        ("turns-secret:s@h", "turns:h:5349?transport=tcp", None, None, "s"),
        ("stun:[::1]", "stun:[::1]:3478", None, None, None),
        ("stun:[2001:DB8::1]:99", "stun:[2001:DB8::1]:99", None, None, None),
        ("turn:u:hush@[::ffff:192.0.2.1]", "turn:[::ffff:192.0.2.1]:3478?transport=udp", "u", "hush", None),
        ("turns:u:[p]@[2001:db8::1]:99", "turns:[2001:db8::1]:99?transport=tcp", "u", "[p]", None),
    ],
)
def test_servers_as_they_are_written(text, url, user, password, secret):
    server = ice.IceServer.parse(text)
    assert (server.url, server.user, server.password, server.secret) == (url, user, password, secret)
    assert not password or password not in repr(server)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "stun",
        "stun:",
        "stun:h:0",
        "stun:h:65536",
        "stun:h:x",
        "stun:u:hush@h",
        "stun:h?transport=tcp",
        "stun-secret:hush@h",
        "stun:[]",
        "stun:[h]",
        "stun:[192.0.2.1]:3478",
        "stun:[2001:db8::1",
        "stun:2001:db8::1]:3478",
        "stun:[2001:db8:::1]:3478",
        "stun:[fe80::1%eth0]:3478",
        "turn:h:3478",
        "turn:u@h",
        "turn:u:@h",
        "turn::hush@h",
        "turn-secret:@h",
        "turns:u:hush@h?transport=udp",
        "turn:u:hush@h?transport=sctp",
        "turn:u:hush@a b:1",
        "http://u:hush@h",
    ],
)
def test_nonsense_is_refused_without_repeating_credentials(text):
    with pytest.raises(AddressError) as raised:
        ice.IceServer.parse(text)
    assert "hush" not in str(raised.value)


@pytest.mark.parametrize("text", ["stun:2001:db8::1", "turn:u:hush@2001:db8::1:3478", "turn-secret:hush@::1"])
def test_an_address_of_ipv6_needs_brackets(text):
    with pytest.raises(AddressError, match=r"in brackets, as in \[2001:db8::1\]:3478") as raised:
        ice.IceServer.parse(text)
    assert "hush" not in str(raised.value)


def test_a_secret_makes_logins_that_run_out():
    login = ice.IceServer.parse("turn-secret:s3cret@h").with_login(1_700_000_000.5)
    assert login.user == "1700043200:swarmcore"
    assert (
        login.password == base64.b64encode(hmac.digest(b"s3cret", login.user.encode(), hashlib.sha1)).decode()
    )
    assert login.secret is None


class Stun(asyncio.DatagramProtocol):
    """Answers any request with success, and counts them."""

    def __init__(self) -> None:
        self.requests = 0

    def connection_made(self, transport):
        self.transport = transport
        self.port = transport.get_extra_info("sockname")[1]

    def datagram_received(self, data, addr):
        self.requests += 1
        self.transport.sendto(b"\x01\x01" + data[2:], addr)


async def stun(factory=Stun) -> Stun:
    _, server = await asyncio.get_running_loop().create_datagram_endpoint(
        factory, local_addr=("127.0.0.1", 0)
    )
    return server


async def test_of_several_servers_one_of_each_kind_is_used_that_answers():
    living, gone = await stun(), await stun()
    gone.transport.close()
    listener = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    tcp = listener.sockets[0].getsockname()[1]
    servers = ice.IceServers(
        [
            f"stun:127.0.0.1:{gone.port}",
            f"turn:u:p@127.0.0.1:{gone.port}",
            f"turn-secret:s@127.0.0.1:{tcp}?transport=tcp",
            f"stun:127.0.0.1:{living.port}",
        ],
        clock=lambda: 0.0,
    )
    first, second = await asyncio.gather(servers.choose(), servers.choose())
    assert first == second
    assert [(one.scheme, one.port) for one in first] == [("stun", living.port), ("turn", tcp)]
    assert first[1].user == f"{ice.CREDENTIAL_SECONDS}:swarmcore"
    assert living.requests == 1
    servers.forget()
    await servers.choose()
    assert living.requests == 2
    await servers.close()
    listener.close()
    living.transport.close()


async def test_without_an_answer_there_is_no_server(monkeypatch):
    monkeypatch.setattr(ice, "PROBE_SECONDS", 0.05)
    silent = await stun(Silent)
    servers = ice.IceServers([f"stun:127.0.0.1:{silent.port}", "turns:u:p@nowhere.invalid"])
    assert await servers.choose() == ()
    await servers.close()
    silent.transport.close()


class Silent(Stun):
    def datagram_received(self, data, addr):
        self.requests += 1


@pytest.mark.parametrize(
    ("local", "remote", "path"),
    [
        (("host", "192.168.1.2"), ("host", "192.168.1.3"), "direct"),
        (("host", "192.168.1.2"), ("host", "11.0.0.1"), "direct"),
        (("host", "11.0.0.1"), ("prflx", "11.0.0.2"), "direct"),
        (("host", "192.168.1.2"), ("srflx", "11.0.0.2"), "hole-punched"),
        (("host", "192.168.1.2"), ("prflx", "11.0.0.2"), "hole-punched"),
        (("relay", "11.0.0.1"), ("host", "11.0.0.2"), "relayed"),
        (("host", "11.0.0.2"), ("relay", "11.0.0.1"), "relayed"),
    ],
)
def test_how_the_bytes_travel(local, remote, path):
    pair = SimpleNamespace(
        local_candidate=SimpleNamespace(type=local[0], host=local[1]),
        remote_candidate=SimpleNamespace(type=remote[0], host=remote[1]),
    )
    assert path_of(pair) == path


MEDIA = "m=application 9 UDP/DTLS/SCTP webrtc-datachannel"
NEEDED = "a=fingerprint:x\na=ice-ufrag:x\na=ice-pwd:x"


@pytest.mark.parametrize(
    ("sdp", "says"),
    [
        ("", "0 media sections"),
        (f"{MEDIA}\n{MEDIA}\n{NEEDED}", "2 media sections"),
        (f"m=audio 9 RTP/AVP 0\n{NEEDED}", "instead of one for data"),
        (f"{MEDIA}\na=ice-ufrag:x\na=ice-pwd:x", "without fingerprint"),
        (f"{MEDIA}\n{NEEDED}\n" + "a=candidate:1\n" * (MAX_CANDIDATES + 1), "33 candidates"),
        ("\n" * 300, "300 lines"),
    ],
)
def test_descriptions_that_are_not_even_parsed(sdp, says):
    with pytest.raises(ProtocolError, match=says):
        check_description(sdp)
