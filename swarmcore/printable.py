"""What strangers say, in a form that is safe to print: on a terminal, in a log, in an error message."""

from __future__ import annotations

MAX_LINE = 1000
"""Characters of a stranger's text that go into one line."""

_BIDI = {0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
"""Characters that change the order in which others are shown."""


class _Shown(dict[int, str]):
    """Each character that a terminal would act upon, as it is shown instead."""

    def __init__(self, breaks: dict[int, str]) -> None:
        super().__init__(breaks)

    def __missing__(self, code: int) -> str:
        if code < 0x20 or code == 0x7F:
            shown = f"^{chr(code ^ 0x40)}"
        elif 0x80 <= code < 0xA0 or code in _BIDI or 0xD800 <= code < 0xE000 or 0xE0000 <= code < 0xE0080:
            shown = f"<U+{code:04X}>"
        else:
            shown = chr(code)
        if len(self) < 4096:
            self[code] = shown
        return shown


_TEXT = _Shown({10: "\n", 9: "\t", 13: "", 0x2028: "\n", 0x2029: "\n"})
_LINE = _Shown({10: " ", 9: " ", 13: "", 0x2028: " ", 0x2029: " "})


def printable(text: str) -> str:
    """``text`` with lines and tabs as they are, and without what a terminal acts upon.

    Control characters, half characters, and those that turn the direction of writing around are shown by
    their names, such as ``^[`` for Escape; carriage returns are left out.
    """
    return text if text.isprintable() else text.translate(_TEXT)


def printable_line(text: str, limit: int = MAX_LINE) -> str:
    """As `printable`, in one line of at most ``limit`` characters."""
    line = text if text.isprintable() else text[: 4 * limit].translate(_LINE)
    line = " ".join(line.split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def printable_json(text: str) -> str:
    """JSON with such characters escaped: it says the same."""
    if text.isprintable():
        return text
    return "".join(
        character if character == "\n" or _TEXT[ord(character)] == character else _escaped(character)
        for character in text
    )


def _escaped(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))
