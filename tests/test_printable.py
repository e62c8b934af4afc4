"""Nothing that a terminal acts upon is left of what strangers say."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcore.printable import printable, printable_json, printable_line

ANYTHING = st.text(st.characters(exclude_categories=()))
ODD = st.text(st.sampled_from("a\x00\x07\x1b\x7f\x9b\x9d\r\n\t\u202e\u2028\ud800 é字🏴\u200d"))
BIDI = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


@pytest.mark.parametrize(
    ("given_", "shown"),
    [
        ("plain text, é, 字, 🙂, \u00a0, \u3000", "plain text, é, 字, 🙂, \u00a0, \u3000"),
        ("two\nlines\tand a tab", "two\nlines\tand a tab"),
        ("\x1b]52;c;cm0=\x07", "^[]52;c;cm0=^G"),
        ("\x9b2J\x7f\x00", "<U+009B>2J^?^@"),
        ("over\rwritten\r\n", "overwritten\n"),
        ("a\u202eb\u2066c\u200fd", "a<U+202E>b<U+2066>c<U+200F>d"),
        ("half \ud83d", "half <U+D83D>"),
        ("family 👨\u200d👩", "family 👨\u200d👩"),
        ("\u0645\u06cc\u200c\u062e\u0648", "\u0645\u06cc\u200c\u062e\u0648"),
    ],
)
def test_what_is_shown(given_, shown):
    assert printable(given_) == shown


@given(ANYTHING | ODD)
def test_no_control_character_but_lines_and_tabs_is_left(text):
    for character in printable(text):
        assert character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp")
        assert unicodedata.bidirectional(character) not in BIDI


@given(ANYTHING | ODD, st.integers(1, 50))
def test_a_line_is_one_and_has_its_length(text, limit):
    line = printable_line(text, limit)
    assert len(line) <= limit
    assert not set(line) & set("\n\r\t\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029")
    assert line.splitlines() in ([line], [])


@given(ANYTHING | ODD)
def test_json_says_the_same_and_is_printable(text):
    encoded = printable_json(json.dumps({"text": text}, ensure_ascii=False))
    assert json.loads(encoded) == {"text": text}
    assert printable(encoded) == encoded
