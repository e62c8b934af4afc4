"""Where models are kept on disk: the cache folder, room on the disk, locks between processes, whole files."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock, get_ident

from filelock import FileLock, Timeout

from swarmcore.errors import StorageError
from swarmcore.types import Progress


def cache_folder(cache_dir: Path | None = None) -> Path:
    """``cache_dir``, or ``$SWARMCORE_CACHE``, or ``~/.cache/swarmcore``. It need not exist yet.

    Raise `StorageError` where that is in the home of somebody who has none.
    """
    folder = cache_dir or os.environ.get("SWARMCORE_CACHE")
    try:
        if folder:
            return Path(folder).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "swarmcore"
    except RuntimeError as exc:
        raise StorageError(
            f"there is no place for the model cache ({exc}); set SWARMCORE_CACHE to a folder"
        ) from exc


def gigabytes(size: int) -> str:
    """A size as people read it: ``1.5 GB``, ``269 MB``, ``12 bytes``."""
    for factor, unit in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= factor:
            return f"{size / factor:.3g} {unit}" if size < 1000 * factor else f"{size // factor} {unit}"
    return f"{size} bytes"


@contextmanager
def storage_errors(doing: str, path: Path, needed: int = 0) -> Iterator[None]:
    """Translate the operating system's refusals into `StorageError`, with the cause and the cure."""
    try:
        yield
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(doing, path, needed) from exc
        if exc.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise StorageError(
                f"no permission for {doing}: {exc.filename or path}; change its permissions, or set "
                f"SWARMCORE_CACHE to a folder that you may write to"
            ) from exc
        raise StorageError(f"{doing} failed: {exc.strerror or exc}: {exc.filename or path}") from exc


def disk_full(doing: str, path: Path, needed: int = 0) -> StorageError:
    free = free_bytes(path)
    wants = f"needs {gigabytes(needed)}, " if needed else ""
    return StorageError(
        f"the disk is full: {doing} {wants}{gigabytes(free)} is free at {path}; free some space, or set "
        f"SWARMCORE_CACHE to a folder on a larger disk",
        needed=needed,
        free=free,
    )


def free_bytes(path: Path) -> int:
    """Free space on the disk that holds ``path``, which need not exist yet."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def check_room(doing: str, path: Path, needed: int) -> None:
    """Raise `StorageError` when the disk of ``path`` has less than ``needed`` bytes free."""
    if needed > free_bytes(path):
        raise disk_full(doing, path, needed)


@contextmanager
def locked(target: Path, cache: Path, waiting: str, progress: Progress) -> Iterator[None]:
    """Hold the lock of ``target`` among all processes that use this cache folder.

    Waits for as long as another process holds it, calling ``progress(waiting, 0, 0)`` every second. The
    operating system drops the lock of a process that dies.
    """
    key = hashlib.sha256(os.fsencode(target.resolve())).hexdigest()[:32]
    path = cache / "locks" / f"{key}.lock"
    with storage_errors("creating a lock file", path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        while True:
            try:
                lock.acquire(timeout=1, poll_interval=0.05)
                break
            except Timeout:
                progress(waiting, 0, 0)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder beside ``target`` that takes its name when the block ends well, and else is removed.

    The caller holds the lock of ``target``: what an earlier process left behind is removed first.
    """
    part = target.with_name(f".{target.name}.part")
    with storage_errors("creating a folder", part):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    try:
        yield part
        with storage_errors("renaming a folder", target):
            part.rename(target)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def write_file(path: Path, content: bytes | memoryview, *, durable: bool = False) -> None:
    """Put ``content`` in place of what the file was, all or nothing. Raise `OSError`.

    Folders on the way are made. With ``durable`` it has reached the disk when this returns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}-{get_ident()}.part")
    try:
        with part.open("wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def save_file(path: Path, content: bytes | memoryview) -> None:
    """`write_file`, durably, for what somebody wants kept. Raise `StorageError` when it cannot be written."""
    try:
        write_file(path, content, durable=True)
    except OSError as exc:
        raise StorageError(f"{path} could not be written: {exc}") from exc


def no_progress(what: str, done: int, total: int) -> None:
    """The `Progress` of a caller who gave none."""


class ProgressCounter:
    """Adds up what several threads have done of one piece of work."""

    def __init__(self, what: str, total: int, progress: Progress | None) -> None:
        self.what, self.total, self.done = what, total, 0
        self.progress = progress or no_progress
        self._guard = Lock()

    def add(self, count: int) -> None:
        with self._guard:
            self.done += count
            self.progress(self.what, min(self.done, self.total), self.total)
