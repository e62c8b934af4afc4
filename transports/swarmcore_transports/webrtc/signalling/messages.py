"""What travels between a peer and a signalling service: JSON, one text message each, and signed envelopes.

A description says by which certificate (its DTLS fingerprint) and by which candidates a peer is reached. It
is signed by the peer's identity, together with whom it is for and to which negotiation it belongs: a service
that changes, swaps or misdirects one is noticed, and cannot sit in the middle. It sees who talks to whom.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from swarmcore.errors import PeerIdentityError, ProtocolError
from swarmcore.identity import Identity, verify
from swarmcore.types import PeerId, short

NEGOTIATION_ID_BYTES = 16
"""Length of the random id of a negotiation: one offer, its answer, and the candidates of both. The records
call it ``exchange``."""

NONCE_BYTES = 32

REPLACED = 4001
"""The code with which a service hangs up on a peer that has connected to it once more."""

MAX_SIGNAL = 64 * 1024
"""Most bytes of one message."""

MAX_BODY = 32 * 1024
"""Most characters of a description."""

MAX_NAME = 128
"""Most characters of a peer id, most bytes of a signature: more than either has."""

_DESCRIPTION_DOMAIN = b"swarmcore webrtc description 1\0"
_REGISTRATION_DOMAIN = b"swarmcore webrtc registration 1\0"

SignalKind = Literal["offer", "restart", "answer", "candidate", "refusal"]

END_OF_CANDIDATES = "end-of-candidates"
"""The last line of a body of candidates."""


class Challenge(msgspec.Struct, frozen=True, tag="challenge"):
    """The service's first message: sign this."""

    nonce: bytes


class Register(msgspec.Struct, frozen=True, tag="register"):
    """The peer's: who it is."""

    peer: str
    signature: bytes


class Registered(msgspec.Struct, frozen=True, tag="registered"):
    """The service knows the peer and passes to it what others send."""


class Absent(msgspec.Struct, frozen=True, tag="absent"):
    """The receiver of an envelope is not here, or gets more than it can take."""

    receiver: str
    exchange: bytes
    reason: str


class Envelope(msgspec.Struct, frozen=True, tag="envelope"):
    """One signed piece of a negotiation between two peers."""

    sender: str
    receiver: str
    exchange: bytes
    kind: SignalKind
    body: str
    """SDP; ICE candidates in SDP's notation, a line each, with `END_OF_CANDIDATES` behind the last; or the
    reason of a refusal. A ``restart`` is an offer for the connection made in the same negotiation."""
    signature: bytes = b""

    def statement(self) -> bytes:
        """What is signed: each part behind its length, four bytes, the lowest first."""
        texts = (self.sender, self.receiver, self.kind, self.body)
        parts = (self.exchange, *(text.encode() for text in texts))
        return _DESCRIPTION_DOMAIN + b"".join(len(part).to_bytes(4, "little") + part for part in parts)

    @property
    def is_possible(self) -> bool:
        """Whether its parts are no longer than those of an honest one."""
        return (
            len(self.exchange) == NEGOTIATION_ID_BYTES
            and len(self.body) <= MAX_BODY
            and max(len(self.sender), len(self.receiver), len(self.signature)) <= MAX_NAME
        )

    @property
    def nbytes(self) -> int:
        """Most memory that it takes: a single character beyond the usual ones makes all take four bytes."""
        return 4 * len(self.body) + 1024

    def check(self, receiver: PeerId) -> None:
        """Raise `ProtocolError` when it cannot be, `PeerIdentityError` when its sender did not sign it so."""
        if not self.is_possible:
            raise ProtocolError("an envelope of an impossible shape came by signalling")
        if self.receiver != receiver:
            raise PeerIdentityError(f"an envelope for {short(self.receiver)} was delivered here")
        if not verify(self.sender, self.statement(), self.signature):
            raise PeerIdentityError(
                f"{short(self.sender)} did not sign what came in its name: the signalling service, or "
                f"someone before it, has changed it"
            )


Signal = Challenge | Register | Registered | Absent | Envelope

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[Signal] = msgspec.json.Decoder(Signal)


def encode(signal: Signal) -> str:
    return _encoder.encode(signal).decode()


def decode(text: str | bytes) -> Signal:
    """Raise `ProtocolError` when ``text`` is too long or no signal."""
    if len(text) > MAX_SIGNAL:
        raise ProtocolError(f"a signalling message of length {len(text)}, above {MAX_SIGNAL}")
    try:
        return _decoder.decode(text)
    except (msgspec.MsgspecError, UnicodeError) as exc:
        raise ProtocolError(f"what came by signalling is no message of ours: {exc}") from exc


def decode_forwarded(text: str | bytes) -> Envelope | Absent:
    """What somebody forwards, or the news that it could not. Raise `ProtocolError` for all else."""
    signal = decode(text)
    if not isinstance(signal, Envelope | Absent):
        raise ProtocolError(f"a {type(signal).__name__} out of turn")
    return signal


def signed_envelope(
    identity: Identity, receiver: PeerId, exchange: bytes, kind: SignalKind, body: str
) -> Envelope:
    """An envelope signed by ``identity``."""
    plain = Envelope(identity.peer, receiver, exchange, kind, body)
    return msgspec.structs.replace(plain, signature=identity.sign(plain.statement()))


def registration(identity: Identity, challenge: Challenge) -> Register:
    """The answer to a service's challenge."""
    return Register(identity.peer, identity.sign(_REGISTRATION_DOMAIN + challenge.nonce))


def registered_peer(register: Register, nonce: bytes) -> PeerId:
    """Who registers. Raise `PeerIdentityError` unless it signed ``nonce``."""
    if not verify(register.peer, _REGISTRATION_DOMAIN + nonce, register.signature):
        raise PeerIdentityError("the peer did not prove who it is")
    return PeerId(register.peer)
