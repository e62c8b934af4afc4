"""llama.cpp itself on the same GGUF: what swarms are compared with where llama-cpp-python is installed."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from typing import Any

from swarmcore.checkpoint.gguf_source import open_gguf
from swarmcore.errors import CheckpointError, InputError, UnsupportedModelError
from swarmcore.executor.ggml.library import library

_BATCH = 512
"""Most tokens of a prompt in one pass."""


class LlamaCppModel:
    """The whole model in this process, run by llama.cpp alone on the CPU, several texts in one batch.

    Its weights are as they are in the file. llama.cpp can spread a model over machines, by the ``rpc-server``
    that is built beside it; llama-cpp-python does not have that, so it is not measured.
    """

    def __init__(self, path: Path, *, threads: int, texts: int, tokens: int) -> None:
        """``path`` is a GGUF; room is made for ``texts`` of ``tokens`` tokens each, prompts included.

        Raise `MissingExtraError` without llama-cpp-python, `UnsupportedModelError` when it does not load it.
        """
        found = library()
        self._llama: Any = found.llama
        settings = self._llama.llama_model_default_params()
        settings.n_gpu_layers = 0
        with found.reporting() as said:
            self._model = self._llama.llama_model_load_from_file(str(path).encode(), settings)
            self._context = None
            if self._model:
                options = self._llama.llama_context_default_params()
                options.n_ctx, options.n_batch, options.n_seq_max = texts * tokens, _BATCH, texts
                options.n_threads = options.n_threads_batch = threads
                self._context = self._llama.llama_init_from_model(self._model, options)
        if not self._context:
            raise UnsupportedModelError(
                f"llama.cpp does not run {path}: {'; '.join(said) or 'it says not why'}"
            )
        self._vocabulary = self._llama.llama_model_get_vocab(self._model)
        self._vocabulary_size = self._llama.llama_vocab_n_tokens(self._vocabulary)
        self._batch = self._llama.llama_batch_init(_BATCH, 0, 1)

    def close(self) -> None:
        """Free it all."""
        self._llama.llama_batch_free(self._batch)
        self._llama.llama_free(self._context)
        self._llama.llama_model_free(self._model)

    def rate(self, prompts: list[str], tokens: int) -> float:
        """Tokens per second of greedy texts, all at once, from the last one's first token on."""
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)
        chosen, ends = [], []
        for text, prompt in enumerate(prompts):
            ids = self._tokens(prompt)
            for start in range(0, len(ids), _BATCH):
                part = ids[start : start + _BATCH]
                self._decode([(token, start + n, text) for n, token in enumerate(part)])
            chosen.append(self._likeliest(len(part) - 1))
            ends.append(len(ids))
        began = time.perf_counter()
        for step in range(tokens - 1):
            rows = [(token, ends[text] + step, text) for text, token in enumerate(chosen)]
            self._decode(rows)
            chosen = [self._likeliest(row) for row in range(len(rows))]
        return (tokens - 1) * len(prompts) / (time.perf_counter() - began)

    def _tokens(self, text: str) -> list[int]:
        data = text.encode()
        most = len(data) + 8
        ids = (self._llama.llama_token * most)()
        count = self._llama.llama_tokenize(self._vocabulary, data, len(data), ids, most, True, False)
        if count < 1:
            raise InputError("llama.cpp made no tokens of the prompt")
        return list(ids[:count])

    def _decode(self, rows: list[tuple[int, int, int]]) -> None:
        """Compute tokens, each at its position of its text; logits are made of the last row of each text."""
        batch = self._batch
        batch.n_tokens = len(rows)
        last = {text: row for row, (_, _, text) in enumerate(rows)}
        for row, (token, position, text) in enumerate(rows):
            batch.token[row], batch.pos[row] = token, position
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, text
            batch.logits[row] = last[text] == row
        if failed := self._llama.llama_decode(self._context, batch):
            raise CheckpointError(f"llama.cpp failed to compute {len(rows)} tokens (code {failed})")

    def _likeliest(self, row: int) -> int:
        import numpy

        logits = self._llama.llama_get_logits_ith(self._context, row)
        size = (ctypes.c_float * self._vocabulary_size).from_address(ctypes.addressof(logits.contents))
        return int(numpy.frombuffer(size, dtype=numpy.float32).argmax())


def gguf_file(model: str) -> Path:
    """The one GGUF file that ``model`` is. Raise `InputError` for one in several parts, or on a hub."""
    files = open_gguf(model).files
    if len(files) != 1 or files[0].missing([(0, files[0].size)]):
        raise InputError(f"llama.cpp is measured on a GGUF in one file on this machine, and {model} is none")
    return files[0].path
