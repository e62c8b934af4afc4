"""What a GGUF file says of its tokenizer: completed where transformers leaves it out, or refused.

Vocabulary and merges are in the file. How text is split before they are applied is a mere name in it; for
those that transformers does not know it splits as GPT-2 does, which gives other tokens in silence.
"""

from __future__ import annotations

from typing import Any

from swarmcore.checkpoint.gguf_config import Metadata
from swarmcore.errors import UnsupportedModelError

_KINDS = ("gpt2", "llama")
_LIKE_GPT2 = frozenset({"", "default", "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4"})
"""Names of GPT-2's own way; files from before there were names have none."""
_SINGLE_DIGITS = frozenset(
    {"starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"}
)
"""Names of GPT-2's way in which every digit is on its own."""
_LIKE_LLAMA3 = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken"})
"""Names with which a text begins with a token of its own unless the file says otherwise, and words that are
in the vocabulary are not merged from their parts."""
_BY_PATTERN = {
    "bloom": " ?[^(\\s|[.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c])]+",
    "stablelm2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}


def check_tokenizer(metadata: Metadata) -> None:
    """Raise `UnsupportedModelError` for a tokenizer that would not be the model's own."""
    settings = metadata.tokenizer
    kind, pre = str(settings.get("model", "")), str(settings.get("pre", ""))
    if kind not in _KINDS:
        raise _unknown(metadata, f"a tokenizer of the kind {kind!r}")
    spaced = settings.get("add_space_prefix") is not False or metadata.architecture.startswith("gemma")
    if kind == "llama" and not spaced:
        raise _unknown(metadata, "tokenizer.ggml.add_space_prefix = False")
    if kind == "gpt2" and not _is_known(pre):
        raise _unknown(metadata, f"tokenizer.ggml.pre = {pre!r}")


def complete_tokenizer(tokenizer: Any, metadata: Metadata) -> None:
    """Have ``tokenizer``, which transformers made of the file, split text as the file says."""
    from tokenizers import Regex
    from tokenizers import pre_tokenizers as split

    settings, backend = metadata.tokenizer, tokenizer.backend_tokenizer
    pre = str(settings.get("pre", "")) if settings.get("model") == "gpt2" else ""
    like_gpt2 = split.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre in _SINGLE_DIGITS:
        backend.pre_tokenizer = split.Sequence([split.Digits(individual_digits=True), like_gpt2])
    elif pre in _BY_PATTERN:
        by_bytes = split.ByteLevel(add_prefix_space=False, use_regex=False)
        pattern = split.Split(Regex(_BY_PATTERN[pre]), "isolated")
        backend.pre_tokenizer = split.Sequence([pattern, by_bytes])
    elif pre == "falcon":
        digits = [split.Digits(individual_digits=False), split.Split(Regex("[0-9][0-9][0-9]"), "isolated")]
        backend.pre_tokenizer = split.Sequence([split.Punctuation("contiguous"), like_gpt2, *digits])
    if pre in _LIKE_LLAMA3:
        backend.model.ignore_merges = True
        if "add_bos_token" not in settings and tokenizer.bos_token is not None:
            tokenizer.add_bos_token = True


def _is_known(pre: str) -> bool:
    """Whether text is split as this name says, by transformers or here."""
    if pre in _LIKE_GPT2 | _SINGLE_DIGITS | _BY_PATTERN.keys() | {"falcon"}:
        return True
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:  # earlier 5.x go by the architecture
        return True
    return pre in GGUF_PRE_TOKENIZER_SPLITS


def _unknown(metadata: Metadata, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{metadata.name} has {what}, which the conversion of a GGUF does not understand: prompts would "
        f"become other tokens; use its safetensors checkpoint"
    )
