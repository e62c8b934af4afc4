"""``swarmcore convert``: prepare a checkpoint ahead of time."""

from __future__ import annotations

import asyncio
from pathlib import Path

import click

from swarmcore.cli import interrupt
from swarmcore.cli.command import standard
from swarmcore.cli.output import Output
from swarmcore.imports import import_large


@click.command()
@click.argument("model")
@click.argument("target", required=False, type=click.Path(path_type=Path))
@click.option("--revision", metavar="NAME", help="Branch, tag or commit of a hub model.")
@click.option(
    "--cache-dir",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Where converted models are kept. [default: $SWARMCORE_CACHE or ~/.cache/swarmcore]",
)
@standard
def convert(
    output: Output, model: str, target: Path | None, revision: str | None, cache_dir: Path | None
) -> None:
    """Make MODEL ready to serve and print the folder it is in.

    A GGUF file is converted once, into the cache or the new folder TARGET; of a folder or a hub id the config
    and the index are checked. Servers and clients do the same on first use; this does it before they start.
    """
    interrupt.run(_convert(output, model, target, revision, cache_dir))


async def _convert(
    output: Output, model: str, target: Path | None, revision: str | None, cache_dir: Path | None
) -> None:
    with output.progress() as progress:
        import_large("swarmcore.checkpoint", progress=progress)
        from swarmcore import checkpoint as checkpoints

        if target is not None:
            model = str(
                await asyncio.to_thread(checkpoints.convert, model, target, progress, cache_dir=cache_dir)
            )
        checkpoint = await asyncio.to_thread(
            checkpoints.open_checkpoint, model, revision=revision, cache_dir=cache_dir, progress=progress
        )
    info = checkpoint.info
    output.event(
        "converted",
        model=info.name,
        folder=str(checkpoint.folder),
        blocks=info.blocks,
        hidden_size=info.hidden_size,
        fingerprint=info.fingerprint,
    )
    output.remark(f"{info.name}: {info.blocks} blocks of width {info.hidden_size}, {info.fingerprint[:12]}")
    output.result(str(checkpoint.folder))
