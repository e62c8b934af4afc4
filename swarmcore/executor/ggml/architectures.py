"""What llama.cpp makes of the number of a layer, by architecture: where a model may be cut, and how.

llama.cpp runs a span as a model of its own, whose layers it numbers from 0. Read from its sources (version of
llama-cpp-python 0.3.36): how each architecture uses a layer's number and the number of layers, what it does
with hidden states that come in, and which tensors outside the layers it wants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import attrs

from swarmcore.checkpoint.gguf_model import GgufModel
from swarmcore.errors import CheckpointError, UnsupportedModelError
from swarmcore.types import Span

WINDOW_PATTERN = "attention.sliding_window_pattern"
POSITIONS = "position_embd.weight"
LONG_FREQUENCIES, SHORT_FREQUENCIES = "rope_factors_long.weight", "rope_factors_short.weight"


@attrs.frozen(kw_only=True)
class Architecture:
    """How spans of one architecture are cut. By default every layer is like every other."""

    windows: tuple[int, bool] | None = None
    """Of sliding windows, where the file has no pattern: every how manieth layer attends to everything, and
    whether it is the first of them rather than the last. The pattern is written out for a span's layers."""
    windows_if_told: bool = False
    """There are none where the file does not say how long they are."""
    period: Callable[[GgufModel], Mapping[str, int]] | None = None
    """What repeats itself after so many layers, and cannot be written out: a span starts at a multiple."""
    refusal: Callable[[GgufModel, Span], str | None] | None = None
    """Why this span would not compute what the whole model does; None where it does."""
    entrance: str | None = None
    """The node of llama.cpp's graph that the first layer takes, where something is done to what comes in that
    the client has done already. The hidden states are put in its place."""
    scales_inputs: bool = False
    """Hidden states that come in are multiplied by ``embedding_scale``, which is 1 for a span."""
    residual_scale: float | None = None
    """The default of ``residual_scale``, times the root of the number of layers."""


def architecture_of(model: GgufModel) -> Architecture:
    """Raise `UnsupportedModelError` for one that nobody has looked at."""
    found = ARCHITECTURES.get(model.architecture)
    if found is None:
        raise UnsupportedModelError(
            f"{model.name} is of the architecture {model.architecture!r}, and how llama.cpp computes a part "
            f"of such a model is not known; it is known of {', '.join(sorted(ARCHITECTURES))}"
        )
    return found


def check_cut(model: GgufModel, span: Span) -> None:
    """Raise `UnsupportedModelError` where llama.cpp would not compute ``span`` as in the whole model.

    It says what stands in the way, and which spans could be had. What it lets pass is right for every length.
    """
    found = architecture_of(model)
    if found.refusal is not None and (why := found.refusal(model, span)):
        raise UnsupportedModelError(
            f"blocks {span} of {model.name} ({model.architecture}) are not cut out: {why}"
        )
    step = start_step(model)
    if span.start % step:
        periods = found.period(model) if found.period else {}
        why = ", ".join(f"{key} repeats after {period}" for key, period in periods.items() if period > 1)
        raise UnsupportedModelError(
            f"blocks {span} of {model.name} ({model.architecture}) are not cut out: {why} blocks, so a span "
            f"starts at a multiple of {step}, such as {span.start - span.start % step}"
        )


def start_step(model: GgufModel) -> int:
    """Spans of the model start at multiples of this many blocks."""
    found = architecture_of(model)
    return math.lcm(*found.period(model).values()) if found.period else 1


def max_positions(model: GgufModel) -> int | None:
    """How long sequences may become; None where llama.cpp computes any position in one and the same way.

    It aborts past the end of learned positions. Of rotary frequencies that change with the length it would
    take those for the room there is, whatever the length, so spans have the short ones alone.
    """
    if (table := model.places.get(POSITIONS)) is not None:
        return table.tensor.shape[-1]
    if LONG_FREQUENCIES not in model.places:
        return None
    found = model.own("rope.scaling.original_context_length", model.own("context_length"))
    if not isinstance(found, int) or found < 1:
        raise CheckpointError(
            f"{model.name} is damaged: it does not say up to which length it has frequencies"
        )
    return found


def sliding_layers(model: GgufModel) -> list[bool] | None:
    """For each block of the model, whether its window slides; None for a model without windows.

    Raise `CheckpointError` for a pattern that is none.
    """
    found = architecture_of(model)
    if found.windows is None or (found.windows_if_told and not model.own("attention.sliding_window")):
        return None
    every, first = found.windows
    pattern = model.own(WINDOW_PATTERN, every)
    if isinstance(pattern, list) and len(pattern) >= model.blocks:
        return [bool(slides) for slides in pattern[: model.blocks]]
    if not isinstance(pattern, int) or pattern < 0:
        raise CheckpointError(
            f"{model.name} is damaged: its {model.architecture}.{WINDOW_PATTERN} is no pattern for "
            f"{model.blocks} blocks"
        )
    full = 0 if first else pattern - 1
    return [pattern == 0 or layer % pattern != full for layer in range(model.blocks)]


