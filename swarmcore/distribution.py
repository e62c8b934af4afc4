"""What this package is called on an index, where ``swarmcore``, its name in imports, is somebody else's."""

from __future__ import annotations

from importlib import metadata

NAME = "swarmcore-llm"
"""Of the distribution, as in pyproject.toml."""


def version() -> str:
    """The version that is installed."""
    return metadata.version(NAME)


def install_command(extra: str) -> str:
    """What brings the libraries of ``extra``."""
    return f"pip install '{NAME}[{extra}]'"
