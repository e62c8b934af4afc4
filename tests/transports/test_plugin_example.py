"""The worked plugin is installed as anyone would install it, and found and used from there."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "transport_plugin"
PART_OF_THE_CONTRACT = "order or half_close or abort or killed or another_peer or noise or taken or slow"


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


@pytest.fixture
async def installed(tmp_path: Path) -> tuple[Path, Path]:
    """Where the plugin was installed, and a copy of its folder."""
    source = shutil.copytree(
        EXAMPLE, tmp_path / "source", ignore=shutil.ignore_patterns("build", "*.egg-info")
    )
    target = tmp_path / "site"
    await _run(
        *("pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"),
        *("--target", str(target), str(source)),
        path=tmp_path,
        cwd=tmp_path,
    )
    return target, source


async def test_the_example_plugin_installs_and_keeps_the_contract(installed: tuple[Path, Path]) -> None:
    target, source = installed
    assert (target / "swarmcore_unix").is_dir()
    report = await _run(
        *("pytest", "-q", "-p", "no:cacheprovider", "-k", PART_OF_THE_CONTRACT, str(source)),
        path=target,
        cwd=source,
    )
    assert " passed" in report
