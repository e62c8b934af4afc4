"""A client in a home of the lab: ``python lab_generate.py MODEL TOKENS PROMPT BOOTSTRAP OPTIONS``.

OPTIONS are those of the transports, in JSON. A line of JSON for each piece of text, and for how the server is
reached, asked anew before each token.
"""

from __future__ import annotations

import asyncio
import json
import sys

import swarmcore


def say(**values: object) -> None:
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


async def main(folder: str, tokens: str, prompt: str, bootstrap: str, options: str) -> None:
    async with swarmcore.connect(bootstrap, transport_options=json.loads(options)) as swarm:
        model = await swarm.load_model(folder, dtype="float32", threads=1)
        await swarm.wait_for_blocks(model.info, timeout=60)
        async with model.session() as session:
            async for piece in model.generate(
                prompt, session=session, max_new_tokens=int(tokens), speculation="off"
            ):
                [server] = session.chain.peers
                await swarm.info(server)
                say(piece=piece, path=swarm.paths[server])
        say(done=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
