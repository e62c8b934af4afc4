"""The survey of families: what is served, what is refused, and the table of docs/models.md that it made."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers

from swarmcore.bench.families import BEGIN, END, Family, causal_types, families_table, main, try_family

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


@pytest.mark.parametrize(
    "model_type",
    [
        "llama",
        "phimoe",
        "gpt_oss",
        "gemma3",
        "gemma4_text",
        "llama4_text",
        "afmoe",
        "modernbert-decoder",
        "olmo",
        "opt",
        "mpt",
        "ernie4_5_moe",
    ],
)
def test_served(model_type: str) -> None:
    assert try_family(model_type) == Family(model_type, "served")


@pytest.mark.parametrize(
    ("model_type", "why"),
    [
        ("doge", "change the attention mask"),
        ("mamba", "layers of type linear_attention"),
        ("gemma3n_text", "embeddings of their tokens beside hidden states"),
        ("bart", "not a decoder-only model"),
        ("bert", "no list of modules"),
        ("xlnet", "not known"),
        ("rwkv", ""),
    ],
)
def test_refused(model_type: str, why: str) -> None:
    family = try_family(model_type)
    assert family.state == "refused" and why in family.why


def test_table_says_who_is_served_and_why_others_are_not() -> None:
    families = [Family("a", "served"), Family("b", "refused", "odd"), Family("c", "refused", "odd")]
    assert families_table(families).splitlines()[2:] == [
        "| **served** (1) | `a` |",
        "| refused: odd | `b`, `c` |",
    ]


def test_table_is_written_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert main(["bert", "--write", str(page)]) == 0
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n") and text.endswith(f"{END}\nafter\n")
    assert "`bert`" in text and "old" not in text


def test_docs_name_every_family_and_none_is_wrong() -> None:
    table = PAGE.read_text("utf-8").partition(BEGIN)[2].partition(END)[0]
    if f"Transformers {transformers.__version__}:" not in table:
        pytest.skip("the table was made with another version of Transformers")
    rows = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("| ")]
    states = {name: what.strip() for what, types in rows for name in re.findall(r"`([^`]+)`", types)}
    assert states.keys() == set(causal_types()), "python -m swarmcore.bench.families --write docs/models.md"
    assert not [name for name, what in states.items() if what.startswith(("wrong", "fails"))]
    assert states["llama"].startswith("**served**")
