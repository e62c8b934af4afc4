"""From the options that concern WebRTC to the configuration of a peer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from swarmcore.cli.peer import network_config
from swarmcore.cli.webrtc import read_ice_file, transport_options
from swarmcore.client.swarm import connect
from swarmcore.errors import InputError
from swarmcore.identity import Identity
from swarmcore.transport import transport_class

pytest.importorskip("aiortc", reason="needs the extra webrtc")

PEER = Identity.from_seed(b"p" * 32).peer
STUN, TURN = "stun:stun.example:3478", "turn:u:p:w@turn.example"


def config(**given: Any) -> Any:
    values = {"transports": ["webrtc"], "listen": [], "announce": [], "bootstrap": [], "allowed_peers": []}
    return network_config(PEER, **(values | given))


def private(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o600)
    return str(path)


def test_without_options_everything_is_left_to_the_transport() -> None:
    assert config().options == {}
    assert config().transports == {"webrtc": ("0.0.0.0:{port}", "[::]:{port}")}
    assert transport_options(ice=(), ice_file=None, ice_relay_only=False, signalling_ca=None) == {}


def test_every_option_arrives(tmp_path: Path) -> None:
    file = private(tmp_path / "ice", f"# ours\n\n{TURN}\n")
    options = config(ice=(STUN,), ice_file=file, ice_relay_only=True, webrtc_engine="aiortc").options
    assert options == {"webrtc": {"ice": (STUN, TURN), "relay_only": True, "engine": "aiortc"}}
    transport_class("webrtc")(Identity.generate(), **options["webrtc"])  # takes them all


def test_signalling_services_of_others_are_places_to_listen_on_and_to_announce() -> None:
    given = config(listen=["webrtc:wss://meet.example:443"], announce=["webrtc:wss://other.example:443"])
    assert given.transports == {"webrtc": ("wss://meet.example:443",)}
    assert given.announce == (f"webrtc:wss://other.example:443/{PEER}",)


def test_a_client_has_the_transport_that_it_was_given_options_for() -> None:
    swarm = connect(f"tcp://h:1/{PEER}", transport_options=transport_options(ice=(STUN,)))
    assert "webrtc" in swarm.node._transports


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"transports": ["tcp"], "ice": (STUN,)}, "--ice: only for transport webrtc"),
        ({"transports": ["tcp"], "webrtc_engine": "aiortc"}, "--webrtc-engine: only for transport webrtc"),
        ({"listen": ["wss://meet.example:443"]}, "write webrtc:wss://meet.example:443"),
        ({"ice_file": "nowhere"}, "nowhere cannot be read: No such file"),
        ({"signalling_key": "key.pem"}, "--signalling-cert"),
        ({"signalling_cert": "nowhere.pem"}, "nowhere.pem cannot be used"),
        ({"signalling_ca": "nowhere.pem"}, "nowhere.pem cannot be used"),
    ],
)
def test_what_cannot_be_used_is_refused(given: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        config(**given)


def test_a_certificate_without_its_key_says_how_to_name_that(tmp_path: Path) -> None:
    file = private(tmp_path / "cert.pem", "no certificate")
    with pytest.raises(InputError, match="in a file of its own with --signalling-key"):
        config(signalling_cert=file)
    with pytest.raises(InputError, match="no certificate and its key"):
        config(signalling_cert=file, signalling_key=file)
    with pytest.raises(InputError, match=r"no certificate \(PEM\)"):
        config(signalling_ca=file)


def test_a_file_of_credentials_is_for_its_owner_only(tmp_path: Path) -> None:
    file = private(tmp_path / "ice", STUN)
    assert read_ice_file(file) == (STUN,)
    Path(file).chmod(0o640)
    with pytest.raises(InputError, match="chmod 600"):
        read_ice_file(file)
    with pytest.raises(InputError, match="names no server"):
        read_ice_file(private(tmp_path / "empty", "# nothing\n"))
