"""Of each architecture that is listed: spans in a chain give the rows of the whole model, to the last bit."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
from ggml_cases import CASES, LLAMA, QKV_BIAS, SIZE, WIDTH, Case
from gguf import GGUFReader
from random_gguf import Shapes, write_random_gguf

from swarmcore.checkpoint.gguf_header import TENSOR_TYPES
from swarmcore.checkpoint.gguf_model import GgufModel, open_local
from swarmcore.errors import CheckpointError, InvalidStepError, SessionLostError, UnsupportedModelError
from swarmcore.executor.base import SequenceId
from swarmcore.executor.ggml.architectures import ARCHITECTURES, start_step
from swarmcore.executor.ggml.span_cut import cut_span
from swarmcore.executor.ggml.span_file import span_file
from swarmcore.types import Span


def written(case: Case, folder: Path) -> Path:
    return write_random_gguf(
        folder / f"{case.architecture}.gguf",
        case.architecture,
        blocks=case.blocks,
        each=case.each,
        around=case.around,
        keys=case.keys,
    )


ENTERED = [case for case in CASES if ARCHITECTURES[case.architecture].entrance is not None]


@pytest.mark.parametrize(
    "case", [case for case in CASES if case not in ENTERED], ids=lambda case: case.name or case.architecture
)
def test_a_chain_of_spans_is_the_whole_model(case: Case, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    from llama_rows import rows_of

    source = written(case, tmp_path)
    model = open_local(source)
    rows = np.random.default_rng(0).standard_normal((10, WIDTH)).astype(np.float32)
    whole = rows_of(source, case.blocks - 1, rows)
    assert np.isfinite(whole).all()
    for cuts in (every_start(model), [0, case.blocks]):
        hidden = before_the_first_block(case, source, rows)
        for start, end in pairwise(cuts):
            with span_file(model, Span(start, end), cache=tmp_path) as span:
                hidden = rows_of(span.path, end - start - 1, hidden)
        assert np.array_equal(hidden, whole), cuts


LAST_LAYERS = {
    "bloom",
    "cohere2",
    "deepseek2",
    "falcon",
    "gemma3",
    "gpt-oss",
    "gpt2",
    "llama4",
    "phi3",
    "qwen2moe",
}
"""Architectures that differ in what they do with rows that are no outputs, or before the first layer."""


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.architecture in LAST_LAYERS], ids=lambda case: case.architecture
)
async def test_parts_of_what_is_held_and_last_rows(case: Case, tmp_path: Path, load: Any) -> None:
    """As sessions ask for them: through some blocks of a server's, and of a prompt the last row alone."""
    from executor_rows import through

    executor = await load(written(case, tmp_path), f"0:{case.blocks}")
    rows = np.random.default_rng(0).standard_normal((6, WIDTH)).astype(np.float32)
    whole = await through(executor, rows)
    first = await through(executor, rows, 1, span=Span(0, 2))
    assert np.array_equal(await through(executor, first, 2, span=Span(2, case.blocks)), whole)
    await through(executor, rows[:5], 3, reply="last")
    for last in (  # which other kernels compute than several rows
        await through(executor, first, 4, span=Span(2, case.blocks), reply="last"),
        await through(executor, rows, 5, reply="last"),
        await through(executor, rows[5:], 3, start=5),
    ):
        assert last.shape == (1, WIDTH)
        assert np.abs(last - whole[-1:]).max() < 0.01 * whole.std()
    if case.architecture == "deepseek2":  # keeps keys and values compressed into one
        with pytest.raises(SessionLostError, match="do not travel"):
            await executor.export_cache(SequenceId(0), 0, 6)
        return
    executor.reserve(SequenceId(6), executor.page)
    tensors = await executor.export_cache(SequenceId(0), 0, 6)
    await executor.import_cache(SequenceId(6), executor.span, 0, 6, tensors)
    for start in (6, 2):
        own, moved = [await through(executor, rows[:3], sequence, start=start) for sequence in (0, 6)]
        assert np.abs(own - moved).max() < 0.01 * own.std()  # they lie elsewhere in the cache


