"""Which model families are served: every causal language model of the installed Transformers is tried.

``python -m swarmcore.bench.families`` prints the table of docs/models.md, ``--write docs/models.md`` puts it
there. Names of model types after it try these alone. The exit status is 1 when a family is served wrongly, or
fails with anything but a refusal.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

import attrs
import torch
import transformers
from transformers import AutoConfig
from transformers.models.auto import modeling_auto

from swarmcore.checkpoint import Checkpoint, open_checkpoint
from swarmcore.checkpoint.base import one_line
from swarmcore.checkpoint.quiet import quiet_transformers
from swarmcore.client.generation.local_model import LocalParts
from swarmcore.errors import SwarmError, UnsupportedModelError
from swarmcore.executor.base import ScheduledChunk, Segment, SequenceId
from swarmcore.executor.torch.executor import TorchExecutor
from swarmcore.executor.torch.partial_model import check_servable
from swarmcore.executor.torch.reference import LENGTHS, Reference
from swarmcore.executor.torch.self_test import STEPS, compare
from swarmcore.executor.torch.span import check_blocks
from swarmcore.executor.torch.wire_tensors import to_torch, to_wire
from swarmcore.types import ModelInfo, Progress, Span
from swarmcore.wire.tensors import Tensor

BLOCKS = 6
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"

_SETTINGS: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "dbrx": {"attn_config": {"rope_theta": 5e5, "kv_n_heads": 8, "clip_qkv": 8}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    },
    "gemma4_text": {"hidden_size_per_layer_input": 0},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "nemotron": {"head_dim": 128, "num_key_value_heads": 8},
    "reformer": {"is_decoder": True},
}
"""What families need to be set that have no default with which they can be built."""

State = Literal["served", "refused", "wrong", "fails"]


@attrs.frozen
class Family:
    """What became of one model type."""

    model_type: str
    state: State
    why: str = ""


def causal_types() -> list[str]:
    """All model types of which Transformers has a causal language model."""
    return sorted(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def try_family(model_type: str) -> Family:
    """Try a small random model of this type: blocks on three servers and the client's part, against it whole.

    Takes a second or so. A text model is written to a folder and served from there; of a model around a text
    model, the self-tests are made that a real checkpoint would have to pass.
    """
    try:
        config = _config(model_type)
    except Exception as exc:  # each family checks its config in its own way
        return Family(model_type, "refused", f"its default config is of no use: {_in_brief(exc)}")
    try:
        wrong = _try(model_type, config)
    except SwarmError as exc:
        return Family(model_type, "refused", _in_brief(exc))
    except Exception as exc:  # whatever is not a refusal is a fault of ours
        return Family(model_type, "fails", repr(exc))
    return Family(model_type, "wrong", wrong) if wrong else Family(model_type, "served")


def _config(model_type: str) -> Any:
    settings = _SETTINGS.get(model_type, {})
    config = AutoConfig.for_model(model_type, **settings)
    if config.get_text_config(decoder=True) is config:
        with contextlib.suppress(Exception):  # some count their blocks otherwise
            config = AutoConfig.for_model(model_type, **settings, num_hidden_layers=BLOCKS)
    config.dtype = torch.bfloat16  # as in most checkpoints
    return config


class _ConfigOnly(Checkpoint):
    """A checkpoint as far as the self-test looks at it."""

    def __init__(self, model_type: str, config: Any) -> None:
        text = config.get_text_config(decoder=True)
        self.name, self.folder, self.config = model_type, Path(), config
        try:
            self.info = ModelInfo(model_type, "", text.num_hidden_layers, text.hidden_size)
        except AttributeError as exc:
            raise UnsupportedModelError(f"{model_type} is not a model of transformer blocks") from exc

    def names(self) -> Collection[str]:
        raise NotImplementedError

    def nbytes(self, names: Collection[str]) -> int:
        raise NotImplementedError

    def read(self, names: Collection[str], *, progress: Progress | None = None) -> dict[str, torch.Tensor]:
        raise NotImplementedError


def _try(model_type: str, config: Any) -> str | None:
    """What is wrong with how it is served; None when nothing is. Raise what refuses it."""
    checkpoint = _ConfigOnly(model_type, config)
    text = config.get_text_config(decoder=True)
    check_servable(text, model_type)
    blocks = checkpoint.info.blocks
    spans = [Span(0, blocks // 3), Span(blocks // 3, blocks // 2), Span(blocks // 2, blocks)]
    spans = [span for span in spans if len(span)]
    if text is not config:
        check_blocks(checkpoint, Span(blocks // 3, blocks))
        LocalParts.check(checkpoint)
        return None
    reference = Reference(checkpoint)
    with tempfile.TemporaryDirectory() as parent:
        folder = str(Path(parent) / model_type)
        with quiet_transformers(lambda share: None):
            reference.model.save_pretrained(folder)
        return asyncio.run(_serve(open_checkpoint(folder), spans, reference))


async def _serve(checkpoint: Checkpoint, spans: list[Span], reference: Reference) -> str | None:
    """What differs from the reference, when its sequences go through executors of these spans."""
    chain = [TorchExecutor.load(checkpoint, span, dtype="float32") for span in spans]
    parts = LocalParts.load(checkpoint, dtype="float32")
    logits: list[list[torch.Tensor]] = [[] for _ in LENGTHS]
    try:
        for step in STEPS:
            hidden = [
                to_wire("hidden", parts.embed(reference.ids[number][start:end].tolist(), range(start, end)))
                for number, start, end in step
            ]
            for executor in chain:
                slices = []
                for tensor, (number, start, end) in zip(hidden, step, strict=True):
                    executor.reserve(SequenceId(number), end)
                    segment = Segment(SequenceId(number), start, end - start)
                    slices.append(ScheduledChunk(tensor, 0, executor.span, (segment,)))
                hidden = [_checked(result) for result in await executor.step(slices)]
            for tensor, (number, _, _) in zip(hidden, step, strict=True):
                logits[number].append(parts.logits(to_torch(tensor)))
    finally:
        for executor in chain:
            await executor.close()
    found = (compare(torch.cat(rows), whole) for rows, whole in zip(logits, reference.logits, strict=True))
    return next((f"logits are off by {difference}" for difference in found if difference), None)


def _checked(result: Tensor | SwarmError) -> Tensor:
    if isinstance(result, SwarmError):
        raise result
    return result


def _in_brief(exc: Exception) -> str:
    """A refusal without the name of what was refused, so that all that are refused alike are together."""
    text = re.sub(r"^\S+( \(\S+\))?:? (?=(has|is|keeps|changes|cannot|its|does) )", "", one_line(exc))
    return re.split(r"; |: Unrecognized|: Class validation", text)[0][:160]


def families_table(families: Collection[Family]) -> str:
    """In Markdown: who is served, and who is refused for which reason."""
    kinds: dict[str, list[str]] = {}
    for family in families:
        what = "**served**" if family.state == "served" else f"{family.state}: {family.why}"
        kinds.setdefault(what, []).append(f"`{family.model_type}`")
    served = kinds.pop("**served**", [])
    lines = ["| | model types |", "|---|---|", f"| **served** ({len(served)}) | {', '.join(served)} |"]
    for what, types in sorted(kinds.items(), key=lambda kind: (-len(kind[1]), kind[0])):
        lines.append(f"| {what.replace('|', ' ')} | {', '.join(types)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("types", nargs="*", metavar="TYPE", help="only these model types")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between its marks in FILE")
    options = parser.parse_args(arguments)
    families = []
    for model_type in options.types or causal_types():
        families.append(try_family(model_type))
        sys.stderr.write(f"{model_type}: {families[-1].state} {families[-1].why}".rstrip() + "\n")
    table = f"With Transformers {transformers.__version__}:\n\n{families_table(families)}"
    if options.write is None:
        sys.stdout.write(table + "\n")
    else:
        page = options.write.read_text("utf-8")
        before, _, rest = page.partition(BEGIN)
        _, _, after = rest.partition(END)
        options.write.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", "utf-8")
    return int(any(family.state in ("wrong", "fails") for family in families))


if __name__ == "__main__":
    sys.exit(main())
