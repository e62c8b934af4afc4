"""What a client without torch asks of a head peer."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import TYPE_CHECKING, Any

from swarmcore.client.prompts import check_tokens, checked_prompt
from swarmcore.client.settings import GenerationSettings
from swarmcore.errors import InputError
from swarmcore.wire.generate import (
    MAX_NGRAM,
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
    ChatMessage,
    OpenGeneration,
)

if TYPE_CHECKING:
    from swarmcore.client.prompts import Prompt

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
