"""Talk with a model: ``python examples/run_client.py --model … --bootstrap ADDRESS``; the same as ``swarmcore chat``."""

from swarmcore.cli.chat import chat

if __name__ == "__main__":
    chat()
