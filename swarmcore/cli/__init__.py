"""The ``swarmcore`` command. Importing it loads neither torch nor any transport."""

from swarmcore.cli.app import main

__all__ = ["main"]
