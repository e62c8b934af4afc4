"""What ``import swarmcore`` gives, and what it does not import."""

from __future__ import annotations

import subprocess
import sys

import pytest

import swarmcore

HEAVY = ("torch", "transformers", "libp2p", "trio", "aiortc", "numpy", "huggingface_hub")


def in_a_fresh_process(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", swarmcore.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(swarmcore, name) is not None
    assert name in dir(swarmcore)


def test_every_name_that_loads_is_listed() -> None:
    assert {*swarmcore._PLACES, "__version__"} == set(swarmcore.__all__)


def test_names_of_the_version_before_still_work() -> None:
    with pytest.warns(DeprecationWarning, match=r"swarmcore\.RemoteGeneration now"):
        assert swarmcore.ThinGeneration is swarmcore.RemoteGeneration


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'conect'"):
        swarmcore.conect  # noqa: B018


def test_importing_it_imports_nothing_heavy() -> None:
    names = "', '".join(HEAVY)
    program = f"import sys, swarmcore; print([m for m in ('{names}') if m in sys.modules])"
    assert in_a_fresh_process(program) == "[]"


def test_what_needs_no_torch_loads_without_it() -> None:
    light = [
        n
        for n in swarmcore.__all__
        if n not in ("BatchGeneration", "Generation", "ModelSession", "RemoteBlocks", "RemoteModel")
    ]
    program = (
        f"import sys, swarmcore; [getattr(swarmcore, n) for n in {light}]; print('torch' in sys.modules)"
    )
    assert in_a_fresh_process(program) == "False"


def test_without_torch_the_error_says_what_to_install() -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "import swarmcore\n"
        "try: swarmcore.RemoteModel\n"
        "except swarmcore.errors.MissingExtraError as exc: print(exc)"
    )
    assert "pip install 'swarmcore-llm[torch]'" in in_a_fresh_process(program)


@pytest.mark.parametrize(
    "command",
    [
        "serve --model somewhere --listen 127.0.0.1:0",
        "convert a.gguf somewhere",
        "bootstrap --serve-head --model somewhere --listen 127.0.0.1:0",
        "bench inference",
    ],
)
def test_commands_without_torch_say_what_to_install(command: str) -> None:
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from swarmcore.cli import main\n"
        f"main({command.split()}, prog_name='swarmcore')"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert ended.stderr.splitlines() == [
        "error: running a model, or a part of one, needs torch: pip install 'swarmcore-llm[torch]'"
    ]
