"""Scenarios: files that say what to simulate, and what comes of it."""

from __future__ import annotations

import tomllib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from hashlib import blake2b
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

import attrs
import msgspec

from swarmcore.errors import InputError
from swarmcore.sim.hosts import Geography
from swarmcore.types import JsonDict, Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

ScenarioT = TypeVar("ScenarioT", bound="Scenario")


@attrs.define(kw_only=True)
class Report:
    """What came of a simulation."""

    trace: str
    """Hash of all that happened: equal for equal runs."""
    messages: int
    """That arrived."""
    problems: list[str] = attrs.field(factory=list)
    """What should never happen and did."""
    goals: dict[str, bool] = attrs.field(factory=dict)
    """What was hoped for, and whether it was reached."""
    data: JsonDict = attrs.field(factory=dict)
    """All figures, for programs."""
    tables: list[Table] = attrs.field(factory=list)
    """The same, for people."""
    plot: Callable[[Figure], None] | None = None
    """Draws it into an empty figure."""


@attrs.frozen(kw_only=True)
class Scenario(ABC):
    """What all scenarios say. The fields of a subclass are the keys that its files may have."""

    kind: ClassVar[str]
    unit: ClassVar[str] = "runs"
    """What progress is counted in."""

    title: str = ""
    costs: str = "bloom-7b1-cpu"
    """Measured costs of servers: a name (see `cost_names`) or a file."""
    network: Geography = attrs.field(factory=Geography)

    @abstractmethod
    def simulate(self, seed: int, progress: Progress) -> Report:
        """Run it. Two runs with one ``seed`` are the same, message for message. Progress counts `unit`."""


_RENAMED = {"crowd": "load"}  # scenarios and kinds, by what they were called before 0.2
_RENAMED_KEYS = {"disaster": "mass_failure", "disaster_at": "mass_failure_at"}


def scenario_names() -> list[str]:
    """The scenarios that come with swarmcore."""
    folder = resources.files(__package__).joinpath("scenarios")
    return sorted(
        entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")
    )


def load_scenario(name: str, kinds: Sequence[type[Scenario]]) -> Scenario:
    """Read the scenario in the file ``name``, or one of those that come with swarmcore.

    Raise `InputError`, naming file and key, when it is not there, is no TOML, or says something unknown.
    """
    name = _RENAMED.get(name, name)
    if name in scenario_names():
        text = resources.files(__package__).joinpath("scenarios", f"{name}.toml").read_text(encoding="utf-8")
    else:
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            known = ", ".join(scenario_names())
            raise InputError(
                f"no scenario {name!r}: neither a file that can be read nor one of {known}"
            ) from exc
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise InputError(f"{name} is not TOML: {exc}") from exc
    return parse_scenario(data, kinds, name)


def parse_scenario(data: JsonDict, kinds: Sequence[type[Scenario]], source: str) -> Scenario:
    """What ``data`` from the file ``source`` describes. Raise `InputError` as `load_scenario` does."""
    by_name = {kind.kind: kind for kind in kinds}
    named = data.pop("kind", None)
    named = _RENAMED.get(named, named)
    if named not in by_name:
        raise InputError(f"{source}: kind = {named!r} is none of {', '.join(by_name)}")
    renamed = {_RENAMED_KEYS.get(key, key): value for key, value in data.items()}
    return _structure(by_name[named], renamed, source)


def combined(traces: Sequence[str]) -> str:
    """One hash for several runs."""
    return blake2b("".join(traces).encode(), digest_size=16).hexdigest()


def _structure(cls: type[ScenarioT], data: JsonDict, source: str) -> ScenarioT:
    _refuse_unknown(cls, data, source, "")
    try:
        return msgspec.convert(data, cls, strict=True)
    except InputError as exc:
        raise InputError(f"{source}: {exc.message}") from exc
    except msgspec.ValidationError as exc:
        raise InputError(f"{source}: {exc}") from exc


def _refuse_unknown(cls: Any, data: Any, source: str, path: str) -> None:
    """Records from the network may have unknown fields; in what a person has typed they are mistakes."""
    if not isinstance(data, dict):
        return
    types = get_type_hints(cls)
    known = [field.name for field in attrs.fields(cls)]
    for key, value in data.items():
        if key not in known:
            raise InputError(
                f"{source}: unknown key {path + key!r}; expected one of {', '.join(sorted(known))}"
            )
        inner = types[key]
        if attrs.has(inner):
            _refuse_unknown(inner, value, source, f"{path}{key}.")
        elif get_origin(inner) is tuple and attrs.has(get_args(inner)[0]) and isinstance(value, list):
            for entry in value:
                _refuse_unknown(get_args(inner)[0], entry, source, f"{path}{key}.")
