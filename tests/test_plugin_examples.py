"""The worked plugins are installed as anyone would install them, and found and used from there."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PARTS = {
    "transport_plugin": "order or half_close or abort or killed or another_peer or noise or taken or slow",
    "registry_plugin": "by_name or mouth or order or withdraw or dead_peer or slow",
    "executor_plugin": "by_name or torch or refused or batch or rollback or exported or span",
}
"""Of each plugin's own tests those that take little time."""


async def _run(*command: str, path: Path, cwd: Path) -> str:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", *command),
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(path)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(), 120)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, output.decode()
    return output.decode()


@pytest.mark.parametrize("example", PARTS)
async def test_the_example_plugin_installs_and_keeps_the_contract(example: str, tmp_path: Path) -> None:
    if example == "executor_plugin":
        pytest.importorskip("torch")
    source = shutil.copytree(
        EXAMPLES / example, tmp_path / "source", ignore=shutil.ignore_patterns("build", "*.egg-info")
    )
    site = tmp_path / "site"
    await _run(
        *("pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"),
        *("--target", str(site), str(source)),
        path=tmp_path,
        cwd=tmp_path,
    )
    shutil.rmtree(next(source.glob("swarmcore_*")))  # the tests use what was installed
    report = await _run(
        *("pytest", "-q", "-p", "no:cacheprovider", "-k", PARTS[example], str(source)),
        path=site,
        cwd=source,
    )
    assert " passed" in report
    assert " failed" not in report
