"""Serve some blocks of a model: ``python examples/run_server.py --model … --transport tcp --blocks 0:10``.

It is ``swarmcore serve``, with all its options (``--help`` lists them), to start a program of one's own from.
"""

from swarmcore.cli.serve import serve

if __name__ == "__main__":
    serve()
