"""What is generated for one prompt: tokens go in, text comes out."""

from __future__ import annotations

import attrs

from swarmcore.client.generation.detokenizer import IncrementalDetokenizer, StopStrings
from swarmcore.client.generation.sampling import Sampler
from swarmcore.client.generation.stream import GeneratedText
from swarmcore.prompts import EncodedPrompt


@attrs.define(eq=False)
class Continuation:
    """What is generated for one prompt. A plain object: tokens go in, text comes out."""

    generated: GeneratedText
    prompt: EncodedPrompt
    max_length: int
    """Tokens, prompt included, at which it ends."""
    eos: frozenset[int]
    sampler: Sampler = attrs.field(repr=False)
    detokenizer: IncrementalDetokenizer = attrs.field(repr=False)
    stops: StopStrings = attrs.field(repr=False)

    @property
    def tokens(self) -> list[int]:
        return self.generated.tokens

    @property
    def finished(self) -> bool:
        return self.generated.finish_reason is not None

    @property
    def length(self) -> int:
        return len(self.prompt.tokens) + len(self.tokens)

    def take(self, token: int) -> str:
        """Go on with ``token``, of which the sampler knows; return the text that is certain now."""
        self.tokens.append(token)
        if token in self.eos:
            self.generated.finish_reason = "eos"
            return self._rest()
        piece, stopped = self.stops.push(self.detokenizer.push(token))
        if stopped:
            self.generated.finish_reason = "stop"
        elif self.length >= self.max_length:
            self.generated.finish_reason = "length"
            piece += self._rest()
        return piece

    def _rest(self) -> str:
        piece, stopped = self.stops.push(self.detokenizer.finish())
        if stopped:
            self.generated.finish_reason = "stop"
            return piece
        return piece + self.stops.finish()
