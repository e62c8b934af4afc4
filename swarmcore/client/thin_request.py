"""What a client without torch asks of a head peer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import TYPE_CHECKING, Any

from swarmcore.client.settings import GenerationSettings
from swarmcore.errors import InputError
from swarmcore.wire.generate import ChatMessage, OpenGeneration

if TYPE_CHECKING:
    from swarmcore.client.prompts import Prompt


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
    seed = settings.seed
    if seed is None and not settings.greedy:
        seed = rng.getrandbits(63)
    opening = OpenGeneration(
        adapter=adapter,
        max_new_tokens=settings.max_new_tokens,
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
    for name, text in (("prompt", opening.text), *(("stop", stop) for stop in opening.stop)):
        _check_text(name, text or "")
    return opening


def _prompt_fields(prompt: Prompt) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"text": prompt}
    items: list[Any] = list(prompt) if isinstance(prompt, Sequence) else []
    if items and all(isinstance(item, Mapping) for item in items):
        return {"messages": tuple(map(_message, items))}
    if items and all(isinstance(item, int) and not isinstance(item, bool) for item in items):
        return {"tokens": tuple(items)}
    raise InputError(
        f"a prompt is a text, a list of messages such as "
        f'{{"role": "user", "content": "Hello"}}, or a list of token ids; got {prompt!r:.80}'
    )


def _message(message: Any) -> ChatMessage:
    role, content = message.get("role"), message.get("content")
    if set(message) != {"role", "content"} or not isinstance(role, str) or not isinstance(content, str):
        raise InputError(
            f"messages for a head peer have a role and a content, both of them text; got {message!r:.80}"
        )
    _check_text("role", role)
    _check_text("content", content)
    return ChatMessage(role, content)


def _check_text(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise InputError(f"{name} has half a character (a lone surrogate) at {exc.start}") from exc
