"""What ``import swarmcore.training`` gives, and what it does not import."""

from __future__ import annotations

import subprocess
import sys

import pytest

import swarmcore.training


@pytest.mark.parametrize("name", swarmcore.training.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(swarmcore.training, name).__module__.startswith("swarmcore.training.")
    assert name in dir(swarmcore.training)


@pytest.mark.parametrize(
    ("program", "printed"),
    [
        ("import sys, swarmcore.training; print('torch' in sys.modules)", "False"),
        (
            "import sys; sys.modules['torch'] = None\n"
            "import swarmcore.errors, swarmcore.training\n"
            "try: swarmcore.training.LoraAdapter\n"
            "except swarmcore.errors.MissingExtraError as exc: print(exc)",
            "running a model, or a part of one, needs torch: pip install 'swarmcore-llm[torch]'",
        ),
    ],
)
def test_torch_is_imported_by_what_needs_it(program: str, printed: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == (printed, "")
