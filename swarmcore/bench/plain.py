"""Model and blocks as plain Transformers and PyTorch run them: what swarms are compared with."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from swarmcore.checkpoint import Checkpoint
from swarmcore.checkpoint.quiet import quiet_transformers

if TYPE_CHECKING:
    import torch


class PlainModel:
    """The whole model in this process, run by Transformers alone."""

    def __init__(self, checkpoint: Checkpoint, dtype: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(threads)
        with quiet_transformers(lambda share: None):
            self._tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint.folder)
            self._model: Any = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=dtype).eval()

    def text(self, prompt: str, tokens: int) -> str:
        """What a greedy `generate` makes of the prompt, without it."""
        ids = self._tokenizer(prompt, return_tensors="pt")
        output = self._model.generate(**ids, do_sample=False, max_new_tokens=tokens)
        new = output[0, ids.input_ids.shape[1] :]
        # The spaces before punctuation are the model's own.
        return str(self._tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def rate(self, prompt: str, tokens: int) -> float:
        """Tokens per second of a greedy `generate`, from the first token on."""
        clock = _TokenClock()
        self._model.generate(
            **self._tokenizer(prompt, return_tensors="pt"),
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            streamer=clock,
        )
        first, last = clock.times[1], clock.times[-1]  # the first call brings the prompt
        return (tokens - 1) / (last - first)


class _TokenClock:
    """A streamer for Transformers that notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class PlainBlocks:
    """The blocks in this process, run by Transformers and PyTorch alone."""

    def __init__(self, checkpoint: Checkpoint, dtype: str, threads: int, shape: tuple[int, int]) -> None:
        """``shape`` is that of the batch: sequences, and tokens of each."""
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        with quiet_transformers(lambda share: None):
            whole: Any = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=dtype)
        self._base = whole.eval().requires_grad_(False).base_model
        ids = torch.randint(0, whole.config.vocab_size, shape)
        with torch.no_grad():
            self.hidden: torch.Tensor = whole.get_input_embeddings()(ids)

    def times(self) -> tuple[float, float]:
        """Seconds of a forward pass, and of one with a backward pass to the inputs."""
        import torch

        began = time.perf_counter()
        with torch.no_grad():
            self._base(inputs_embeds=self.hidden, use_cache=False)
        forward = time.perf_counter() - began
        inputs = self.hidden.clone().requires_grad_()
        began = time.perf_counter()
        output = self._base(inputs_embeds=inputs, use_cache=False).last_hidden_state
        torch.autograd.grad(output, inputs, torch.ones_like(output))
        return forward, time.perf_counter() - began
