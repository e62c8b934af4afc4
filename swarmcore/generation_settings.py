"""How text is generated: every setting, its range, and what holds when it is not given.

All else that names settings follows from the fields of `GenerationSettings`: what of them goes over the wire,
options of the command line, and which fields of a model's generation_config.json they replace.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from random import Random
from typing import TYPE_CHECKING, Any, TypedDict

import attrs

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
    import torch

    from swarmcore.prompts import Prompt

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
    speculation: str | Speculation | None


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


@attrs.frozen
class Setting:
    """What there is to know of a setting besides its name and type."""

    help: str
    allowed: str = ""
    """From where to where, in words; empty for what is no number."""
    low: float = 0
    high: float = 0
    whole: bool = False
    neutral: float | None = None
    """The value at which transformers' ``generate`` does nothing of the kind."""

    def check(self, name: str, value: Any) -> None:
        """Raise `InputError` for a value that is out of range, or no number."""
        if value is None or not self.allowed:
            return
        number = isinstance(value, int if self.whole else int | float) and not isinstance(value, bool)
        if not number or not self.low <= value <= self.high:
            kind = "a whole number, " if self.whole else ""
            raise InputError(f"{name} must be {kind}{self.allowed}; got {value!r:.80}")


def _whole(allowed: str, help: str, low: int = 0, neutral: int | None = None) -> Any:
    setting = Setting(help, allowed, low, 2**63 - 1, whole=True, neutral=neutral)
    return attrs.field(default=None, converter=_number, metadata={"setting": setting})


def _real(allowed: str, help: str, low: float, high: float, neutral: float) -> Any:
    setting = Setting(help, allowed, low, high, neutral=neutral)
    return attrs.field(default=None, converter=_number, metadata={"setting": setting})


def _other(help: str, default: Any = None) -> Any:
    return attrs.field(default=default, metadata={"setting": Setting(help)})


