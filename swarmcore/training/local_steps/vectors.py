"""Parameters as one vector, and vectors in pieces: encoded, sent, received and checked.

What a lossy encoding dropped is sent with the next vector of the same name (`ErrorFeedback`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

import attrs
import torch
from torch import nn

import swarmcore.executor.torch.codecs
import swarmcore.executor.torch.sparse_codecs  # noqa: F401  (both are registered)
from swarmcore.errors import DeltaError, InputError, ProtocolError, UnknownCodecError
from swarmcore.executor.torch.wire_tensors import to_torch, to_wire
from swarmcore.rpc.channel import Channel
from swarmcore.tasks import deadline_after
from swarmcore.wire.framing import Message
from swarmcore.wire.local_steps import PIECE_VALUES, Piece
from swarmcore.wire.tensors import ITEM_BYTES, Tensor


class ErrorFeedback:
    """What is still to be sent of each tensor, by name, in float32 on the CPU.

    Holds as much memory as the tensors encoded through it take in float32; `forget` frees. Keep one object
    for each receiver, or for all that get the same bytes.
    """

    def __init__(self) -> None:
        self._left: dict[str, torch.Tensor] = {}

    def __repr__(self) -> str:
        return f"<ErrorFeedback of {len(self._left)} tensors>"

    def __getitem__(self, name: str) -> torch.Tensor:
        """What is still to be sent. Raise `KeyError` for a name never encoded."""
        return self._left[name]

    def encode(self, name: str, values: torch.Tensor, codec: str) -> Tensor:
        """``values`` with what was left of those before, in ``codec``; what that drops is left for the next.

        What was left is dropped when the shape is another than before, and nothing is left of values that are
        not finite. Raise what `Tensor.encode` raises; nothing changes then.
        """
        whole = values.detach().float().cpu()
        left = self._left.get(name)
        if left is not None and left.shape == whole.shape:
            whole = whole + left
        wire = to_wire(name, whole.to(values.dtype), codec)
        missing = whole - to_torch(wire).float()
        self._left[name] = missing if bool(missing.isfinite().all()) else torch.zeros_like(whole)
        return wire

    def returned(self, tensor: Tensor) -> None:
        """``tensor``, from `encode`, did not arrive: all of it is still to be sent."""
        left = self._left.get(tensor.name)
        values = to_torch(tensor).float()
        if left is not None and left.shape == values.shape and bool(values.isfinite().all()):
            self._left[tensor.name] = left + values

    def forget(self, name: str | None = None) -> None:
        """Drop what is left of one tensor, or of all. Harmless when there is nothing."""
        if name is None:
            self._left.clear()
        else:
            self._left.pop(name, None)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """For a checkpoint; shares no memory that changes later."""
        return dict(self._left)

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on where `state_dict` was taken."""
        self._left = {name: values.float().cpu() for name, values in state.items()}


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


Trained = nn.Module | Iterable[nn.Parameter] | Iterable[tuple[str, nn.Parameter]]
"""A module, all of whose parameters with ``requires_grad`` are meant; or parameters, perhaps with names."""


class ParameterVector:
    """Reads and writes some parameters as one float32 vector on the CPU."""

    def __init__(self, trained: Trained) -> None:
        """Raise `InputError` when there are none, or one is no float parameter."""
        if isinstance(trained, nn.Module):
            trained = [(name, p) for name, p in trained.named_parameters() if p.requires_grad]
        named = [
            item if isinstance(item, tuple) else (str(index), item) for index, item in enumerate(trained)
        ]
        if not named:
            raise InputError("there are no trainable parameters: nothing has requires_grad")
        for name, parameter in named:
            if not isinstance(parameter, torch.Tensor) or not parameter.is_floating_point():
                raise InputError(f"parameter {name} is no tensor of floats, and cannot be trained")
        self._parameters = [parameter for _, parameter in named]
        self.count = sum(parameter.numel() for parameter in self._parameters)
        """Values of all parameters together."""
        if not self.count:
            raise InputError("the parameters to train are empty")
        shapes = "\n".join(f"{name} {list(parameter.shape)}" for name, parameter in named)
        self.layout = hashlib.sha256(shapes.encode()).hexdigest()

    def read(self) -> torch.Tensor:
        """A copy of all values."""
        return torch.cat([p.detach().float().cpu().reshape(-1) for p in self._parameters])

    def write(self, values: torch.Tensor) -> None:
        """Set all values, each rounded to its parameter's dtype."""
        with torch.no_grad():
            sizes = [parameter.numel() for parameter in self._parameters]
            for parameter, part in zip(self._parameters, torch.split(values, sizes), strict=True):
                parameter.copy_(part.view(parameter.shape))
