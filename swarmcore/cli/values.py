"""Values of options that click does not know by itself."""

from __future__ import annotations

import re
from collections.abc import Sequence

from swarmcore.errors import InputError

_FACTORS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_BYTES = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]?)(?:i?B)?", re.IGNORECASE)


def parse_bytes(option: str, text: str) -> int:
    """A number of bytes: ``"1048576"``, ``"512M"``, ``"1.5 GiB"``. Raise `InputError`."""
    match = _BYTES.fullmatch(text.strip())
    if match is None:
        raise InputError(f"{option} {text!r} is no number of bytes; expected such as 512M or 2G")
    return int(float(match[1]) * _FACTORS[match[2].upper()])


def parse_numbers(option: str, text: str) -> tuple[int, ...]:
    """Numbers above 0, each once, from the form ``"1,3"``. Raise `InputError`."""
    try:
        numbers = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise InputError(f"{option} {text!r} is not a list of numbers above 0, such as 1,3")
    return numbers


def parse_named_paths(option: str, values: Sequence[str]) -> dict[str, str]:
    """Paths by their names, from values of the form ``NAME=PATH``. Raise `InputError`."""
    found: dict[str, str] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not equals or not name or not path:
            raise InputError(f"{option} {value!r} is not of the form NAME=PATH")
        if name in found:
            raise InputError(f"{option} names two adapters {name!r}")
        found[name] = path
    return found
