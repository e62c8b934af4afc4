"""A span is loaded in a process of its own before it is loaded here: llama.cpp aborts on some files.

Its checks of a model's numbers are assertions, which end the process, and it does not have all that are
needed. What it makes of a file depends on the metadata and the shapes alone, so a trial that was passed is
remembered for these and for the version of the library.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from swarmcore.checkpoint.gguf_header import read_header
from swarmcore.checkpoint.storage import cache_folder, storage_errors, write_file
from swarmcore.errors import CheckpointError, ServerMemoryError, SwarmError
from swarmcore.executor.ggml.library import library
from swarmcore.executor.ggml.span_model import ModelSettings, SpanModel
from swarmcore.printable import printable_line
from swarmcore.types import Progress

logger = logging.getLogger(__name__)

_SECONDS = 60.0
_BYTES_PER_SECOND = 20e6
"""At which the slowest disk reads."""
_LOOK_EVERY = 0.2
_CRASHES = frozenset({signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL})

_passed: set[str] = set()


def try_span(path: Path, settings: ModelSettings, entrance: str | None, progress: Progress) -> None:
    """Raise `CheckpointError` where llama.cpp would end this process, or never end, as it loads the span.

    Returns at once when that was tried before. Other errors are left to who loads it. Blocks.
    """
    key = _key(path, settings)
    record = cache_folder() / "tested" / key
    if key in _passed or record.is_file():
        return
    limit = _SECONDS + path.stat().st_size / _BYTES_PER_SECOND
    try:
        status, said = _run(path, settings, entrance, limit, progress)
    except OSError as exc:
        logger.warning("llama.cpp is not tried in a process of its own, which cannot be started: %s", exc)
        return
    if status is None or status == -signal.SIGALRM:
        raise _unusable(path, f"it has not loaded it in {limit:.0f} s")
    if status == -signal.SIGKILL:
        raise ServerMemoryError(
            f"a process that loaded {path.name} was killed, most likely for want of memory: hold fewer blocks"
        )
    if -status in _CRASHES:
        last = next((line.rpartition(": ")[2] for line in said if "ASSERT" in line), None)
        why = printable_line(last[:200]) if last else signal.Signals(-status).name
        raise _unusable(path, f"its process ends with {why}")
    if status == 0:
        _passed.add(key)
        with suppress(OSError, SwarmError):  # then it is tried again next time
            write_file(record, b"")


def _run(
    path: Path, settings: ModelSettings, entrance: str | None, limit: float, progress: Progress
) -> tuple[int | None, list[str]]:
    """How the process has ended, None for one that does not end, and what it had to say."""
    how = settings.device.name, settings.cache_dtype, "repacked" if settings.repacked else ""
    arguments = [str(path), *how, entrance or "", str(math.ceil(limit))]
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "GGML_NO_BACKTRACE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", __name__, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | environment,
        start_new_session=True,  # Ctrl-C is for this process
    )
    ends = time.monotonic() + limit
    with process:
        try:
            while time.monotonic() < ends:
                with suppress(subprocess.TimeoutExpired):
                    _, said = process.communicate(timeout=_LOOK_EVERY)
                    return process.returncode, said.decode(errors="replace").splitlines()
                progress(f"trying how llama.cpp loads {path.name}", 0, 0)  # raises when nobody waits any more
            return None, []
        finally:
            process.kill()


def _unusable(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"llama.cpp cannot load {path.name}: {why}; the metadata of the model is damaged, or not for this "
        f"version of it (--executor torch does without llama.cpp)"
    )


def _key(path: Path, settings: ModelSettings) -> str:
    with storage_errors("opening a span's weights", path), path.open("rb") as file:

        def read(start: int, end: int) -> bytes:
            file.seek(start)
            return file.read(end - start)

        header = read_header(read, path.stat().st_size, path.name)
        first = min(tensor.start for tensor in header.tensors.values())
        hashed = hashlib.sha256(read(0, first))
    device = settings.device
    how = library().version, device.name, device.description, settings.cache_dtype, settings.repacked
    hashed.update(repr(how).encode())
    return f"llama.cpp-{hashed.hexdigest()}"


def _main() -> None:
    path, device, cache_dtype, repacked, entrance, limit = sys.argv[1:]
    signal.alarm(int(limit))  # also when nobody waits any more
    llama = library()
    settings = ModelSettings(
        device=llama.device(device), threads=1, cache_dtype=cache_dtype, repacked=bool(repacked)
    )
    SpanModel(llama, Path(path), settings, entrance or None).close()


if __name__ == "__main__":
    _main()
