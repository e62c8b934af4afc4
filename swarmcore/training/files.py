"""Files that are replaced as a whole."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from swarmcore.errors import StorageError


def write_file(path: Path, content: bytes | memoryview) -> None:
    """Put ``content`` in place of what the file was, or leave it as it is and raise `StorageError`.

    Folders on the way are made. It has reached the disk when this returns.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as exc:
        raise StorageError(f"{path} could not be written: {exc}") from exc
    finally:
        with suppress(OSError):
            part.unlink()