@attrs.frozen(kw_only=True)
class Speculation:
    """How far ahead of the model tokens are drafted, which it then verifies, several in a step.

    Whatever it is, the text is that of plain decoding. What is left at None is decided in every round by what
    was measured. Raise `InputError` for a value out of its range.
    """

    length: int | None = None
    """Tokens that are drafted for a step, 0 to ``max_tokens``."""
    depth: int | None = None
    """Steps that are under way at a time, 1 to ``max_depth``."""
    max_tokens: int = 32
    """Most tokens that are drafted for a step."""
    max_depth: int = 8
    """Most steps that are under way at a time; servers may allow fewer."""
    earlier_texts: bool = False
    """Whether to look in texts that were generated before, too: those of the same model and namespace."""

    def __attrs_post_init__(self) -> None:
        for name, low, high in (
            ("max_tokens", 1, 63),
            ("max_depth", 1, 64),
            ("length", 0, self.max_tokens),
            ("depth", 1, self.max_depth),
        ):
            value = getattr(self, name)
            if value is None and name in ("length", "depth"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise InputError(f"Speculation: {name} must be from {low} to {high}; got {value!r:.80}")


SPECULATION = ("auto", "off")
"""What ``speculation`` may be besides a `Speculation`."""


@attrs.frozen(kw_only=True)
class GenerationSettings:
    """Settings of one generation. A penalty or filter left at None is the model's own, as its
    generation_config.json says, or off.

    Raise `InputError` for a value out of its range.
    """

    max_new_tokens: int | None = _whole(
        "1 or more",
        "Tokens after which the text ends, if nothing ends it before. None: 256, or fewer where the model's "
        "own max_new_tokens or max_length say so.",
        low=1,
    )
    temperature: float | None = _real(
        "0 (greedy) or more, up to a million",
        "0 or None: greedy, always the likeliest token. Above 0: sample from the logits divided by it.",
        *(0, _MOST_TEMPERATURE, 1.0),
    )
    top_k: int | None = _whole(
        "0 (off) or more", "Sample from the k likeliest tokens only; 0 is off.", neutral=0
    )
    top_p: float | None = _real(
        "from 0 to 1 (off)",
        "Sample from the likeliest tokens that together have this probability; 1 is off.",
        *(0, 1, 1.0),
    )
    min_p: float | None = _real(
        "from 0 (off) to 1",
        "Sample from tokens at least this many times as likely as the likeliest; 0 is off.",
        *(0, 1, 0.0),
    )
    repetition_penalty: float | None = _real(
        "above 0, up to a million; 1 is off",
        "Above 1 makes tokens that were there before less likely, in greedy choice too; 1 is off.",
        *(1e-6, 1e6, 1.0),
    )
    no_repeat_ngram_size: int | None = _whole(
        "0 (off) or more", "No run of this many tokens occurs twice; 0 is off.", neutral=0
    )
    min_new_tokens: int | None = _whole(
        "0 or more", "The end-of-text token is not chosen before this many.", neutral=0
    )
    stop: str | Sequence[str] | None = _other(
        "The text ends before the first of these strings. Without any: the model's own stop_strings."
    )
    seed: int | None = _whole(
        "from 0 to 2**63 - 1",
        "Makes sampling repeatable; None is another one every time. Prompt i of a batch has seed + i.",
    )
    logits_processors: Sequence[LogitsProcessor] = _other(
        "Your own, applied after the penalties and before the temperature; one of a type that is there "
        "already takes its place.",
        default=(),
    )
    chat_template_kwargs: Mapping[str, Any] | None = _other(
        "Passed on to the tokenizer's apply_chat_template."
    )
    speculation: str | Speculation | None = _other(  # noqa: RUF009  (it is one of attrs)
        "Whether tokens are drafted, and verified several in a step: the same text, sooner. None or auto: as "
        "far as that pays by what is measured; off: never. Or a Speculation."
    )

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> GenerationSettings:
        """The settings that a caller's keyword arguments name. Raise `InputError` for a name that is none,
        with what may have been meant."""
        for name in options:
            if name not in SETTINGS:
                raise InputError(f"generate has no option {name!r}; {_hint(name)}")
        return cls(**options)

    def __attrs_post_init__(self) -> None:
        for name, setting in SETTINGS.items():
            setting.check(name, getattr(self, name))
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
        if not isinstance(self.speculation, Speculation) and self.speculation not in (None, *SPECULATION):
            raise InputError(f"speculation must be auto, off, or a Speculation; got {self.speculation!r:.80}")
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

    @property
    def speculates(self) -> Speculation | None:
        """How tokens are drafted; None for not at all."""
        if self.speculation == "off":
            return None
        return self.speculation if isinstance(self.speculation, Speculation) else Speculation()

    def for_prompt(self, index: int) -> GenerationSettings:
        """These settings for one prompt of a batch: each is sampled with a seed of its own."""
        return self if self.seed is None else attrs.evolve(self, seed=(self.seed + index) % 2**63)


SETTINGS: Mapping[str, Setting] = {
    field.name: field.metadata["setting"] for field in attrs.fields(GenerationSettings)
}
"""What there is to know of each."""


def _neutral(*names: str) -> dict[str, Any]:
    return {name: SETTINGS[name].neutral for name in names}


SAMPLING_FIELDS: Mapping[str, Any] = {
    **_neutral("temperature", "top_k", "top_p", "min_p"),
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
"""Fields of a model's generation_config.json of which transformers makes logits processors when sampling, and
the values that ask for none."""

PENALTY_FIELDS: Mapping[str, Any] = {
    **_neutral("repetition_penalty", "no_repeat_ngram_size", "min_new_tokens"),
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "remove_invalid_values": False,
    "renormalize_logits": False,
    "watermarking_config": None,
}
"""Those of which it always makes logits processors, and the values that ask for none."""

ENDING_FIELDS = frozenset({"eos_token_id", "stop_strings", "max_length", "max_new_tokens"})
"""Those that say where a text ends."""

FOLLOWED_FIELDS = PENALTY_FIELDS.keys() | SAMPLING_FIELDS.keys() | ENDING_FIELDS
"""Those that `RemoteModel.generate` does as transformers does."""


def _hint(name: str) -> str:
    if name in _INSTEAD:
        return f"there is {_INSTEAD[name]}"
    if name in FOLLOWED_FIELDS:
        return f"it is a field of the model's own settings: model.generation_config.{name}"
    close = difflib.get_close_matches(name, SETTINGS, 1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(SETTINGS)}"


_MOST_TOKENS = 2**31
"""More than any vocabulary has."""

WIRE_SETTINGS = SETTINGS.keys() & attrs.fields_dict(OpenGeneration).keys()
"""Settings that a client may ask of others; the rest is code, or for its own tokenizer."""


def open_generation(
    prompt: Prompt, settings: GenerationSettings, *, adapter: str = "", rng: Random
) -> OpenGeneration:
    """What asks for a text. Sampling without a seed gets one, so that another generation server can go on
    with it.

    Raise `InputError` for what a generation server cannot do.
    """
    if settings.logits_processors:
        raise InputError("logits_processors are code, which no generation server runs; use load_model")
    if settings.chat_template_kwargs:
        raise InputError("chat_template_kwargs are not taken by generation servers; use load_model")
    if settings.speculation is not None:
        raise InputError("speculation is decided by generation servers themselves; use load_model")
    check_head_settings(settings)
    seed = settings.seed
    if seed is None and not settings.greedy:
        seed = rng.getrandbits(63)
    values = {name: getattr(settings, name) for name in WIRE_SETTINGS}
    values |= {"max_new_tokens": settings.most_new_tokens, "stop": settings.stops, "seed": seed}
    default_length = settings.max_new_tokens is None
    return OpenGeneration(adapter=adapter, default_length=default_length, **values, **_prompt_fields(prompt))


def check_head_settings(settings: GenerationSettings) -> None:
    """Raise `InputError` for settings that no generation server takes, whose time they cost."""
    if len(settings.stops) > MAX_STOPS or any(len(stop) > MAX_STOP_CHARACTERS for stop in settings.stops):
        raise InputError(
            f"stop: a generation server takes {MAX_STOPS} texts of {MAX_STOP_CHARACTERS} characters at most"
        )
    if (settings.no_repeat_ngram_size or 0) > MAX_NGRAM:
        raise InputError(f"no_repeat_ngram_size must be at most {MAX_NGRAM} at a generation server")


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
            f"messages for a generation server have a role and a content, both of them text; "
            f"got {message!r:.80}"
        )
    return ChatMessage(role, content)
