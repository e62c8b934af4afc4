"""Options of generation servers, which make texts for clients that have no part of the model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

_LIMITS = (
    click.option(
        "--head-at-once",
        "at_once",
        type=click.IntRange(min=1),
        default=8,
        show_default=True,
        metavar="N",
        help="Texts that are made for others at the same time.",
    ),
    click.option(
        "--head-waiting",
        "waiting",
        type=click.IntRange(min=1),
        default=64,
        show_default=True,
        metavar="N",
        help="Texts that may wait for their turn.",
    ),
    click.option(
        "--head-prompt-tokens",
        "prompt_tokens",
        type=click.IntRange(min=1),
        default=4096,
        show_default=True,
        metavar="N",
        help="Longest prompt of a text that is made for others.",
    ),
    click.option(
        "--head-new-tokens",
        "new_tokens",
        type=click.IntRange(min=1),
        default=1024,
        show_default=True,
        metavar="N",
        help="Longest text that is made for others.",
    ),
)
_NAMES = ("at_once", "waiting", "prompt_tokens", "new_tokens")


def head_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command ``--serve-head`` and its limits; it gets `GenerationLimits` as ``head``, or None."""

    @click.option(
        "--serve-head",
        is_flag=True,
        help="Also make texts for clients that have no part of the model and no torch; this peer then sees "
        "what they ask.",
    )
    @functools.wraps(command)
    def wrapped(serve_head: bool, **options: Any) -> Any:
        from swarmcore.head.queue import GenerationLimits

        values = {name: options.pop(name) for name in _NAMES}
        return command(head=GenerationLimits(**values) if serve_head else None, **options)

    for option in reversed(_LIMITS):
        wrapped = option(wrapped)
    return wrapped
