"""swarmcore inside another asyncio program: a TCP service that continues each line it is sent.

python examples/embed.py ADDRESS MODEL        then, elsewhere:  nc 127.0.0.1 7000

A server that fails costs a moment; the program is told, and goes on.
"""

import argparse
import asyncio
import sys

import swarmcore


def report(failover: swarmcore.Failover) -> None:
    print(failover, file=sys.stderr, flush=True)


async def main(address: str, name: str, port: int) -> None:
    async with swarmcore.connect(address) as swarm:
        options = swarmcore.SessionOptions(patience=20.0, on_failover=report)
        model = await swarm.load_model(name, session_options=options)

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            async for line in reader:  # every connection has its own sessions; the servers batch them
                try:
                    async for piece in model.generate(line.decode().strip(), max_new_tokens=32):
                        writer.write(piece.encode())
                        await writer.drain()
                except swarmcore.SwarmError as error:
                    writer.write(f"[{error}]".encode())
                writer.write(b"\n")
            writer.close()

        service = await asyncio.start_server(answer, "127.0.0.1", port)
        print("listening on {}:{}".format(*service.sockets[0].getsockname()), flush=True)
        await service.serve_forever()


parser = argparse.ArgumentParser()
parser.add_argument("address", help="of any peer of the swarm")
parser.add_argument("model", help="folder, GGUF file, pypi:NAME or hub id")
parser.add_argument("port", nargs="?", type=int, default=7000, help="0 is any free one")
chosen = parser.parse_args()
try:
    asyncio.run(main(chosen.address, chosen.model, chosen.port))
except swarmcore.SwarmError as error:
    sys.exit(f"error: {error}")
except OSError as error:
    sys.exit(f"cannot listen on port {chosen.port}: {error.strerror}")
