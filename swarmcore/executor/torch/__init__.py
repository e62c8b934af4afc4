"""The torch back end: spans of blocks, ragged attention."""

from swarmcore.imports import require_torch

require_torch()
