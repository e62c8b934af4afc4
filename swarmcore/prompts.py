"""Prompts to token ids: plain text, chat messages, or ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import attrs

from swarmcore.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]
"""Text to continue; chat messages (``{"role": "user", "content": "…"}``) to answer; or token ids, also in an
array of PyTorch or NumPy with one dimension, or with two and a single row."""


_EXPECTED = (
    "a prompt is a text, a list of token ids, or a list of messages such as "
    '{"role": "user", "content": "Hello"}'
)


@attrs.frozen
class EncodedPrompt:
    tokens: list[int]
    context: list[int]
    """The tokens that the generated text continues; none for an answer in a chat."""


def load_tokenizer(folder: Path, model: str) -> PreTrainedTokenizerBase:
    """The tokenizer whose files are in ``folder``. Raise `CheckpointError` when there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        tokenizer("")  # sets its padding and truncation now, not while another thread decodes
    except Exception as exc:
        from swarmcore.checkpoint.folder import find_lfs_pointer
        from swarmcore.checkpoint.location import lfs_pointer

        if file := find_lfs_pointer(folder):
            raise lfs_pointer(file) from exc
        raise CheckpointError(f"{model} has no tokenizer that transformers can read: {exc}") from exc
    return tokenizer


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt | EncodedPrompt,
    *,
    vocab_size: int,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> EncodedPrompt:
    """Raise `InputError` as `checked_prompt` does, for an empty prompt, ids outside the vocabulary, and
    messages that cannot be put into the model's chat template."""
    checked = prompt if isinstance(prompt, EncodedPrompt) else checked_prompt(prompt)
    if isinstance(checked, EncodedPrompt):
        encoded = checked
    elif isinstance(checked, str):
        tokens = list(tokenizer(checked)["input_ids"])
        if not tokens and tokenizer.bos_token_id is not None:
            tokens = [tokenizer.bos_token_id]
        encoded = EncodedPrompt(tokens, tokens)
    elif checked and isinstance(checked[0], Mapping):
        options = chat_template_kwargs or {}
        tokens = _chat_tokens(tokenizer, checked, options)
        encoded = EncodedPrompt(tokens, tokens if options.get("continue_final_message") else [])
    else:
        tokens = checked_ids(checked)
        encoded = EncodedPrompt(tokens, tokens)
    check_tokens(encoded.tokens, vocab_size)
    if not encoded.tokens:
        raise InputError("the prompt is empty, and this model has no token to begin a text with")
    return encoded


def checked_prompt(prompt: Any) -> str | list[Mapping[str, Any]] | list[int]:
    """The prompt as plain values. Raise `InputError`, saying what a prompt is, for anything else."""
    if isinstance(prompt, str):
        check_text("the prompt", prompt)
        return prompt
    if isinstance(prompt, Sequence) and prompt and all(isinstance(item, Mapping) for item in prompt):
        return [_checked_message(message) for message in prompt]
    try:
        return checked_ids(prompt)
    except InputError as exc:
        raise InputError(f"{_EXPECTED}; got {_shown(prompt)}") from exc


def checked_ids(ids: Any) -> list[int]:
    """Token ids of one sequence as plain numbers, of a list or an array; a batch of one, as tokenizers make
    it, is one, too. Raise `InputError` for anything else."""
    values = ids.tolist() if hasattr(ids, "tolist") and not isinstance(ids, memoryview) else ids
    if isinstance(values, list | tuple) and len(values) == 1 and isinstance(values[0], list | tuple):
        values = values[0]
    if (
        not isinstance(values, Sequence)
        or isinstance(values, str | bytes | bytearray | memoryview)
        or not all(isinstance(item, Integral) and not isinstance(item, bool) for item in values)
    ):
        raise InputError(f"token ids are whole numbers, in a list or an array; got {_shown(ids)}")
    return [int(item) for item in values]


def check_text(name: str, text: str) -> None:
    """Raise `InputError` for text that cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        raise InputError(f"{name} has half a character (a lone surrogate) at {exc.start}") from exc


def check_tokens(tokens: Sequence[int], vocab_size: int) -> None:
    """Raise `InputError` for ids outside the vocabulary."""
    if tokens and not 0 <= min(tokens) <= max(tokens) < vocab_size:
        raise InputError(
            f"token ids must be from 0 to {vocab_size - 1}, the model's last one; got {min(tokens)} to "
            f"{max(tokens)}"
        )


def _checked_message(message: Mapping[str, Any]) -> Mapping[str, Any]:
    content = message.get("content")
    # What goes with a message that has no content, such as calls of tools, is for the chat template to know.
    if not isinstance(message.get("role"), str) or (content is None and set(message) <= {"role", "content"}):
        raise InputError(f"{_EXPECTED}; got the message {_shown(message)}")
    if not isinstance(content, str | list | tuple | Mapping | None):
        raise InputError(f"the content of a message is text; got {_shown(content)}")
    for name in ("role", "content"):
        if isinstance(text := message.get(name), str):
            check_text(f"a message's {name}", text)
    return message


def _shown(value: Any) -> str:
    shape = getattr(value, "shape", None)
    kind = type(value).__name__
    text = f"{kind} of shape {tuple(shape)}" if shape is not None else f"{kind} {value!r:.80}"
    if isinstance(value, Mapping) and "input_ids" in value:
        return f"{kind}: pass its input_ids"
    if isinstance(value, list | tuple) and value and all(isinstance(item, str) for item in value):
        return f"{text}: several prompts are for generate_batch"
    return text


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
    return checked_ids(encoded["input_ids"])
