from __future__ import annotations

from collections.abc import Callable

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from swarmcore.identity import Identity


@pytest.fixture
def identity_of() -> Callable[[int], Identity]:
    """The same identity for the same number, in every run."""
    return lambda number: Identity(Ed25519PrivateKey.from_private_bytes(number.to_bytes(32, "little")))
