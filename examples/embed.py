"""swarmcore inside another asyncio program: a TCP service that continues each line it is sent.

python examples/embed.py ADDRESS MODEL        then, elsewhere:  nc 127.0.0.1 7000

A server that fails costs a moment; the program is told, and goes on.
"""

import asyncio
import sys

import swarmcore


def report(failover: swarmcore.Failover) -> None:
    print(failover, file=sys.stderr, flush=True)


async def main(address: str, name: str, port: str = "7000") -> None:
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

        service = await asyncio.start_server(answer, "127.0.0.1", int(port))
        print("listening on {}:{}".format(*service.sockets[0].getsockname()), flush=True)
        await service.serve_forever()


asyncio.run(main(*sys.argv[1:]))
