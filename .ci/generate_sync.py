"""Writes swarmcore/sync/faces.py: the public methods of the asynchronous classes, so that they wait.

Run it (``make sync``) after a change of their signatures; a test compares what is there with what it makes.
"""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from inspect import Parameter
from pathlib import Path
from types import ModuleType
from typing import Any

PLACE = Path(__file__).parents[1] / "swarmcore" / "sync" / "faces.py"

FACES = {
    # name here: (module, name there, base class here, what of it has no face here)
    "Swarm": (
        "swarmcore.client.swarm",
        "Swarm",
        "SwarmFace",
        {"batch_runner", "close", "open_session", "planner"},
    ),
    "Model": (
        "swarmcore.client.generation.model",
        "RemoteModel",
        "Face",
        {"close", "encode", "from_checkpoint", "load"},
    ),
    "Session": (
        "swarmcore.client.generation.token_session",
        "ModelSession",
        "Face",
        {
            "close",
            "embed",
            "open",
            "name_pages",
            "reuse_prefix",
            "step_embedded",
            "send_embedded",
            "receive_embedded",
            "exclusive",
            "sequences",
            "offset",
        },
    ),
    "Chat": ("swarmcore.client.generation.chat", "Chat", "Face", {"close", "generation"}),
    "Text": ("swarmcore.client.generation.stream", "TextStream", "WholeText", {"aclose"}),
    "Generation": (
        "swarmcore.client.generation.generation",
        "Generation",
        "Text",
        {"aclose"},
    ),
    "RemoteGeneration": (
        "swarmcore.client.generation.remote",
        "RemoteGeneration",
        "Text",
        {"aclose"},
    ),
}

# What an annotation there is here, and from a call that gives it to what is given here.
RESULTS = {
    "RemoteModel": ("Model", "Model(self.loop, {})"),
    "Generation": ("Generation", "Generation(self.loop, {})"),
    "RemoteGeneration": ("RemoteGeneration", "RemoteGeneration(self.loop, {})"),
    "BatchGeneration": ("list[str]", "self.loop.run(awaited({}))"),
    "ModelSession": ("Session", "Session(self.loop, self.loop.run({}.open()))"),
    "Chat[Generation]": ("Chat", "Chat(self.loop, {})"),
    "Chat[RemoteGeneration]": ("Chat", "Chat(self.loop, {})"),
    "AsyncGenerator[str, None]": ("Pieces[str]", "Pieces(self.loop, {})"),
}
ARGUMENTS = {
    "ModelSession | None": ("Session | None", "{0}.asynchronous if {0} is not None else None"),
}
WORDS = {"async for": "for", "async with": "with", "or await it whole": "or take `text`"}
"""Of docstrings."""

STARS: dict[Any, str] = {Parameter.VAR_POSITIONAL: "*", Parameter.VAR_KEYWORD: "**"}

SETTABLE = {"tokenizer", "generation_config", "messages"}

HEAD = '''"""The synchronous classes, made of the asynchronous ones by .ci/generate_sync.py: change those."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

from swarmcore.loop_thread import background_loop
from swarmcore.sync.waiting import Face, Pieces, SwarmFace, WholeText, awaited

if TYPE_CHECKING:
'''