def _gemma(largest: int) -> Callable[[GgufModel, Span], str | None]:
    """Queries are scaled by another size in the model of so many layers, which is told by their number."""

    def refusal(model: GgufModel, span: Span) -> str | None:
        heads = model.own("attention.head_count")
        heads = heads if isinstance(heads, int) and heads > 0 else 1
        share, size = model.width // heads, model.own("attention.key_length", model.width // heads)
        if share == size or (len(span) == largest) == (model.blocks == largest):
            return None
        return (
            f"llama.cpp tells by the number of {largest} layers how queries are scaled, and would scale "
            f"those of a part in another way; only all {model.blocks} blocks together can be had"
        )

    return refusal


def _cohere2(model: GgufModel, span: Span) -> str | None:
    sliding = sliding_layers(model)
    if sliding is None or any(sliding[span.start : span.end]):
        return None
    return (
        "llama.cpp aborts where no layer looks at positions, and those without windows do not; take a block "
        "with a window, too"
    )


def _exaone4(model: GgufModel, span: Span) -> str | None:
    if 64 in (model.blocks, len(span)):
        return "llama.cpp tells by the number of 64 layers that windows slide; those of a part would not"
    return None


def _deepseek2(model: GgufModel, span: Span) -> str | None:
    """Smaller models, whose queries are not compressed, are told by their number of layers."""
    lite = (26, 27)
    if model.own("expert_gating_func") is None and model.blocks in (47, 48):
        return "it does not say how its experts are chosen, and llama.cpp tells by the number of layers"
    if model.own("attention.q_lora_rank") is None:
        if len(span) in lite:
            return None
        return f"it has no attention.q_lora_rank, which llama.cpp takes of models of {lite} layers only"
    if len(span) in lite:
        return f"llama.cpp takes models of {lite} layers for others; take more or fewer blocks"
    return None


def _smollm3(model: GgufModel) -> dict[str, int]:
    return {"the layers without rope": 4}


def _llama4(model: GgufModel) -> dict[str, int]:
    return {"the layers without rope": 4, **_interleaved(model)}


def _llama4_windowless(model: GgufModel, span: Span) -> str | None:
    if model.own("attention.sliding_window") == 0 and len(span) < model.blocks:
        return "without windows llama.cpp leaves out the rope of the last of its layers"
    return None


def _interleaved(model: GgufModel) -> dict[str, int]:
    step = model.own("interleave_moe_layer_step", 1)
    return {"interleave_moe_layer_step": step if isinstance(step, int) and step > 0 else 1}


_EVERY = Architecture()

ARCHITECTURES: Mapping[str, Architecture] = {
    "arcee": _EVERY,
    "bloom": Architecture(entrance="inp_norm-0"),
    "cohere2": Architecture(windows=(4, False), refusal=_cohere2),
    "command-r": _EVERY,
    "deepseek2": Architecture(refusal=_deepseek2),
    "dots1": _EVERY,
    "ernie4_5": _EVERY,
    "ernie4_5-moe": Architecture(period=_interleaved),
    "exaone4": Architecture(refusal=_exaone4),
    "falcon": _EVERY,
    "gemma": Architecture(entrance="inp_scaled"),
    "gemma2": Architecture(windows=(2, False), refusal=_gemma(46), entrance="inp_scaled"),
    "gemma3": Architecture(windows=(6, False), windows_if_told=True, refusal=_gemma(62)),
    "gpt-oss": Architecture(windows=(2, False)),
    "gpt2": _EVERY,
    "gptneox": _EVERY,
    "granite": Architecture(scales_inputs=True),
    "granitemoe": Architecture(scales_inputs=True),
    "internlm2": _EVERY,
    "llama": _EVERY,
    "llama4": Architecture(windows=(4, False), period=_llama4, refusal=_llama4_windowless),
    "minicpm": Architecture(scales_inputs=True, residual_scale=1.4),
    "mistral3": _EVERY,
    "nemotron": _EVERY,
    "olmo2": Architecture(windows=(4, False), windows_if_told=True),
    "olmoe": _EVERY,
    "phi2": _EVERY,
    "phi3": _EVERY,
    "qwen2": _EVERY,
    "qwen2moe": _EVERY,
    "qwen3": _EVERY,
    "qwen3moe": _EVERY,
    "seed_oss": _EVERY,
    "smollm3": Architecture(period=_smollm3),
    "stablelm": _EVERY,
    "starcoder2": _EVERY,
}
