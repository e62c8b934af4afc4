"""How text is generated: every setting, its range, and what holds when it is not given."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import attrs

from swarmcore.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig

LogitsProcessor = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]
"""Token ids so far ``[1, tokens]`` and scores ``[1, vocabulary]`` in, scores out: as in transformers."""


class GenerationOptions(TypedDict, total=False):
    """The fields of `GenerationSettings`, as keyword arguments."""

    max_new_tokens: int
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    no_repeat_ngram_size: int | None
    min_new_tokens: int | None
    stop: str | Sequence[str] | None
    seed: int | None
    logits_processors: Sequence[LogitsProcessor]
    chat_template_kwargs: Mapping[str, Any] | None


@attrs.frozen(kw_only=True)
class GenerationSettings:
    """Settings of one generation. A penalty or filter left at None is the model's own, as its
    generation_config.json says, or off.

    Raise `InputError` for a value out of its range.
    """

    max_new_tokens: int = 256
    """Tokens after which the text ends, if nothing ends it before."""
    temperature: float | None = None
    """0 or None: greedy, always the likeliest token. Above 0: sample from the logits divided by it."""
    top_k: int | None = None
    """Sample from the k likeliest tokens only; 0 is off."""
    top_p: float | None = None
    """Sample from the likeliest tokens that together have this probability; 1 is off."""
    min_p: float | None = None
    """Sample from tokens at least this many times as likely as the likeliest; 0 is off."""
    repetition_penalty: float | None = None
    """Above 1 makes tokens that were there before less likely, in greedy choice too; 1 is off."""
    no_repeat_ngram_size: int | None = None
    """No run of this many tokens occurs twice; 0 is off."""
    min_new_tokens: int | None = None
    """The end-of-text token is not chosen before this many."""
    stop: str | Sequence[str] | None = None
    """The text ends before the first of these strings."""
    seed: int | None = None
    """Makes sampling repeatable; None is another one every time. Prompt ``i`` of a batch has ``seed + i``."""
    logits_processors: Sequence[LogitsProcessor] = ()
    """Your own, applied after the penalties and before the temperature."""
    chat_template_kwargs: Mapping[str, Any] | None = None
    """Passed on to the tokenizer's ``apply_chat_template``."""

    def __attrs_post_init__(self) -> None:
        _check("max_new_tokens", self.max_new_tokens, 1, math.inf, "a whole number, 1 or more", whole=True)
        _check("temperature", self.temperature, 0, math.inf, "0 (greedy) or more")
        _check("top_k", self.top_k, 0, math.inf, "a whole number, 0 (off) or more", whole=True)
        _check("top_p", self.top_p, 0, 1, "from 0 to 1 (off)")
        _check("min_p", self.min_p, 0, 1, "from 0 (off) to 1")
        _check("repetition_penalty", self.repetition_penalty, 1e-6, math.inf, "above 0; 1 is off")
        _check(
            "no_repeat_ngram_size",
            self.no_repeat_ngram_size,
            0,
            math.inf,
            "a whole number, 0 (off) or more",
            whole=True,
        )
        _check("min_new_tokens", self.min_new_tokens, 0, math.inf, "a whole number, 0 or more", whole=True)
        _check("seed", self.seed, 0, 2**63 - 1, "a whole number from 0 to 2**63 - 1", whole=True)
        stops = [self.stop] if isinstance(self.stop, str) else list(self.stop or ())
        if not all(isinstance(stop, str) and stop for stop in stops):
            raise InputError(f"stop must be a text or a list of texts, none of them empty; got {self.stop!r}")
        filters = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
        if self.temperature is None and filters:
            raise InputError(
                f"{', '.join(filters)} only matter when sampling, and without a temperature the choice is "
                f"greedy; pass a temperature above 0, such as 1.0, too"
            )

    @property
    def greedy(self) -> bool:
        return not self.temperature

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def with_defaults(self, config: GenerationConfig) -> GenerationSettings:
        """These settings, with those of a model's generation config where they are None."""
        names = ["repetition_penalty", "no_repeat_ngram_size", "min_new_tokens"]
        if not self.greedy:
            names += ["top_k", "top_p", "min_p"]
        own: dict[str, Any] = {n: getattr(config, n, None) for n in names if getattr(self, n) is None}
        return attrs.evolve(self, **own)

    def for_prompt(self, index: int) -> GenerationSettings:
        """These settings for one prompt of a batch: each is sampled with a seed of its own."""
        return self if self.seed is None else attrs.evolve(self, seed=(self.seed + index) % 2**63)


def _check(name: str, value: Any, low: float, high: float, allowed: str, *, whole: bool = False) -> None:
    if value is None and name != "max_new_tokens":
        return
    number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high or value == math.inf:
        raise InputError(f"{name} must be {allowed}; got {value!r}")
