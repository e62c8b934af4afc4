"""What the tokens of one model are to another: the same, or tokens of the same text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from swarmcore.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHARE = 0.95
"""Of the larger of two vocabularies so much has to be in the smaller one: models of a family differ by some
special tokens."""
_WINDOW = 256
"""Tokens above which those whose text is settled are not translated again."""
_LOOK_BACK = 8
"""Tokens before new text that are tokenised again with it, so that it is cut where the model would cut it."""
_CUT = "\ufffd"
_SAMPLES = (
    "The quick brown fox, 42 km away: it's 3.50 €!",
    " def f(x):\n\treturn  [x] * 2  # naïve\n\n",
    "Größe, мир, 世界, 🙂",
)
"""What a tokenizer has to give back as it was for texts to be translated."""


class DraftText(ABC):
    """One text, of tokens of the model that is drafted for, as it is to the draft model."""

    @abstractmethod
    def append(self, tokens: Sequence[int]) -> None:
        """It goes on with these, for good."""

    @abstractmethod
    def draft_ids(self, ahead: Sequence[int]) -> tuple[list[int], int]:
        """The draft model's tokens of the text and then ``ahead``, and how many of them are certain.

        No tokens where the text ends within a character.
        """

    @abstractmethod
    def back(self, ids: Sequence[int], drafted: int) -> list[int]:
        """What the last ``drafted`` of ``ids``, which follow on the latest `draft_ids`, are to the model."""


class Vocabulary(ABC):
    """The tokens of a draft model, as seen from the model that it drafts for."""

    usable: int
    """Of the draft model's tokens the first so many may be drafted."""
    exact: bool
    """Whether a drafted token is one token of the model's."""

    @abstractmethod
    def text(self) -> DraftText:
        """An empty text."""


def vocabulary_of(
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    draft: PreTrainedTokenizerBase,
    draft_size: int,
    name: str,
) -> Vocabulary:
    """How to draft for a model with ``tokenizer`` by the model ``name`` with another one.

    They are compared token by token. Where they differ, each text is tokenised again; raise
    `UnsupportedModelError` when a tokenizer does not give back texts as they were, so that it cannot be.
    """
    ours, theirs = (_by_id(each) for each in (tokenizer, draft))
    both = ours.keys() & theirs.keys()
    if all(ours[token] == theirs[token] for token in both) and len(both) >= _SHARE * max(
        len(ours), len(theirs)
    ):
        return SameTokens(min(vocab_size, draft_size), draft_size)
    for each, what in ((tokenizer, "the model"), (draft, f"the draft model {name}")):
        for sample in _SAMPLES:
            if (found := _decode(each, _encode(each, sample))) != sample:
                raise UnsupportedModelError(
                    f"{name} has another vocabulary than the model, and text cannot be translated from one "
                    f"to the other: the tokenizer of {what} makes {found!r} of {sample!r}; take a draft "
                    f"model of the same family"
                )
    return Retokenising(tokenizer, vocab_size, draft, draft_size)


class SameTokens(Vocabulary):
    """Both have the same tokens, by the same ids; one of them may have a few more."""

    exact = True

    def __init__(self, usable: int, draft_size: int) -> None:
        self.usable = usable
        self.draft_size = draft_size

    def text(self) -> DraftText:
        return _SameText(self.draft_size)


class _SameText(DraftText):
    def __init__(self, draft_size: int) -> None:
        self._size = draft_size
        self._ids: list[int] = []

    def append(self, tokens: Sequence[int]) -> None:
        self._ids.extend(self._known(tokens))

    def draft_ids(self, ahead: Sequence[int]) -> tuple[list[int], int]:
        return [*self._ids, *self._known(ahead)], len(self._ids)

    def back(self, ids: Sequence[int], drafted: int) -> list[int]:
        return list(ids[len(ids) - drafted :])

    def _known(self, tokens: Sequence[int]) -> Sequence[int]:
        # A special token that the draft model has no row for; the text goes on without it.
        return tokens if max(tokens, default=0) < self._size else [t for t in tokens if t < self._size]


class Retokenising(Vocabulary):
    """Each text is tokenised anew for the draft model, and what that writes for the model."""

    exact = False

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        draft: PreTrainedTokenizerBase,
        draft_size: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.draft = draft
        self.usable = min(draft_size, len(draft))
        self.begin: list[int] = list(draft("")["input_ids"])
        """What the draft model's texts begin with."""

    def text(self) -> DraftText:
        return _RetokenisedText(self)


class _RetokenisedText(DraftText):
    def __init__(self, vocabulary: Retokenising) -> None:
        self._tokenizer, self._draft = vocabulary.tokenizer, vocabulary.draft
        self._size = vocabulary.vocab_size
        self._settled = list(vocabulary.begin)
        """The draft model's tokens of what is not translated any more."""
        self._tokens: list[int] = []
        """The model's tokens after that."""
        self._settle_at = _WINDOW
        self._asked: list[int] = []
        """The same, and what was ahead, when draft ids were last asked for."""

    def append(self, tokens: Sequence[int]) -> None:
        self._tokens.extend(tokens)
        if len(self._tokens) > self._settle_at:
            self._settle()

    def draft_ids(self, ahead: Sequence[int]) -> tuple[list[int], int]:
        self._asked = [*self._tokens, *ahead]
        text = _decode(self._tokenizer, self._asked)
        if text.endswith(_CUT):
            return [], 0
        return [*self._settled, *_encode(self._draft, text)], len(self._settled)

    def back(self, ids: Sequence[int], drafted: int) -> list[int]:
        before = ids[len(self._settled) : len(ids) - drafted]
        text, whole = _decode(self._draft, before), _decode(self._draft, ids[len(self._settled) :])
        new = whole[len(text) :].rstrip(_CUT)
        if not new or not whole.startswith(text):
            return []
        near = self._asked[-_LOOK_BACK:]
        tokens = _encode(self._tokenizer, _decode(self._tokenizer, near) + new)
        if tokens[: len(near)] == near:
            return tokens[len(near) :]
        return _encode(self._tokenizer, new)

    def _settle(self) -> None:
        """Translate all but the last tokens for good, up to where both tokenizers cut the text."""
        whole = _decode(self._tokenizer, self._tokens)
        ids = _encode(self._draft, whole)
        for cut in range(len(self._tokens) - _WINDOW // 4, len(self._tokens) - _WINDOW // 2, -1):
            head, tail = (_decode(self._tokenizer, part) for part in (self._tokens[:cut], self._tokens[cut:]))
            settled = _encode(self._draft, head)
            if head + tail == whole and settled + _encode(self._draft, tail) == ids:
                self._settled += settled
                del self._tokens[:cut]
                self._settle_at = _WINDOW
                return
        self._settle_at = 2 * len(self._tokens)


def _by_id(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    return {number: token for token, number in tokenizer.get_vocab().items()}


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return cast(str, text)
