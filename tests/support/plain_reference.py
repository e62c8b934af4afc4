"""What plain Transformers says, to compare a swarm's texts with."""

from __future__ import annotations

import asyncio
from typing import Any

import attrs
import torch


@attrs.define
class PlainReference:
    """A whole model in this process; each text is generated once."""

    plain: Any
    tokenizer: Any
    known: dict[tuple[str, int], str] = attrs.field(factory=dict)

    async def text(self, prompt: str, tokens: int) -> str:
        """Greedily; in a thread, so that the swarm's event loop lives on."""
        if (prompt, tokens) not in self.known:
            self.known[prompt, tokens] = await asyncio.to_thread(self._generate, prompt, tokens)
        return self.known[prompt, tokens]

    def _generate(self, prompt: str, tokens: int) -> str:
        ids = self.tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            output = self.plain.generate(**ids, max_new_tokens=tokens, do_sample=False)
        text: str = self.tokenizer.decode(output[0, ids.input_ids.shape[1] :], skip_special_tokens=True)
        return text
