"""From what a client asks of a generation server to a prompt and settings, within the peer's limits."""

from __future__ import annotations

from typing import Any

from swarmcore.errors import InputError, UnavailableError
from swarmcore.generation_settings import (
    WIRE_SETTINGS,
    GenerationOptions,
    GenerationSettings,
    check_head_settings,
)
from swarmcore.head.queue import GenerationLimits
from swarmcore.prompts import Prompt
from swarmcore.server.config import MAX_ADAPTER_NAME
from swarmcore.wire.generate import OpenGeneration

CHARACTERS_PER_TOKEN = 32
"""A prompt with more characters for each token that it may have is refused before it is made into tokens."""


def prompt_of(request: OpenGeneration, limits: GenerationLimits) -> Prompt:
    """Raise `InputError` unless there is exactly one prompt, `UnavailableError` for one above the limits."""
    given = [
        name
        for name, there in (
            ("text", request.text is not None),
            ("messages", bool(request.messages)),
            ("tokens", bool(request.tokens)),
        )
        if there
    ]
    if len(given) != 1:
        raise InputError(
            f"a generation has one prompt, in text, messages or tokens; got {' and '.join(given) or 'none'}"
        )
    characters = len(request.text or "")
    characters += sum(len(message.role) + len(message.content) for message in request.messages)
    if characters > CHARACTERS_PER_TOKEN * limits.prompt_tokens:
        raise UnavailableError(
            f"{given[0]}: {characters} characters are more than this generation server takes, whose prompts "
            f"have {limits.prompt_tokens} tokens at most",
            limit=limits.prompt_tokens,
        )
    if request.text is not None:
        return request.text
    if request.messages:
        return [{"role": message.role, "content": message.content} for message in request.messages]
    check_length(len(request.tokens), limits)
    return request.tokens


def check_length(tokens: int, limits: GenerationLimits) -> None:
    """Raise `UnavailableError` for a prompt of more tokens than the peer takes."""
    if tokens > limits.prompt_tokens:
        raise UnavailableError(
            f"the prompt has {tokens} tokens, and this generation server takes {limits.prompt_tokens} "
            f"at most",
            limit=limits.prompt_tokens,
        )


def settings_of(request: OpenGeneration, limits: GenerationLimits) -> GenerationOptions:
    """The settings, checked. Raise `InputError` for one out of its range, which it names, and
    `UnavailableError` for an answer longer than the peer makes."""
    options: Any = {name: getattr(request, name) for name in WIRE_SETTINGS}
    if request.default_length and request.max_new_tokens <= limits.new_tokens:
        options["max_new_tokens"] = None
    check_head_settings(GenerationSettings(**options))
    if request.max_new_tokens > limits.new_tokens:
        raise UnavailableError(
            f"max_new_tokens of {request.max_new_tokens} is more than this generation server makes of one "
            f"text: {limits.new_tokens}",
            limit=limits.new_tokens,
        )
    if len(request.so_far) > request.max_new_tokens:
        raise InputError(f"so_far has {len(request.so_far)} tokens, more than max_new_tokens")
    if len(request.adapter) > MAX_ADAPTER_NAME:
        raise InputError(f"adapter: a name has {MAX_ADAPTER_NAME} characters at most")
    found: GenerationOptions = options
    return found
