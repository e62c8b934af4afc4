"""Vectors of parameters in pieces: encoded, sent, received and checked."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch

import swarmcore.executor.torch.codecs
import swarmcore.executor.torch.sparse_codecs  # noqa: F401  (both are registered)
from swarmcore.errors import DeltaError, InputError, ProtocolError, UnknownCodecError
from swarmcore.executor.torch.error_feedback import ErrorFeedback
from swarmcore.executor.torch.wire_tensors import to_torch, to_wire
from swarmcore.rpc.channel import Channel
from swarmcore.tasks import deadline_after
from swarmcore.wire.framing import Message
from swarmcore.wire.local_steps import PIECE_VALUES, Piece
from swarmcore.wire.tensors import ITEM_BYTES, Tensor

MESSAGE_TIMEOUT = 20.0
"""Seconds without a message after which the other side is given up."""

NAME = "values"


@attrs.define
class Traffic:
    """Bytes of encoded pieces so far."""

    sent: int = 0
    received: int = 0


def check_codec(codec: str) -> None:
    """Raise `InputError` unless parameters can be encoded with it."""
    try:
        encode(torch.zeros(1), codec)
    except UnknownCodecError as exc:
        raise InputError(f"{exc.message}; for deltas take raw, int8, topk0.05 or the like") from exc


def result_codec(codec: str) -> str:
    """How the mean of deltas is encoded that come in ``codec``.

    The entries that different peers have kept are different ones, and nobody sends later what an encoding of
    the mean drops: the mean of sparse deltas goes as int8.
    """
    return codec if codec.startswith(("raw", "int8")) else "int8"


def encode(vector: torch.Tensor, codec: str, residuals: ErrorFeedback | None = None) -> list[Tensor]:
    """The pieces of a float32 vector; what a lossy ``codec`` drops is left in ``residuals``."""
    pieces = []
    for index, values in enumerate(torch.split(vector, PIECE_VALUES)):
        if residuals is not None and codec != "raw":
            wire = attrs.evolve(residuals.encode(str(index), values, codec), name=NAME)
        else:
            wire = to_wire(NAME, values, codec)
        pieces.append(wire)
    return pieces


def decode(pieces: Sequence[Tensor]) -> torch.Tensor:
    """The inverse of `encode`, a new tensor. Raise what `Tensor.decode` raises."""
    return torch.cat([to_torch(piece) for piece in pieces])


async def send(channel: Channel, pieces: Sequence[Tensor], traffic: Traffic) -> None:
    for index, piece in enumerate(pieces):
        async with deadline_after(MESSAGE_TIMEOUT, f"the other side read nothing in {MESSAGE_TIMEOUT:.0f} s"):
            await channel.send(Piece(index * PIECE_VALUES), piece)
        traffic.sent += piece.data.nbytes


async def receive(channel: Channel, values: int, traffic: Traffic) -> list[Tensor]:
    """The pieces of a vector of so many values, still encoded.

    Raise `DeltaError` for a piece that has no place in it; nothing has been allocated for it then.
    """
    pieces = []
    for first in range(0, values, PIECE_VALUES):
        message = await next_message(channel)
        if not isinstance(message.record, Piece):
            raise ProtocolError(f"{message.kind} came where piece {first} of a vector was expected")
        piece = message.tensor(NAME)
        shape = (min(PIECE_VALUES, values - first),)
        if message.record.first != first or piece.shape != shape or piece.dtype != "float32":
            raise DeltaError(
                f"a piece at {message.record.first} of {list(piece.shape)} {piece.dtype} came where "
                f"{list(shape)} float32 were expected at {first}"
            )
        if piece.data.nbytes > 2 * ITEM_BYTES["float32"] * shape[0] + 1024:
            raise DeltaError(f"a piece of {shape[0]} values takes {piece.data.nbytes} bytes")
        traffic.received += piece.data.nbytes
        pieces.append(piece)
    return pieces


async def next_message(channel: Channel) -> Message:
    """Raise `DeadlineExceededError` when none comes in `MESSAGE_TIMEOUT` seconds."""
    async with deadline_after(MESSAGE_TIMEOUT, f"nothing came in {MESSAGE_TIMEOUT:.0f} s"):
        return await channel.receive()