@pytest.mark.parametrize("case", ENTERED, ids=lambda case: case.architecture)
async def test_what_is_done_before_the_first_block_is_left_out(case: Case, tmp_path: Path, load: Any) -> None:
    """Embeddings come as the client has scaled or normalised them, and between blocks nobody does."""
    pytest.importorskip("llama_cpp")
    from executor_rows import through
    from llama_rows import rows_of

    source = written(case, tmp_path)
    rows = np.random.default_rng(0).standard_normal((10, WIDTH)).astype(np.float32)
    whole = rows_of(source, case.blocks - 1, rows)
    results = []
    for cuts in (every_start(open_local(source)), [0, case.blocks]):
        hidden = before_the_first_block(case, source, rows)
        for start, end in pairwise(cuts):
            hidden = await through(await load(source, f"{start}:{end}"), hidden)
        results.append(hidden)
    assert np.array_equal(*results)
    if case.architecture == "bloom":  # numpy's norm differs in the last bit, and caches are in 16 bits
        assert np.abs(results[0] - whole).max() < 0.005 * whole.std()
    else:
        assert np.array_equal(results[0], whole)


def every_start(model: GgufModel) -> list[int]:
    """Where the model can be cut, with its end."""
    starts = range(0, model.blocks, start_step(model))
    if model.architecture == "cohere2":  # not without a window
        starts = range(0, model.blocks, 2)
    return [*starts, model.blocks]


def before_the_first_block(case: Case, source: Path, rows: np.ndarray) -> np.ndarray:
    """What the first block sees where the whole model is given ``rows``, which a client has done to them."""
    scales = {"granite": 12.0, "granitemoe": 12.0, "minicpm": 12.0, "gemma": 8.0, "gemma2": 8.0}
    scale = scales.get(case.architecture, 1.0)
    tensors = {tensor.name: tensor.data for tensor in GGUFReader(source).tensors}
    if case.architecture == "bloom":
        weight, bias = tensors["token_embd_norm.weight"], tensors["token_embd_norm.bias"]
        centred = rows - rows.mean(-1, keepdims=True)
        return np.float32(centred / np.sqrt(centred.var(-1, keepdims=True) + 1e-5) * weight + bias)
    table = tensors.get("position_embd.weight")
    return rows * np.float32(scale) + np.float32(0 if table is None else table[: len(rows)])


def test_every_architecture_is_tried() -> None:
    assert {case.architecture for case in CASES} == ARCHITECTURES.keys()
    page = (Path(__file__).parents[3] / "docs" / "models.md").read_text()
    listed = page.split("<!-- architectures: begin -->")[1].split("<!-- architectures: end -->")[0]
    assert set(re.findall(r"`(.+?)`", listed)) == ARCHITECTURES.keys()


