"""How text is generated: every setting, its range, and what holds when it is not given."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from random import Random
from typing import TYPE_CHECKING, Any, TypedDict

import attrs

from swarmcore.client.generation.generation_config import FOLLOWED_FIELDS
from swarmcore.errors import InputError
from swarmcore.prompts import check_text, check_tokens, checked_prompt
from swarmcore.wire.generate import (
    MAX_NGRAM,
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
    ChatMessage,
    OpenGeneration,
)

if TYPE_CHECKING:
    from swarmcore.prompts import Prompt

if TYPE_CHECKING:
    import torch


LogitsProcessor = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]
"""Token ids so far ``[1, tokens]`` and scores ``[1, vocabulary]`` in, scores out: as in transformers."""


class GenerationOptions(TypedDict, total=False):
    """The fields of `GenerationSettings`, as keyword arguments."""

    max_new_tokens: int | None
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


_MOST = 2**63 - 1

DEFAULT_NEW_TOKENS = 256
"""Tokens of an answer at most where nobody says how many."""

_LEAST_TEMPERATURE = 1e-30
_MOST_TEMPERATURE = 1e6
"""Beyond these logits divided by the temperature are no longer numbers in float32, or all the same."""

_INSTEAD = {
    "max_tokens": "max_new_tokens",
    "max_length": "max_new_tokens, which counts the tokens of the answer alone",
    "do_sample": "temperature: above 0 it samples, without one the choice is greedy",
    "num_beams": "a session's `sources` for a beam search of your own, or generate of swarmcore.transformers",
    "num_return_sequences": "generate_batch, with the prompt as often as there are to be answers",
    "n": "generate_batch, with the prompt as often as there are to be answers",
    "stop_strings": "stop",
    "stop_sequences": "stop",
    "logits_processor": "logits_processors",
    "streamer": "a loop over the generation, whose pieces come as they are made",
    "stopping_criteria": "a loop over the generation, which ends when it is left",
}
"""What there is for options that other libraries have."""


def _number(value: Any) -> Any:
    """Numbers of any library as Python's own; the rest as it is."""
    if isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def _numeric() -> Any:
    return attrs.field(default=None, converter=_number)


