"""How much a head peer does for others."""

from __future__ import annotations

from typing import Any

import attrs

from swarmcore.errors import InputError


def _above_zero(instance: object, attribute: attrs.Attribute[Any], value: float) -> None:
    if value <= 0:
        raise InputError(f"head-{attribute.name.replace('_', '-')} must be above 0, got {value}")


@attrs.frozen(kw_only=True)
class HeadLimits:
    """How much a head peer does for others. Raise `InputError` for values that cannot work."""

    at_once: int = attrs.field(default=8, validator=_above_zero)
    """Texts that are made at the same time."""
    waiting: int = attrs.field(default=64, validator=_above_zero)
    """Texts that may wait for their turn."""
    queue_timeout: float = attrs.field(default=30.0, validator=_above_zero)
    """Most seconds that one waits for it."""
    prompt_tokens: int = attrs.field(default=4096, validator=_above_zero)
    """Longest prompt."""
    new_tokens: int = attrs.field(default=1024, validator=_above_zero)
    """Longest answer."""
    reader_timeout: float = attrs.field(default=60.0, validator=_above_zero)
    """Seconds for which a client may take nothing of what it is sent."""
