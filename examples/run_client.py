"""Talk with a model: ``python examples/run_client.py --model … --bootstrap …``. It is ``swarmcore chat``."""

from swarmcore.cli.chat import chat

if __name__ == "__main__":
    chat()
