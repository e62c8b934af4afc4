"""The distribution's name: one, everywhere, and not that of somebody else's program."""

from __future__ import annotations

import re
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path

import swarmcore
from swarmcore.distribution import NAME, install_command, version

ROOT = Path(__file__).parent.parent

INSTALLS_THE_OTHER = re.compile(r"pip install [^\n]*(?<![\w./-])swarmcore(?![\w-])|[\"']swarmcore[\[>=~<]")
"""``pip install swarmcore…``, or a requirement of that name: on an index that is another program."""


def test_one_name_for_project_and_code() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == NAME != "swarmcore"
    own = [one for extra in project["optional-dependencies"].values() for one in extra if "swarmcore" in one]
    assert own
    assert all(one.startswith(f"{NAME}[") for one in own)


def test_the_version_is_that_of_what_is_installed() -> None:
    assert swarmcore.__version__ == version() == metadata.version(NAME)
    assert "swarmcore" in (metadata.distribution(NAME).read_text("top_level.txt") or "").split()


def test_nothing_installs_somebody_elses_program() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    found = []
    for name in listed.stdout.split("\0"):
        file = ROOT / name
        if file.suffix in {".py", ".md", ".toml", ".txt", ""} and file.is_file() and file != Path(__file__):
            found += [(name, hit[0]) for hit in INSTALLS_THE_OTHER.finditer(file.read_text(errors="replace"))]
    assert not found


def test_the_pattern_knows_what_it_looks_for() -> None:
    for wrong in (
        "pip install swarmcore",
        "pip install 'swarmcore[torch]'",
        '"swarmcore>=0.1"',
        "'swarmcore[sim]'",
    ):
        assert INSTALLS_THE_OTHER.search(wrong), wrong
    for right in (install_command("torch"), "pip install '.[torch]'", '"swarmcore-llm>=0.1"'):
        assert not INSTALLS_THE_OTHER.search(right), right
