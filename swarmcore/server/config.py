"""What a block server is asked to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import attrs

from swarmcore.errors import InputError
from swarmcore.executor.loader import AUTO, BlockLoader
from swarmcore.types import Span

REBALANCE = 60.0
"""Seconds between two looks at the balance of the swarm."""

ACTIVATION_BUDGET = 256 * 2**20
"""Bytes for activations where the free memory is not known."""

MAX_ADAPTER_NAME = 64
"""Characters of an adapter's name: all of them are announced."""


def _positive(instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    if value is not None and value <= 0:
        raise InputError(f"{attribute.name.replace('_', '-')} must be above 0, got {value}")


def _not_negative(instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    if value is not None and value < 0:
        raise InputError(f"{attribute.name.replace('_', '-')} must not be below 0, got {value}")


def _throughput(instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    if value not in ("auto", "measure"):
        _positive(instance, attribute, value)


def _quality(instance: object, attribute: attrs.Attribute[Any], value: float) -> None:
    if not 0 <= value <= 1:
        raise InputError(f"balance-quality must be from 0 to 1, got {value}")


def _adapter_names(instance: object, attribute: attrs.Attribute[Any], value: Mapping[str, str]) -> None:
    for name, path in value.items():
        if not name.strip() or len(name) > MAX_ADAPTER_NAME or not name.isprintable() or not path:
            raise InputError(
                f"adapter {name[:MAX_ADAPTER_NAME]!r} needs a folder and a name of 1 to {MAX_ADAPTER_NAME} "
                f"printable characters"
            )


@attrs.frozen(kw_only=True)
class ServerConfig:
    """Settings of one block server. Raise `InputError` for values that cannot work."""

    model: str
    """A folder, a GGUF file, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    span: Span | None = None
    """Blocks to hold; None for those that the swarm serves worst."""
    num_blocks: int | None = attrs.field(default=None, validator=_positive)
    """How many blocks to hold; None for as many as fit. ``span`` goes before it."""
    executor: str | type[BlockLoader] = AUTO
    """What computes the blocks: the name of a back end that is installed, or one itself; ``"auto"`` is
    `choose_executor`'s choice."""
    dtype: str = AUTO
    weights: str = AUTO
    """What the blocks' weights are kept in; ``"auto"``, or another that the executor has."""
    cache_dtype: str = AUTO
    """What keys and values are cached in; ``"auto"``, or another that the executor has."""
    device: str = "cpu"
    cache_tokens: int | None = attrs.field(default=None, validator=_positive)
    """Attention cache budget in tokens; None for a quarter of the memory that is free after loading."""
    memory: int | None = attrs.field(default=None, validator=_positive)
    """Bytes to take at most for weights, caches and activations; None for what is free, less a tenth."""
    throughput: float | Literal["auto", "measure"] = attrs.field(default="auto", validator=_throughput)
    """Tokens per second through the whole span; ``"auto"`` measures it once, ``"measure"`` anew."""
    max_batch_tokens: int = attrs.field(default=512, validator=_positive)
    """Most tokens in one pass through the blocks: larger is faster for prompts, slower for who decodes."""
    threads: int | None = attrs.field(default=None, validator=_positive)
    """Compute threads; None: as many as a short measurement finds fastest, at most torch's own choice."""
    idle_timeout: float = attrs.field(default=600.0, validator=_positive)
    """Seconds without a step after which a session is closed."""
    admission_timeout: float = attrs.field(default=30.0, validator=_positive)
    """Most seconds a new session waits for room in the cache."""
    announce_ttl: float = attrs.field(default=300.0, validator=_positive)
    """Seconds for which others believe an announcement that is not renewed. A dead server leaves their view
    within seconds all the same."""
    rebalance: float | None = attrs.field(default=None, validator=_not_negative)
    """Seconds between looks whether other blocks need this server more, on average; 0 for never. None for
    `REBALANCE`, or for never where ``span`` is given."""
    balance_quality: float = attrs.field(default=0.75, validator=_quality)
    """Share of what moves could give below which the swarm has to run for a move that costs as much as it
    gains. The less a move costs, the nearer to 1 it is taken; see `Rebalancer`."""
    drain: float = attrs.field(default=30.0, validator=_not_negative)
    """Most seconds that sessions get to leave before the server does, or before it drops their blocks."""
    adapters: Mapping[str, str] = attrs.field(factory=dict, validator=_adapter_names)
    """Folders of adapters in PEFT's format to serve to everyone, by the name that clients ask for."""
    adapter_budget: int = attrs.field(default=256 * 2**20, validator=_not_negative)
    """Bytes of adapters that clients bring and that are kept for them; 0 for taking none."""
    activation_budget: int | None = attrs.field(default=None, validator=_not_negative)
    """Bytes for activations of passes under way, and of forward passes that are kept for backward passes to
    come; 0 for keeping none, None for `ACTIVATION_BUDGET`, or a fifth of the memory that is free after
    loading where that is known. See `TrainingLimits.activation_budget`."""
    max_pass_tokens: int = attrs.field(default=8192, validator=_not_negative)
    """Most tokens of one batch that is run forward or back for a client; 0 when none is."""
    share_prefixes: bool = False
    """Whether sessions of one client begin with what was computed for another one under the same names: for
    swarms whose members trust each other."""
    public_name: str = ""

    @property
    def rebalance_interval(self) -> float:
        """`rebalance`, or its default."""
        if self.rebalance is not None:
            return self.rebalance
        return REBALANCE if self.span is None else 0.0