@attrs.frozen(kw_only=True)
class GenerationSettings:
    """Settings of one generation. A penalty or filter left at None is the model's own, as its
    generation_config.json says, or off.

    Raise `InputError` for a value out of its range.
    """

    max_new_tokens: int | None = _numeric()
    """Tokens after which the text ends, if nothing ends it before. None: 256, or fewer where the model's own
    ``max_new_tokens`` or ``max_length`` say so."""
    temperature: float | None = _numeric()
    """0 or None: greedy, always the likeliest token. Above 0: sample from the logits divided by it."""
    top_k: int | None = _numeric()
    """Sample from the k likeliest tokens only; 0 is off."""
    top_p: float | None = _numeric()
    """Sample from the likeliest tokens that together have this probability; 1 is off."""
    min_p: float | None = _numeric()
    """Sample from tokens at least this many times as likely as the likeliest; 0 is off."""
    repetition_penalty: float | None = _numeric()
    """Above 1 makes tokens that were there before less likely, in greedy choice too; 1 is off."""
    no_repeat_ngram_size: int | None = _numeric()
    """No run of this many tokens occurs twice; 0 is off."""
    min_new_tokens: int | None = _numeric()
    """The end-of-text token is not chosen before this many."""
    stop: str | Sequence[str] | None = None
    """The text ends before the first of these strings. Without any: the model's own
    ``stop_strings``."""
    seed: int | None = _numeric()
    """Makes sampling repeatable; None is another one every time. Prompt ``i`` of a batch has ``seed + i``."""
    logits_processors: Sequence[LogitsProcessor] = ()
    """Your own, applied after the penalties and before the temperature; one of a type that is there already
    takes its place."""
    chat_template_kwargs: Mapping[str, Any] | None = None
    """Passed on to the tokenizer's ``apply_chat_template``."""

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> GenerationSettings:
        """The settings that a caller's keyword arguments name. Raise `InputError` for a name that is none,
        with what may have been meant."""
        names = [field.name for field in attrs.fields(cls)]
        for name in options:
            if name not in names:
                raise InputError(f"generate has no option {name!r}; {_hint(name, names)}")
        return cls(**options)

    def __attrs_post_init__(self) -> None:
        counting = [("max_new_tokens", 1), ("top_k", 0), ("no_repeat_ngram_size", 0), ("min_new_tokens", 0)]
        for name, least in counting:
            off = " (off)" if name in ("top_k", "no_repeat_ngram_size") else ""
            _check(
                name, getattr(self, name), least, _MOST, f"a whole number, {least}{off} or more", whole=True
            )
        _check("seed", self.seed, 0, _MOST, "a whole number from 0 to 2**63 - 1", whole=True)
        _check("temperature", self.temperature, 0, _MOST_TEMPERATURE, "0 (greedy) or more, up to a million")
        _check("top_p", self.top_p, 0, 1, "from 0 to 1 (off)")
        _check("min_p", self.min_p, 0, 1, "from 0 (off) to 1")
        _check("repetition_penalty", self.repetition_penalty, 1e-6, 1e6, "above 0, up to a million; 1 is off")
        if not isinstance(self.stop, str | Sequence | None) or not all(
            isinstance(stop, str) and stop for stop in self.stops
        ):
            raise InputError(
                f"stop must be a text or a list of texts, none of them empty; got {self.stop!r:.80}"
            )
        for stop in self.stops:
            check_text("stop", stop)
        if not isinstance(self.logits_processors, Sequence) or not all(map(callable, self.logits_processors)):
            raise InputError(
                f"logits_processors must be a list of functions of (ids, scores); got "
                f"{self.logits_processors!r:.80}"
            )
        if not isinstance(self.chat_template_kwargs, Mapping | None):
            raise InputError(
                f"chat_template_kwargs must be a dict of keyword arguments; got "
                f"{self.chat_template_kwargs!r:.80}"
            )
        filters = [name for name in ("top_k", "top_p", "min_p") if getattr(self, name) is not None]
        if self.temperature is None and filters:
            matter = "matters" if len(filters) == 1 else "matter"
            raise InputError(
                f"{', '.join(filters)} only {matter} when sampling, and without a temperature the choice is "
                f"greedy; pass a temperature above 0, such as 1.0, too"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature is None or self.temperature < _LEAST_TEMPERATURE

    @property
    def most_new_tokens(self) -> int:
        """Tokens of the answer at most, whatever the model's own settings are."""
        return DEFAULT_NEW_TOKENS if self.max_new_tokens is None else self.max_new_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def for_prompt(self, index: int) -> GenerationSettings:
        """These settings for one prompt of a batch: each is sampled with a seed of its own."""
        return self if self.seed is None else attrs.evolve(self, seed=(self.seed + index) % 2**63)


def _hint(name: str, names: Sequence[str]) -> str:
    if name in _INSTEAD:
        return f"there is {_INSTEAD[name]}"
    if name in FOLLOWED_FIELDS:
        return f"it is a field of the model's own settings: model.generation_config.{name}"
    close = difflib.get_close_matches(name, names, 1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"


def _check(name: str, value: Any, low: float, high: float, allowed: str, *, whole: bool = False) -> None:
    if value is None:
        return
    number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        raise InputError(f"{name} must be {allowed}; got {value!r:.80}")


_MOST_TOKENS = 2**31
"""More than any vocabulary has."""


def open_generation(
    prompt: Prompt, settings: GenerationSettings, *, adapter: str = "", rng: Random
) -> OpenGeneration:
    """What asks for a text. Sampling without a seed gets one, so that another head peer can go on with it.

    Raise `InputError` for what a head peer cannot do.
    """
    if settings.logits_processors:
        raise InputError("logits_processors are code, which no head peer runs; use load_model")
    if settings.chat_template_kwargs:
        raise InputError("chat_template_kwargs are not taken by head peers; use load_model")
    check_head_settings(settings)
    seed = settings.seed
    if seed is None and not settings.greedy:
        seed = rng.getrandbits(63)
    return OpenGeneration(
        adapter=adapter,
        max_new_tokens=settings.most_new_tokens,
        default_length=settings.max_new_tokens is None,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
        repetition_penalty=settings.repetition_penalty,
        no_repeat_ngram_size=settings.no_repeat_ngram_size,
        min_new_tokens=settings.min_new_tokens,
        stop=settings.stops,
        seed=seed,
        **_prompt_fields(prompt),
    )


def check_head_settings(settings: GenerationSettings) -> None:
    """Raise `InputError` for settings that no head peer takes, whose time they cost."""
    if len(settings.stops) > MAX_STOPS or any(len(stop) > MAX_STOP_CHARACTERS for stop in settings.stops):
        raise InputError(
            f"stop: a head peer takes {MAX_STOPS} texts of {MAX_STOP_CHARACTERS} characters at most"
        )
    if (settings.no_repeat_ngram_size or 0) > MAX_NGRAM:
        raise InputError(f"no_repeat_ngram_size must be at most {MAX_NGRAM} at a head peer")


def _prompt_fields(prompt: Prompt) -> dict[str, Any]:
    checked = checked_prompt(prompt)
    if isinstance(checked, str):
        return {"text": checked}
    if not checked:
        raise InputError("the prompt is empty")
    messages = [item for item in checked if isinstance(item, Mapping)]
    if messages:
        return {"messages": tuple(map(_message, messages))}
    tokens = [item for item in checked if isinstance(item, int)]
    check_tokens(tokens, _MOST_TOKENS)
    return {"tokens": tuple(tokens)}


def _message(message: Mapping[str, Any]) -> ChatMessage:
    role, content = message.get("role"), message.get("content")
    if set(message) != {"role", "content"} or not isinstance(role, str) or not isinstance(content, str):
        raise InputError(
            f"messages for a head peer have a role and a content, both of them text; got {message!r:.80}"
        )
    return ChatMessage(role, content)