REFUSED = {
    "an architecture that nobody has looked at": (Case("mamba"), Span(0, 1), "architecture 'mamba'"),
    "queries are scaled by the number of layers": (
        Case("gemma3", keys={"attention.key_length": 32}, blocks=62),
        Span(0, 31),
        "only all 62 blocks",
    ),
    "windows are told by the number of layers": (Case("exaone4", blocks=64), Span(0, 32), "64 layers"),
    "compression is told by the number of layers": (
        Case("deepseek2", keys={"attention.q_lora_rank": 8, "expert_gating_func": 1}, blocks=30),
        Span(0, 27),
        "more or fewer blocks",
    ),
    "no layer looks at positions": (Case("cohere2"), Span(3, 4), "with a window, too"),
    "a period of layers without rope": (Case("smollm3", blocks=8), Span(3, 5), "a multiple of 4, such as 0"),
    "two periods": (
        Case("llama4", keys={"interleave_moe_layer_step": 3}, blocks=24),
        Span(16, 20),
        r"rope repeats after 4, interleave_moe_layer_step repeats after 3 blocks, .* of 12, such as 12",
    ),
    "a key about layers": (
        Case("llama", keys={"moe_every_n_layers": 2}),
        Span(0, 1),
        "llama.moe_every_n_layers",
    ),
    "an array that is not understood": (Case("llama", keys={"secrets": [1, 2]}), Span(0, 1), "llama.secrets"),
    "a tensor beside the blocks": (
        Case("llama", around={"per_layer_token_embd.weight": (48, 32)}),
        Span(0, 1),
        "per_layer_token_embd.weight",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_cuts_that_are_refused(why: str, tmp_path: Path) -> None:
    case, span, said = REFUSED[why]
    with pytest.raises(UnsupportedModelError, match=said):
        cut_span(open_local(written(case, tmp_path)), span)


POSITIONS: dict[str, tuple[Shapes, dict[str, Any]]] = {
    "that are learned": ({"position_embd.weight": (24, WIDTH)}, {"context_length": 24}),
    "whose frequencies change": (
        {"rope_factors_long.weight": (SIZE // 2,), "rope_factors_short.weight": (SIZE // 2,)},
        {"rope.scaling.original_context_length": 24},
    ),
}


@pytest.mark.parametrize("what", POSITIONS)
async def test_positions_end(what: str, tmp_path: Path, load: Any) -> None:
    """llama.cpp would abort, or rotate by other frequencies as soon as it is given room for more tokens."""
    around, keys = POSITIONS[what]
    case = next(
        case
        for case in CASES
        if case.architecture == ("phi3" if "rope_factors_long.weight" in around else "gpt2")
    )
    case = attrs.evolve(case, around={**case.around, **around}, keys={**case.keys, **keys})
    executor = await load(written(case, tmp_path), "0:5")
    from executor_rows import through

    rows = np.random.default_rng(0).standard_normal((25, WIDTH)).astype(np.float32)
    assert np.isfinite(await through(executor, rows[:24])).all()
    with pytest.raises(InvalidStepError, match=r"25 tokens is too long: .* at 24 tokens"):
        await through(executor, rows[24:], start=24)
    with pytest.raises(InvalidStepError, match="too long"):
        await through(executor, rows, 1)


async def test_frequencies_do_not_depend_on_the_room(tmp_path: Path, load: Any) -> None:
    from executor_rows import through

    case = next(case for case in CASES if case.architecture == "phi3")
    rows = np.random.default_rng(0).standard_normal((8, WIDTH)).astype(np.float32)
    results = []
    for length in (16, 100_000):  # less and more than the room that a span begins with
        keys = {**case.keys, "rope.scaling.original_context_length": length}
        (folder := tmp_path / str(length)).mkdir()
        executor = await load(written(attrs.evolve(case, keys=keys), folder), "0:5")
        results.append(await through(executor, rows))
    assert np.array_equal(*results)


def test_what_does_not_matter_for_a_part_is_left_out(tmp_path: Path) -> None:
    """Blocks that only predict further tokens, and keys of things that the model does not have."""
    keys = {"nextn_predict_layers": 1, "full_attention_interval": 0}
    model = open_local(written(Case("llama", keys=keys), tmp_path))
    assert model.blocks == 4
    cut = cut_span(model, Span(2, 4))
    assert cut.metadata["llama.block_count"].decode() == 2
    assert "llama.nextn_predict_layers" not in cut.metadata
    assert "blk.4.attn_q.weight" not in cut.sources


@pytest.mark.parametrize("name", ["blk.0.attn_norm.weight", "blk.2.attn_q.bias", "blk.1.ffn_up.weight"])
def test_types_that_nobody_computes_with(name: str, tmp_path: Path) -> None:
    """llama.cpp ends the process when it comes to such a tensor."""
    model = open_local(written(Case("qwen2", LLAMA | QKV_BIAS), tmp_path))
    cut_span(model, Span(0, 3))
    [type_of] = [number for number, kind in TENSOR_TYPES.items() if kind.name == "F64"]
    if not name.startswith("blk.1"):
        [type_of] = [number for number, kind in TENSOR_TYPES.items() if kind.name == "F16"]
    place = model.places[name]
    wrong = attrs.evolve(place, tensor=attrs.evolve(place.tensor, type=type_of))
    mislabelled = GgufModel(model.name, model.files, model.metadata, {**model.places, name: wrong})
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} is of the type F(16|64)"):
        cut_span(mislabelled, Span(0, 3))


@pytest.mark.parametrize("values", [[2, 2], ["a"] * 5])
def test_values_of_layers_that_are_none(values: list[object], tmp_path: Path) -> None:
    model = open_local(written(Case("llama", keys={"attention.head_count_kv": values}), tmp_path))
    with pytest.raises(CheckpointError, match=r"attention\.head_count_kv is an array of \d, for 5 blocks"):
        cut_span(model, Span(0, 1))
