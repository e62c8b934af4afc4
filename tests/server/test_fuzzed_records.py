"""Records with every field that a stranger may make up, against a real executor.

Each is answered by a specific error, and no stranger writes a traceback into the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
from pathlib import Path
from typing import Any

import attrs
import pytest
from tiny_models import save_random_model, tiny_config
from torch_server import torch_server

from swarmcore.errors import InternalError, RemoteFaultError, SwarmError, error_classes
from swarmcore.identity import Identity
from swarmcore.rpc.channel import Channel
from swarmcore.rpc.node import Node
from swarmcore.types import ModelInfo, PeerId
from swarmcore.wire.failure import Failure
from swarmcore.wire.forward_backward import AdapterName, AdapterPart, OpenBackward, OpenForward, Rows
from swarmcore.wire.messages import (
    AllowUpstream,
    CachePart,
    Hop,
    JoinSession,
    NamePages,
    OpenSession,
    Recall,
    Replay,
    Step,
    TransferKv,
)
from swarmcore.wire.method import Protocol
from swarmcore.wire.protocols import BACKWARD_PROTOCOL, FORWARD_PROTOCOL, INFERENCE_PROTOCOL
from swarmcore.wire.tensors import FLOATS, ITEM_BYTES, Tensor

CONVERSATIONS = 30
WIDTH = 64
TEXTS = (
    "",
    "raw",
    "all",
    "\x1b[2J",
    "0" * 32,
    "g" * 32,
    "x" * 70_000,
    "int8",
    "int8+zstd",
    "raw+zstd",
    "+zstd",
)
NUMBERS = (-(2**62), -1, 0, 1, 2, 3, 63, 64, 65, 300, 16_384, 2**31, 2**62)
REALS = (float("nan"), float("inf"), -float("inf"), -1.0, 0.0, 1e-9, 0.5, 1e300)


class Stranger:
    """Makes up what a peer of bad will might send, from one seed."""

    def __init__(self, seed: int, model: ModelInfo, peer: PeerId, addresses: tuple[str, ...]) -> None:
        self.random = random.Random(seed)
        self.model, self.peer, self.addresses = model, peer, addresses

    def number(self) -> int:
        return self.random.choice(NUMBERS)

    def numbers(self) -> tuple[int, ...]:
        return tuple(self.number() for _ in range(self.random.choice((0, 1, 1, 1, 2, 3, 2000))))

    def hop(self) -> Hop:
        places = self.random.choice(((), self.addresses, ("nonsense",), ("tcp://256.1.1.1:99999/x", "")))
        peer = self.random.choice((self.peer, PeerId("nobody")))
        return Hop(peer, places, self.text(), self.number(), self.number())

    def text(self) -> str:
        return self.random.choice(TEXTS)

    def adapter(self) -> AdapterName | None:
        return self.random.choice(
            (None, AdapterName(self.text(), self.text()), AdapterName(version="1" * 32))
        )

    def tensor(self) -> Tensor:
        rng = self.random
        names = ("hidden", "x", "0.self_attn.q_proj.lora_A", "0.self_attn.q_proj.lora_B", "1.prefix")
        dtype = rng.choice(FLOATS) if rng.random() < 0.8 else rng.choice(tuple(ITEM_BYTES))
        shape = rng.choice(
            ((1, WIDTH), (2, WIDTH), (3, WIDTH), (0, WIDTH), (WIDTH,), (1, 1), (), (2, 1, 2, 16), (2, 2**20))
        )
        codec = rng.choice(("raw", "raw", "raw", "raw+zstd", "int8", "int8+zstd", "topk", "lzma", "x" * 128))
        tensor = Tensor(rng.choice(names), dtype, shape, memoryview(b""))
        size = min(tensor.decoded_nbytes, 2**16) if codec != "raw" else tensor.decoded_nbytes
        data = bytes(size) if rng.random() < 0.5 else rng.randbytes(size)
        if codec.endswith("+zstd") and rng.random() < 0.5:
            with contextlib.suppress(Exception):
                return attrs.evolve(tensor, data=memoryview(data)).encode(codec)
        return attrs.evolve(tensor, data=memoryview(data), codec=codec)

    def changed(self, record: Any) -> Any:
        """The record with some of its fields made up."""
        made_up: dict[str, Any] = {}
        for field in attrs.fields(type(record)):
            if self.random.random() < 0.75:
                continue
            name, value = field.name, getattr(record, field.name)
            if name in ("hop", "next_hop"):
                made_up[name] = self.hop()
            elif name == "chain":
                made_up[name] = tuple(self.hop() for _ in range(self.random.choice((0, 1, 2, 50))))
            elif name == "adapter":
                made_up[name] = self.adapter()
            elif name == "names":
                several = (b"x" * 16,), (b"y" * 32, b"z" * 16), (b"x" * 15,), (b"x" * 16 * 5000,), (b"",)
                made_up[name] = self.random.choice(((), *several))
            elif name == "pushers":
                made_up[name] = self.random.choice((None, (), (self.peer,), tuple([self.peer] * 5000)))
            elif isinstance(value, bool):
                made_up[name] = not value
            elif isinstance(value, float):
                made_up[name] = self.random.choice(REALS)
            elif isinstance(value, int):
                made_up[name] = self.number()
            elif isinstance(value, tuple):
                made_up[name] = self.numbers()
            elif isinstance(value, str):
                made_up[name] = self.text()
        if isinstance(record, AllowUpstream) and made_up.get("pushers", ()) is None:
            made_up = {}
        return attrs.evolve(record, **made_up)

    def opening(self) -> tuple[Protocol, Any]:
        blocks = self.random.choice(((0, 5), (0, 2), (1, 3)))
        session, name = secrets.token_hex(16), "2" * 32
        common = (self.model.fingerprint, *blocks, self.random.choice(((1,), (2, 1), (3,))))
        fingerprint = self.model.fingerprint
        choice: tuple[Protocol, Any] = self.random.choice(
            (
                (INFERENCE_PROTOCOL, OpenSession(session, fingerprint, *blocks, 1, 0, None, self.adapter())),
                (INFERENCE_PROTOCOL, OpenSession(session, fingerprint, *blocks, 2)),
                (INFERENCE_PROTOCOL, JoinSession(session)),
                (FORWARD_PROTOCOL, OpenForward(*common, adapter=self.adapter(), keep=name)),
                (BACKWARD_PROTOCOL, OpenBackward(*common, adapter=self.adapter(), kept=name, weights=True)),
            )
        )
        return choice[0], self.changed(choice[1]) if self.random.random() < 0.4 else choice[1]

    def message(self, protocol: Protocol, step: int) -> tuple[Any, tuple[Tensor, ...]]:
        if protocol is INFERENCE_PROTOCOL:
            sequences = self.random.choice((1, 1, 2))
            records = (
                Step(step, (0,) * sequences, (1,) * sequences, deadline=5.0),
                Step(step, (step,), (1,), journal="servers", reply="last", deadline=5.0),
                Replay(step, (0,), (1,), (self.hop(),)),
                TransferKv(self.hop()),
                AllowUpstream(()),
                NamePages((b"x" * 32,) * sequences),
                Recall(step - self.random.randrange(3), step + self.random.randrange(3)),
                CachePart(0, 0, 1, self.random.random() < 0.5),
                AdapterPart(last=True),
            )
        else:
            records = (
                Rows("inputs", 0),
                Rows("gradients", 0),
                Rows("inputs", 1),
                AdapterPart(last=True),
                AdapterPart(float("nan"), last=True),
            )
        record = self.random.choice(records)
        tensors = tuple(self.tensor() for _ in range(self.random.choice((0, 1, 1, 1, 2, 5))))
        if tensors and isinstance(record, Step | Rows):
            tensors = (attrs.evolve(tensors[0], name="hidden"), *tensors[1:])
        return self.changed(record) if self.random.random() < 0.6 else record, tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzzed")
    save_random_model(tiny_config("llama"), path)
    return path


@pytest.mark.parametrize("seed", range(2))
async def test_nothing_that_is_sent_is_a_surprise(
    folder: Path, caplog: pytest.LogCaptureFixture, seed: int
) -> None:
    async with torch_server(folder) as (node, network, model):
        identity = Identity.from_seed(b"c" * 32)
        stranger = Stranger(seed, model, node.peer, tuple(map(str, node.addresses)))
        async with Node(identity, [network.transport(identity, listen=False)]) as client:
            for _ in range(CONVERSATIONS):
                protocol, opening = stranger.opening()
                said: list[str] = [repr(opening)[:300]]
                try:
                    channel = await client.open(node.addresses, protocol, opening)
                    await _converse(channel, stranger, protocol, said)
                except SwarmError as exc:
                    _check(exc, said)
                surprises = [record for record in caplog.records if record.exc_info]
                assert not surprises, (said, surprises[0].getMessage(), surprises[0].exc_text)


async def _converse(channel: Channel, stranger: Stranger, protocol: Protocol, said: list[str]) -> None:
    listening = asyncio.create_task(_listen(channel, said))
    try:
        for step in range(stranger.random.choice((1, 3, 6))):
            record, tensors = stranger.message(protocol, step)
            said.append(f"{record!r:.300} {tensors!r:.300}")
            async with asyncio.timeout(20):
                await channel.send(record, *tensors)
            await asyncio.wait([listening], timeout=0.02)
        await asyncio.wait([listening], timeout=0.05)
    finally:
        channel.abort("enough")
        await asyncio.wait([listening])
        listening.result()


async def _listen(channel: Channel, said: list[str]) -> None:
    try:
        while True:
            record = (await channel.receive()).record
            if isinstance(failure := getattr(record, "failure", None), Failure):
                _check(error_classes()[failure.error](failure.message), said)
    except SwarmError as exc:
        if exc is channel.remote_end:
            _check(exc, said)


def _check(error: SwarmError, said: list[str]) -> None:
    assert not isinstance(error, RemoteFaultError | InternalError), (said, error)
