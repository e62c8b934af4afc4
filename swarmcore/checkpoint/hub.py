"""Which commit of a hub's model is meant, and what files it has; remembered, so as to work offline later."""

from __future__ import annotations

import hashlib
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

import msgspec
from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import (
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers

from swarmcore.checkpoint.base import one_line
from swarmcore.checkpoint.download import HTTPError, RemoteFile
from swarmcore.checkpoint.storage import storage_errors, write_file
from swarmcore.errors import CheckpointError, ModelNotFoundError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

log = logging.getLogger(__name__)

_SHA1 = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TIMEOUT = 10.0


class HubFile(msgspec.Struct, frozen=True):
    """A file of a repository, as the hub lists it."""

    size: int
    blob: str
    """Its git blob id; of large files, that of the pointer to them."""
    sha256: str | None
    """Listed for large files only."""


class Repository(msgspec.Struct, frozen=True):
    """One commit of a model's repository."""

    model: str
    commit: str
    files: dict[str, HubFile]
    """The files of its top folder, and weights in folders below it."""

    def remote(self, file: str, endpoint: str | None = None) -> RemoteFile:
        """Where to download ``file``."""
        url = hf_hub_url(self.model, file, revision=self.commit, endpoint=endpoint)
        return RemoteFile(url, build_hf_headers(library_name="swarmcore"), self.files[file].size)

    def check(self, file: str, content: bytes) -> None:
        """Raise `CheckpointError` unless ``content`` is what the hub lists for ``file``."""
        listed = self.files[file]
        if listed.sha256 is not None:
            good = hashlib.sha256(content).hexdigest() == listed.sha256
        else:
            git = hashlib.sha1(b"blob %d\0" % len(content), usedforsecurity=False)
            git.update(content)
            good = git.hexdigest() == listed.blob
        if not good:
            raise CheckpointError(
                f"{file} of {self.model} was damaged on its way: its hash is not the one the hub lists"
            )


def hub_folder(cache: Path, endpoint: str | None) -> Path:
    """Where what comes from this hub is kept: what a mirror sent is never taken for what another hub has."""
    return cache / "hub" / quote(urlsplit(endpoint or constants.ENDPOINT).netloc, safe="")


def repository_folder(model: str, cache: Path, endpoint: str | None) -> Path:
    return hub_folder(cache, endpoint) / f"models--{model.replace('/', '--')}"


def resolve(model: str, revision: str | None, cache: Path, endpoint: str | None = None) -> Repository:
    """Ask the hub which commit ``revision`` (default: its main branch) is, and list its files.

    When the hub cannot be reached, what it said last time is taken; a commit that is known already is not
    asked for at all. Raise `ModelNotFoundError` when there is no such model or revision, or no telling.
    """
    folder = repository_folder(model, cache, endpoint)
    ref = folder / "refs" / quote(revision or "main", safe="")
    if revision and _SHA1.fullmatch(revision) and (known := _recall(folder, revision)):
        return known
    try:
        found = _ask(model, revision, endpoint)
    except (HTTPError, OfflineModeIsEnabled, ValueError, TypeError, KeyError) as exc:
        if known := _recall(folder, _read_ref(ref)):
            log.warning("the hub cannot be reached, taking %s as of commit %s", model, known.commit[:12])
            return known
        raise ModelNotFoundError(
            f"there is no folder {model} here, and the hub {endpoint or constants.ENDPOINT} cannot be asked "
            f"for it ({one_line(exc)}); check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or download "
            f"the model elsewhere and name its folder"
        ) from exc
    with storage_errors(f"remembering {model}", folder):
        write_file(_listing(folder, found.commit), msgspec.json.encode(found))
        write_file(ref, found.commit.encode())
    return found


def _ask(model: str, revision: str | None, endpoint: str | None) -> Repository:
    hub = endpoint or constants.ENDPOINT
    api = HfApi(endpoint=endpoint, library_name="swarmcore")
    try:
        info = api.model_info(model, revision=revision, timeout=_TIMEOUT, files_metadata=True)
    except RevisionNotFoundError as exc:
        raise ModelNotFoundError(f"{model} has no branch, tag or commit {revision!r} on {hub}") from exc
    except RepositoryNotFoundError as exc:
        raise ModelNotFoundError(
            f"there is no folder {model} here, and no model of that name on {hub}; if it is private or "
            f"gated, accept its terms there and set HF_TOKEN"
        ) from exc
    except HFValidationError as exc:
        raise ModelNotFoundError(
            f"{model!r} is neither a folder nor a hub id (org/name): {one_line(exc)}"
        ) from exc
    if not info.sha or not _SHA1.fullmatch(info.sha):
        raise ValueError("its answer names no commit")
    used = [file for file in info.siblings or () if _is_used(file.rfilename)]
    return Repository(model, info.sha, {file.rfilename: _listed(file) for file in used})


def _is_used(file: str) -> bool:
    return Path(file).name == file or file.endswith((".safetensors", ".gguf"))


def _listed(file: RepoSibling) -> HubFile:
    """What the hub says of a file, checked: the hashes become names of files here."""
    found = HubFile(file.size or 0, file.blob_id or "", file.lfs.sha256 if file.lfs else None)
    if found.size < 0 or not _SHA1.fullmatch(found.blob) or not _SHA256.fullmatch(found.sha256 or "0" * 64):
        raise ValueError(f"its answer has no valid size and hash for {file.rfilename}")
    return found


def _listing(folder: Path, commit: str) -> Path:
    return folder / "snapshots" / f"{commit}.json"


def _recall(folder: Path, commit: str) -> Repository | None:
    try:
        return msgspec.json.decode(_listing(folder, commit).read_bytes(), type=Repository)
    except (OSError, msgspec.DecodeError):
        return None


def _read_ref(ref: Path) -> str:
    try:
        return ref.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
