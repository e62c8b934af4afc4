"""The torch backend: checkpoints, spans of blocks, ragged attention."""

from importlib.util import find_spec

from swarmcore.distribution import install_command
from swarmcore.errors import MissingExtraError
from swarmcore.imports import import_large


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ValueError:  # in `sys.modules` without a spec
        return False


_missing = [name for name in ("torch", "transformers", "safetensors", "tokenizers") if not _installed(name)]
if _missing:
    raise MissingExtraError(
        f"running a model, or a part of one, needs {', '.join(_missing)}: {install_command('torch')}"
    )

import_large("torch")
