from __future__ import annotations

import secrets

import attrs
import pytest

from swarmcore.errors import PeerIdentityError, ProtocolError
from swarmcore.identity import Identity
from swarmcore.wire.limits import Limits
from swarmcore_transports.framed.frames import Settings
from swarmcore_transports.tcp.handshake import (
    SecureChannel,
    answer_hello,
    check_certificate,
    check_proof,
    listener_context,
    make_hello,
)

LISTENER, DIALLER, STRANGER = Identity.generate(), Identity.generate(), Identity.generate()
CHANNEL = SecureChannel(secrets.token_bytes(32), secrets.token_bytes(48))
CHALLENGE = secrets.token_bytes(32)
SETTINGS = Settings.of(Limits(max_message=5000, send_buffer=70_000, keepalive=1.5))


def proof(
    identity: Identity = DIALLER, challenge: bytes = CHALLENGE, channel: SecureChannel = CHANNEL
) -> bytes:
    return answer_hello(make_hello(challenge, SETTINGS), identity, LISTENER.peer, channel, SETTINGS)[0]


def test_both_sides_learn_of_each_other() -> None:
    answer, theirs = answer_hello(make_hello(CHALLENGE, SETTINGS), DIALLER, LISTENER.peer, CHANNEL, SETTINGS)
    assert theirs == SETTINGS == Settings(max_message=5000, window=70_000, heartbeat=1.5)
    assert check_proof(answer, CHALLENGE, LISTENER.peer, CHANNEL) == (DIALLER.peer, SETTINGS)


def test_a_proof_is_worth_nothing_elsewhere() -> None:
    """Not for another challenge, connection, certificate or listener: a recorded proof cannot be replayed."""
    answer = proof()
    for challenge, listener, channel in (
        (secrets.token_bytes(32), LISTENER.peer, CHANNEL),
        (CHALLENGE, STRANGER.peer, CHANNEL),
        (CHALLENGE, LISTENER.peer, attrs.evolve(CHANNEL, binding=secrets.token_bytes(48))),
        (CHALLENGE, LISTENER.peer, attrs.evolve(CHANNEL, certificate=secrets.token_bytes(32))),
    ):
        with pytest.raises(PeerIdentityError):
            check_proof(answer, challenge, listener, channel)


def test_a_claimed_key_needs_its_signature() -> None:
    theirs, ours = proof(DIALLER), proof(STRANGER)
    with pytest.raises(PeerIdentityError):
        check_proof(theirs[:32] + ours[32:], CHALLENGE, LISTENER.peer, CHANNEL)


@pytest.mark.parametrize("position", range(0, 96, 5))
def test_a_changed_bit_is_noticed(position: int) -> None:
    answer = bytearray(proof())
    answer[position] ^= 1
    with pytest.raises(PeerIdentityError):
        check_proof(bytes(answer), CHALLENGE, LISTENER.peer, CHANNEL)


@pytest.mark.parametrize("size", [0, 31, 107, 109, 500])
def test_malformed_handshake_frames(size: int) -> None:
    with pytest.raises(ProtocolError):
        check_proof(bytes(size), CHALLENGE, LISTENER.peer, CHANNEL)
    with pytest.raises(ProtocolError):
        answer_hello(bytes(size), DIALLER, LISTENER.peer, CHANNEL, SETTINGS)


def test_a_window_too_small_to_work_with_is_refused() -> None:
    with pytest.raises(ProtocolError, match="grants"):
        Settings.decode(attrs.evolve(SETTINGS, window=10).encode())


def test_the_certificate_carries_the_identity() -> None:
    _, certificate = listener_context(LISTENER)
    check_certificate(certificate, LISTENER.peer)
    with pytest.raises(PeerIdentityError, match="dialled"):
        check_certificate(certificate, STRANGER.peer)
    with pytest.raises(PeerIdentityError, match="cannot be read"):
        check_certificate(b"no certificate", LISTENER.peer)
