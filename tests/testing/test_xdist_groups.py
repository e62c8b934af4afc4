"""Tests that share fixtures are run by one process, also with several."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import xdist_groups

CONFTEST = """
import xdist_groups

def pytest_xdist_make_scheduler(config, log):
    return xdist_groups.scheduler(config, log)
"""
TESTS = "import pytest\n\n@pytest.mark.parametrize('number', range(6))\ndef test_it(number): ...\n"


def test_folders_with_servers_are_one_group_each_and_others_are_files() -> None:
    for folder in ("tests/chaos/", "tests/e2e/"):
        assert xdist_groups.group_of(f"{folder}test_it.py::test_it") == folder
    assert xdist_groups.group_of("tests/wire/test_it.py::TestIt::test_it[1]") == "tests/wire/test_it.py"


def test_what_takes_longest_begins() -> None:
    dear = ["tests/client/test_a.py", "tests/transports/test_b.py", "tests/client/test_c.py"]
    groups = ["tests/e2e/", "short", *dear, "tests/chaos/", "long"]
    groups.sort(key=lambda group: xdist_groups.order(group, {"long"}))
    assert [*groups[:3], groups[-1]] == ["tests/chaos/", "tests/e2e/", "long", "short"]
    assert set(groups[3:-1]) == set(dear)


def test_no_group_is_split_among_processes(tmp_path: Path) -> None:
    """With the pytest and the pytest-xdist that are installed."""
    names = ["tests/chaos/test_a.py", "tests/chaos/test_b.py", "tests/test_c.py", "tests/test_d.py"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(TESTS)
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {Path(xdist_groups.__file__).parent}\n")
    options = ("--import-mode=importlib", "-p", "no:cacheprovider", "-v")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n2", "--dist=loadgroup", *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    ran: dict[str, set[str]] = {}
    for worker, nodeid in re.findall(r"\[(gw\d)\].* PASSED (\S+)", done.stdout):
        ran.setdefault(xdist_groups.group_of(nodeid), set()).add(worker)
    assert ran.keys() == {"tests/chaos/", *names[2:]}
    assert all(len(workers) == 1 for workers in ran.values()), done.stdout
