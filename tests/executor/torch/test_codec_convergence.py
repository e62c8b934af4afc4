"""Training over a slow link ends as it does over a fast one: a frozen block is at its other end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from swarmcore.executor.torch import codecs as _codecs  # noqa: F401  (registers the int8 codec)
from swarmcore.executor.torch import sparse_codecs as _sparse  # noqa: F401  (registers topk and mixed)
from swarmcore.executor.torch.device import DTYPE_NAMES
from swarmcore.executor.torch.wire_tensors import to_torch, to_wire
from swarmcore.routing.link_codec import LinkCodec, LinkDirection, Rung, TensorKind
from swarmcore.types import PeerId

WIDTH, TOKENS, SYMBOLS = 64, 12, 16
COMPUTING = 0.05
SERVER = PeerId("server")


class Link:
    """Encodes what goes over it, and tells `LinkCodec` of the times that a real one would take."""

    def __init__(self, rate: float) -> None:
        self.codecs = LinkCodec()
        self.used: list[str] = []
        self._rate, self._now = rate, 0.0

    def carry(self, way: LinkDirection, kind: TensorKind, values: torch.Tensor) -> torch.Tensor:
        rows = values.reshape(-1, WIDTH)
        dtype = DTYPE_NAMES[rows.dtype]
        codec = self.codecs.codec(SERVER, way, kind, dtype, tuple(rows.shape), self._now)
        wire = to_wire("hidden", rows, codec)
        seconds = 0.02 + wire.data.nbytes / self._rate
        self._now += seconds
        self.codecs.transferred(SERVER, way, wire.data.nbytes, seconds, self._now)
        self.codecs.computed(SERVER, kind, tuple(rows.shape), COMPUTING, self._now)
        self.used.append(codec)
        return to_torch(wire).view(values.shape)


class Crossing(torch.autograd.Function):
    """To the server and back: activations one way, their gradients the other."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, link: Link, way: LinkDirection) -> torch.Tensor:
        ctx.link, ctx.way = link, "down" if way == "up" else "up"
        return link.carry(way, "activations", values)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.link.carry(ctx.way, "gradients", gradients[0]), None, None


def chain_of_symbols(sequences: int, data: torch.Generator) -> torch.Tensor:
    """Sequences in which each symbol depends on the one before, by a table that training has to find."""
    table = torch.randn(SYMBOLS, SYMBOLS, generator=torch.Generator().manual_seed(9)).mul(2).softmax(1)
    symbols = torch.randint(SYMBOLS, (sequences, 1), generator=data)
    for _ in range(TOKENS):
        following = torch.multinomial(table[symbols[:, -1]], 1, generator=data)
        symbols = torch.cat([symbols, following], 1)
    return symbols


def train(link: Link | None, steps: int = 45) -> float:
    """Learn which symbol follows; the block at the other end of the link is frozen.

    Returns the loss on held-out sequences, without the link.
    """
    torch.manual_seed(0)
    shape = {"d_model": WIDTH, "nhead": 4, "dim_feedforward": 128, "dropout": 0.0, "batch_first": True}
    remote = nn.TransformerEncoderLayer(**shape).requires_grad_(False)
    embed, head = nn.Embedding(SYMBOLS, WIDTH), nn.Linear(WIDTH, SYMBOLS)
    optimizer = torch.optim.Adam([*embed.parameters(), *head.parameters()], lr=1e-2)
    data = torch.Generator().manual_seed(1)
    mask = nn.Transformer.generate_square_subsequent_mask(TOKENS)

    def loss_of(link: Link | None, sequences: int) -> torch.Tensor:
        symbols = chain_of_symbols(sequences, data)
        hidden = embed(symbols[:, :-1])
        hidden = hidden if link is None else Crossing.apply(hidden, link, "up")
        hidden = remote(hidden, src_mask=mask, is_causal=True)
        hidden = hidden if link is None else Crossing.apply(hidden, link, "down")
        return nn.functional.cross_entropy(head(hidden).flatten(0, 1), symbols[:, 1:].flatten())

    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(link, 32).backward()
        optimizer.step()
    with torch.no_grad():
        data.manual_seed(2)
        return loss_of(None, 256).item()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def lossless() -> float:
    return train(None)


def test_a_fast_link_changes_nothing(lossless: float) -> None:
    link = Link(1e9)
    assert train(link) == lossless
    assert set(link.used) == {"raw"}


@pytest.mark.parametrize(
    ("rate", "codecs", "worse"),
    [(6e5, {"int8"}, 0.003), (4e5, {"mixed4"}, 0.01), (1e3, {"mixed2", "mixed1"}, 0.03)],
)
def test_a_slow_link_costs_little_of_the_loss(
    lossless: float, rate: float, codecs: set[str], worse: float
) -> None:
    link = Link(rate)
    assert train(link) == pytest.approx(lossless, rel=worse)
    assert set(link.used[-20:]) <= codecs | {"mixed3"} and codecs & set(link.used[-4:])


def test_keeping_only_the_largest_entries_costs_far_more(lossless: float) -> None:
    """At fewer entries, but as many bits: why the ladders do not use it."""
    link = Link(1e3)
    ladder = (Rung("topk0.1", 1.7),)
    link.codecs = LinkCodec(ladders={"activations": ladder, "gradients": ladder})
    assert train(link) > 1.1 * lossless
