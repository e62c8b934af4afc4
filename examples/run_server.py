"""Serve some blocks of a model: ``python examples/run_server.py --model … --transport tcp``.

It is ``swarmcore serve``, with all its options (``--help`` lists them), to start a program of one's own from.
It takes the blocks that the swarm needs most; ``--blocks 0:10`` says which.
"""

from swarmcore.cli.serve import serve

if __name__ == "__main__":
    serve()
