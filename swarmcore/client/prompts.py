"""Prompts to token ids: plain text, chat messages, or ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs

from swarmcore.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase
Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]
"""Text to continue; chat messages (``{"role": "user", "content": "…"}``) to answer; or token ids."""

_CONTEXT = 6
"""Tokens at a prompt's end that its continuation's first characters may depend on."""


@attrs.frozen
class EncodedPrompt:
    tokens: list[int]
    context: list[int]
    """The last tokens of the text that the generated one continues; none for an answer in a chat."""


def load_tokenizer(folder: Path, model: str) -> PreTrainedTokenizerBase:
    """The tokenizer whose files are in ``folder``. Raise `CheckpointError` when there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        tokenizer("")  # sets its padding and truncation now, not while another thread decodes
    except Exception as exc:
        raise CheckpointError(f"{model} has no tokenizer that transformers can read: {exc}") from exc
    return tokenizer


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt | EncodedPrompt,
    *,
    vocab_size: int,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> EncodedPrompt:
    """Raise `InputError` for an empty prompt, ids outside the vocabulary, and messages that cannot be
    put into the model's chat template."""
    if isinstance(prompt, EncodedPrompt):
        encoded = prompt
    elif isinstance(prompt, str):
        tokens = list(tokenizer(prompt)["input_ids"])
        if not tokens and tokenizer.bos_token_id is not None:
            tokens = [tokenizer.bos_token_id]
        encoded = EncodedPrompt(tokens, tokens[-_CONTEXT:])
    elif prompt and all(isinstance(item, Mapping) for item in prompt):
        encoded = EncodedPrompt(_chat_tokens(tokenizer, prompt, chat_template_kwargs or {}), [])
    elif all(isinstance(item, int) and not isinstance(item, bool) for item in prompt):
        tokens = [int(item) for item in prompt if isinstance(item, int)]
        encoded = EncodedPrompt(tokens, tokens[-_CONTEXT:])
    else:
        raise InputError(
            f"a prompt is a text, a list of messages such as "
            f'{{"role": "user", "content": "Hello"}}, or a list of token ids; got {prompt!r:.80}'
        )
    check_tokens(encoded.tokens, vocab_size)
    if not encoded.tokens:
        raise InputError("the prompt is empty, and this model has no token to begin a text with")
    return encoded


def check_tokens(tokens: Sequence[int], vocab_size: int) -> None:
    """Raise `InputError` for ids outside the vocabulary."""
    if tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size:
        raise InputError(f"token ids must be from 0 to {vocab_size - 1}; got {min(tokens)} to {max(tokens)}")


def _chat_tokens(
    tokenizer: PreTrainedTokenizerBase, messages: Any, template_kwargs: Mapping[str, Any]
) -> list[int]:
    if not tokenizer.chat_template:
        raise InputError(
            "this model has no chat template (it is a base model, or its tokenizer_config.json is missing "
            "one): pass a text instead of messages, or set model.tokenizer.chat_template"
        )
    options = {"add_generation_prompt": True, **template_kwargs}
    try:
        encoded = tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=True, **options)
    except Exception as exc:  # a template raises what its author liked
        raise InputError(f"the model's chat template does not take these messages: {exc}") from exc
    return list(encoded["input_ids"])