class Writer:
    """Source of all faces, and what their annotations need to be imported."""

    def __init__(self) -> None:
        self.imports: set[str] = set()
        self.bodies = [self.connect(), *(self.face(name) for name in FACES)]

    def source(self) -> str:
        lines = [f"    {line}\n" for line in sorted(self.imports)]
        return HEAD + "".join(lines) + "\n\n" + "\n\n".join(self.bodies)

    def connect(self) -> str:
        function = import_module("swarmcore.client.swarm").connect
        parameters, arguments, _ = self.parameters(function)
        return (
            f"def connect({parameters}) -> Swarm:\n"
            '    """As `swarmcore.connect`. Close it in the end, or use it as a context manager; else it is\n'
            '    closed when the process ends."""\n'
            f"    from swarmcore.client import swarm\n\n"
            f"    async def joined() -> _swarm.Swarm:\n"
            f"        return await swarm.connect({arguments})\n\n"
            f"    loop = background_loop()\n"
            f"    return Swarm(loop, loop.run(joined()))\n"
        )

    def face(self, name: str) -> str:
        module, there, base, left_out = FACES[name]
        cls = _class(name)
        package, _, last = module.rpartition(".")
        self.imports.add(f"from {package} import {last} as _{last}")
        kind = f"_{last}.{there}" if there != "Chat" else f"_{last}.{there}[Any]"
        doc = f'    """`{_public(module, there)}`, waiting."""'
        parts = [f"class {name}({base}):\n{doc}\n\n    asynchronous: {kind}\n"]
        if base in FACES:
            left_out = left_out | {member for member, _ in _members(_class(base))}
        for member, value in _members(cls):
            if member not in left_out:
                parts.append(self.member(cls, member, value))
        return "\n".join(parts)

    def member(self, cls: type, name: str, value: Any) -> str:
        if isinstance(value, property):
            self.need(value.fget, result := value.fget.__annotations__["return"])
            return _property(name, result, inspect.getdoc(value))
        if isinstance(value, str):
            self.need(cls, value)
            return _property(name, value, None, settable=name in SETTABLE)
        parameters, arguments, before = self.parameters(value)
        result, given = self.result(value, f"self.asynchronous.{name}({arguments})")
        body = "".join(f"        {line}\n" for line in (*before, given))
        parameters = f"self, {parameters}" if parameters else "self"
        return f"    def {name}({parameters}) -> {result}:\n{_docstring(inspect.getdoc(value))}{body}"

    def result(self, method: Any, call: str) -> tuple[str, str]:
        result = method.__annotations__["return"]
        waits = inspect.iscoroutinefunction(method)
        here, made = RESULTS.get(result, (result, ""))
        if not made:
            self.need(method, result)
        run = f"self.loop.run({call})" if waits else call
        if not waits and not made:  # on the loop too: what is asked may be in the middle of a change
            run = f"self.loop.call(lambda: {call})"
        given = made.format(run) if made else run
        return here, given if here == "None" else f"return {given}"

    def parameters(self, function: Any) -> tuple[str, str, list[str]]:
        """Of a signature: the parameters here, the arguments there, and what has to be done before."""
        parameters, arguments, before, keyword_only = [], [], [], False
        for name, parameter in inspect.signature(function).parameters.items():
            if name == "self":
                continue
            annotation, passed = parameter.annotation, name
            if annotation in ARGUMENTS:
                annotation, given = ARGUMENTS[annotation]
                passed = "inner"
                before.append(f"inner = {given.format(name)}")
            else:
                self.need(function, annotation)
            stars = STARS.get(parameter.kind, "")
            if parameter.kind is Parameter.KEYWORD_ONLY and not keyword_only:
                parameters.append("*")
            keyword_only |= parameter.kind in (Parameter.KEYWORD_ONLY, Parameter.VAR_POSITIONAL)
            default = "" if parameter.default is Parameter.empty else f" = {parameter.default!r}"
            parameters.append(f"{stars}{name}: {annotation}{default}")
            keyword = parameter.kind is Parameter.KEYWORD_ONLY
            arguments.append(f"{name}={passed}" if keyword else f"{stars}{passed}")
        return ", ".join(parameters), ", ".join(arguments), before

    def need(self, owner: Any, annotation: str) -> None:
        """Import the names in ``annotation`` from where ``owner``'s module has them."""
        module = sys.modules[owner.__module__]
        known = _imported(module)
        for name in set(re.findall(r"(?<![\w.])[A-Za-z_]\w*", re.sub(r'"[^"]*"', "", annotation))):
            place = known.get(name, module.__name__ if hasattr(module, name) else "")
            if place and place != "typing":
                self.imports.add(f"from {place} import {name}" if place != name else f"import {name}")


def _class(name: str) -> type:
    found: type = getattr(import_module(FACES[name][0]), FACES[name][1])
    return found


def _members(cls: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties, and attributes that are declared, of a class and its bases."""
    seen: set[str] = set()
    for each in cls.__mro__:
        if not each.__module__.startswith("swarmcore."):
            continue
        declared = vars(each).get("__annotations__", {})
        for name, value in {**declared, **vars(each)}.items():
            plain = isinstance(value, str | property) or inspect.isfunction(value)
            if not name.startswith("_") and plain and name not in seen:
                seen.add(name)
                yield name, value


def _imported(module: ModuleType) -> dict[str, str]:
    """The names that a module imports, where type checkers see them, too, and from where."""
    names: dict[str, str] = {}
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module != "__future__":
            names |= {alias.name: node.module for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name: alias.name for alias in node.names}
    return names


def _property(name: str, annotation: str, doc: str | None, *, settable: bool = False) -> str:
    text = f"    @property\n    def {name}(self) -> {annotation}:\n{_docstring(doc)}"
    text += f"        return self.asynchronous.{name}\n"
    if settable:
        text += f"\n    @{name}.setter\n    def {name}(self, value: {annotation}) -> None:\n"
        text += f"        self.asynchronous.{name} = value\n"
    return text


def _docstring(doc: str | None) -> str:
    """The first paragraph."""
    if doc is None:
        return ""
    first = doc.split("\n\n")[0].replace("\n", "\n        ")
    for there, here in WORDS.items():
        first = first.replace(there, here)
    close = "\n        " if "\n" in first else ""
    return f'        """{first}{close}"""\n'


def _public(module: str, name: str) -> str:
    import swarmcore

    return f"swarmcore.{name}" if name in swarmcore.__all__ else f"{module}.{name}"


def faces() -> str:
    """What is to be in the file, formatted."""
    ruff = [sys.executable, "-m", "ruff"]
    text = Writer().source()
    for step in (["check", "--select", "I", "--fix", "-q"], ["format", "-q"]):
        command = [*ruff, *step, "--stdin-filename", str(PLACE), "-"]
        text = subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout
    return text


if __name__ == "__main__":
    PLACE.write_text(faces())
