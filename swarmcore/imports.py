"""Importing torch and Transformers in a third less time, in programs that are nothing but swarmcore.

Their half a million objects stay to the end. Python's garbage collector looks through all of them several
times while they are imported, now and then afterwards, and at the end.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import sys
from collections.abc import Callable
from importlib.util import find_spec

from swarmcore.distribution import install_command
from swarmcore.errors import MissingExtraError

_TORCH_EXTRA = ("torch", "transformers", "safetensors", "tokenizers")
_permanent = False


def keep_imports() -> None:
    """From here on, what exists when `import_large` has imported something is taken for permanent.

    Garbage that it turns into, and with it what the program holds at its end, is no longer looked for. That
    is for the program to decide, not for a library in it.
    """
    global _permanent
    if not _permanent:
        _permanent = True
        atexit.register(gc.freeze)


def import_large(*modules: str, progress: Callable[[str, int, int], None] | None = None) -> None:
    """Import ``modules`` without a look for garbage meanwhile, in a program that called `keep_imports`.

    Elsewhere nothing is done: they are imported by those who need them. Where torch is among what is yet to
    be imported, which takes seconds, ``progress`` is told so before. Raise as ``import`` does.
    """
    missing = [module for module in modules if module not in sys.modules]
    if missing and progress is not None and "torch" not in sys.modules and find_spec("torch") is not None:
        progress("loading torch and Transformers", 0, 0)
    if not _permanent or not missing:
        return
    enabled = gc.isenabled()
    gc.disable()
    try:
        for module in missing:
            importlib.import_module(module)
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


def require_torch() -> None:
    """Raise `MissingExtraError` when part of the extra ``torch`` is missing; else `import_large` torch."""
    missing = [name for name in _TORCH_EXTRA if not _is_installed(name)]
    if missing:
        raise MissingExtraError(
            f"running a model, or a part of one, needs {', '.join(missing)}: {install_command('torch')}"
        )
    import_large("torch")


def _is_installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ValueError:  # in `sys.modules` without a spec
        return False
