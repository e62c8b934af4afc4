"""What a block server is asked to do."""

from __future__ import annotations

from typing import Any

import attrs

from swarmcore.errors import InputError
from swarmcore.types import Span


def _positive(instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    if value is not None and value <= 0:
        raise InputError(f"{attribute.name.replace('_', '-')} must be above 0, got {value}")


@attrs.frozen(kw_only=True)
class ServerConfig:
    """Settings of one block server. Raise `InputError` for values that cannot work."""

    model: str
    """A folder, a GGUF file, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    span: Span | None = None
    """Blocks to hold; None for all of the model."""
    dtype: str = "auto"
    device: str = "cpu"
    cache_tokens: int | None = attrs.field(default=None, validator=_positive)
    """Attention cache budget in tokens; None for a quarter of the memory that is free after loading."""
    max_batch_tokens: int = attrs.field(default=512, validator=_positive)
    """Most tokens in one pass through the blocks: larger is faster for prompts, slower for who decodes."""
    threads: int | None = attrs.field(default=None, validator=_positive)
    """Compute threads; None for torch's own choice."""
    idle_timeout: float = attrs.field(default=600.0, validator=_positive)
    """Seconds without a step after which a session is closed."""
    admission_timeout: float = attrs.field(default=30.0, validator=_positive)
    """Most seconds a new session waits for room in the cache."""
    announce_ttl: float = attrs.field(default=300.0, validator=_positive)
    """Seconds for which others believe an announcement that is not renewed. A dead server leaves their view
    within seconds all the same."""
    public_name: str = ""
