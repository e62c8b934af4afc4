"""Identities kept on disk: one for each name of a peer on this machine, each for one process at a time."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from swarmcore.errors import IdentityFileError, IdentityInUseError
from swarmcore.identity import Identity

if sys.platform != "win32":
    import fcntl

VARIABLE = "SWARMCORE_DATA"
"""Names the folder in which identities are kept."""

MAX_OF_A_NAME = 64
"""Processes of one name on one machine that get an identity each."""

_PAUSE = 0.05


def identities_folder() -> Path:
    """``identities`` in ``$SWARMCORE_DATA``, else in ``$XDG_DATA_HOME/swarmcore`` or
    ``~/.local/share/swarmcore``.

    Raise `IdentityFileError` where there is no home to put it in.
    """
    named = os.environ.get(VARIABLE)
    try:
        data = Path(named or os.environ.get("XDG_DATA_HOME") or "~/.local/share").expanduser()
    except RuntimeError as exc:
        raise IdentityFileError(
            f"there is no place to keep an identity ({exc}); set {VARIABLE} to a folder, or name a file with "
            f"--identity"
        ) from exc
    return (data if named else data / "swarmcore") / "identities"


class LockedIdentity:
    """An identity from a file that no other process uses as long as this one holds it."""

    def __init__(self, path: str | Path, *, patience: float = 0.0) -> None:
        """Read the key in ``path``, or create it.

        Raise `IdentityInUseError` when another process still holds it after ``patience`` seconds, for which
        this blocks, and as `Identity.load_or_create` does.
        """
        self.identity = Identity.load_or_create(path)
        self.path = Path(path).expanduser()
        for _ in range(int(patience / _PAUSE)):
            try:
                self._lock = _lock(self.path)
                return
            except IdentityInUseError:
                time.sleep(_PAUSE)
        self._lock = _lock(self.path)

    def release(self) -> None:
        """Let other processes use it. Harmless when repeated."""
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.release()


def stored_identity(name: str = "") -> LockedIdentity:
    """The identity kept for peers called ``name`` on this machine: the first that no other process uses.

    Created on first use, in `identities_folder`, for its owner alone. Raise `IdentityFileError` when that
    cannot be.
    """
    for number in range(1, MAX_OF_A_NAME + 1):
        with contextlib.suppress(IdentityInUseError):
            return LockedIdentity(identity_path(name, number))
    raise IdentityFileError(
        f"{MAX_OF_A_NAME} processes called {name or 'default'!r} run here; give this one another name, or a "
        f"file of its own with --identity"
    )


def identity_path(name: str = "", number: int = 1) -> Path:
    """Where the identity of the ``number``th peer called ``name`` is kept, its folder made if need be.

    Raise `IdentityFileError` where there is no place for it.
    """
    folder = identities_folder()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise IdentityFileError(
            f"there is no place to keep an identity: {folder} cannot be created ({exc.strerror or exc}); set "
            f"{VARIABLE} to a folder, or name a file with --identity"
        ) from exc
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:40] or "default"
    if name and plain != name:  # two names must not share a file
        plain += f"-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:8]}"
    return folder / f"{plain}{f'.{number}' if number > 1 else ''}.pem"


def _lock(path: Path) -> int | None:
    """An open file whose lock ends with this process, however that ends; None where there are no locks."""
    if sys.platform == "win32":
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        os.close(descriptor)
        if exc.errno != errno.EAGAIN:  # a file system without locks
            return None
        raise IdentityInUseError(
            f"identity file {path} is in use by another process: two peers of one identity would take each "
            f"other's place; stop that one, or name another file"
        ) from exc
    return descriptor
