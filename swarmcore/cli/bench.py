"""``swarmcore bench``: measure this machine."""

from __future__ import annotations

import click


@click.group()
def bench() -> None:
    """Measure what transports and models do on this machine."""
