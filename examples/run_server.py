"""Serve some blocks of a model: ``python examples/run_server.py --model … --transport tcp --blocks 0:10``.

The same as ``swarmcore serve``, with the same options (``--help`` lists them), as a program to start one's own from.
"""

from swarmcore.cli.serve import serve

if __name__ == "__main__":
    serve()
