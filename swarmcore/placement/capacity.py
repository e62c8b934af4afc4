"""How many blocks a machine has room for, and why."""

from __future__ import annotations

import attrs

from swarmcore.errors import InputError

SPARE = 0.1
"""Share of the free memory that is left to everything else on the machine."""

DEFAULT_CACHE_TOKENS = 8192
"""Attention cache that is planned for when the user does not say how much."""


@attrs.frozen(kw_only=True)
class BlockNeeds:
    """Memory that one block takes, in bytes; of blocks that differ, the largest."""

    weights: int
    cache_per_token: int
    """Attention cache of one token."""
    backward: int = 0
    """What a backward pass keeps of the largest batch."""
    reading: int = 0
    """The weights as the checkpoint has them, beside the others only while they are loaded."""

    once: int = 0
    """What is taken beside all blocks together, however many they are, as each is loaded in its turn."""

    def total(self, cache_tokens: int) -> int:
        """Most memory that the block takes at any one time, with so many tokens in its cache."""
        return self.weights + max(self.reading, self.backward + self.cache_per_token * cache_tokens)


@attrs.frozen
class CapacityPlan:
    """How many blocks to hold."""

    blocks: int
    reasons: tuple[str, ...]
    """Where the number comes from, a line each, for people."""
    usable: int = 0
    """Bytes that the server may take in all."""
    weights: int = 0
    """Bytes of them that the weights of a block take."""

    def room(self, blocks: int) -> int:
        """Bytes for caches and activations beside so many blocks."""
        return max(self.usable - blocks * self.weights, 0)


def plan_capacity(
    needs: BlockNeeds,
    *,
    memory_free: int,
    most: int | None = None,
    blocks: int,
    cache_tokens: int | None = None,
    wanted: int | None = None,
) -> CapacityPlan:
    """As many of the model's ``blocks`` as fit into ``memory_free`` bytes, or the number ``wanted``.

    ``most`` bytes are taken at most, where it is given.

    A number that does not seem to fit is taken all the same, with a warning among the reasons: estimates err,
    and the user has been asked. Raise `InputError` when no number is given and not one block fits.
    """
    tokens = cache_tokens or DEFAULT_CACHE_TOKENS
    each = needs.total(tokens)
    memory = min(int(memory_free * (1 - SPARE)), memory_free if most is None else most)
    usable = max(memory - needs.once, 0)
    fit = usable // each
    reasons = [
        f"memory: {size(memory_free)} free, of which {100 * SPARE:.0f} % are left to others"
        + (f", and {size(most)} may be taken" if most is not None else ""),
        f"a block: {size(needs.weights)} of weights, {size(needs.cache_per_token * tokens)} of cache for "
        f"{tokens:,} tokens, {size(needs.backward)} for backward passes; "
        f"{size(needs.reading + needs.once)} more while it is loaded",
    ]
    if wanted is not None:
        chosen = min(wanted, blocks)
        more = "" if chosen == wanted else f"; {wanted} were asked for, and the model has no more"
        reasons.append(f"{chosen} of {blocks} blocks{more or ', as asked for'}")
        if chosen > fit:
            reasons.append(f"warning: only {fit} seem to fit; expect the machine to run out of memory")
        return CapacityPlan(chosen, tuple(reasons), memory, needs.weights)
    if fit < 1:
        allow = ", allow more --memory" if most is not None else ""
        raise InputError(
            f"not one block fits: it takes {size(each + needs.once)} ({'; '.join(reasons)}); free some "
            f"memory{allow}, ask for --weights nf4, a smaller --dtype or fewer --cache-tokens, or override "
            f"this estimate with --num-blocks 1"
        )
    chosen = min(fit, blocks)
    reasons.append(f"room for {fit}: {'all' if chosen == blocks else chosen} of {blocks} blocks")
    return CapacityPlan(chosen, tuple(reasons), memory, needs.weights)


def size(count: int) -> str:
    """A number of bytes as people read it: ``1.5 GiB``, ``212 MiB``, ``90 KiB``."""
    for factor, unit in ((2**30, "GiB"), (2**20, "MiB")):
        if count >= factor:
            return f"{count / factor:.1f} {unit}" if count < 10 * factor else f"{count // factor} {unit}"
    return f"{count // 1024} KiB"
