"""Byte ranges of a hub's files over HTTP, through the hub library's own session."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from pathlib import Path
from threading import Event

import attrs
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import get_session

from swarmcore.checkpoint.base import one_line
from swarmcore.checkpoint.storage import ProgressCounter, check_room, locked, storage_errors
from swarmcore.errors import CheckpointError, ModelHubError
from swarmcore.pacing import Backoff

Range = tuple[int, int]
"""Bytes ``start`` to ``end``, the end excluded."""


def union(ranges: Iterable[Range], gap: int = 0) -> list[Range]:
    """The same bytes as few sorted ranges; two that are at most ``gap`` bytes apart become one."""
    merged: list[Range] = []
    for start, end in sorted(ranges):
        if start >= end:
            continue
        if merged and start <= merged[-1][1] + gap:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def difference(wanted: Iterable[Range], have: Iterable[Range]) -> list[Range]:
    """The bytes of ``wanted`` that are not in ``have``."""
    there = union(have)
    missing: list[Range] = []
    at = 0
    for start, end in union(wanted):
        while at < len(there) and there[at][1] <= start:
            at += 1
        here = at
        while here < len(there) and there[here][0] < end:
            if start < there[here][0]:
                missing.append((start, there[here][0]))
            start = there[here][1]
            here += 1
        if start < end:
            missing.append((start, end))
    return missing


def pieces(ranges: Iterable[Range], most: int) -> Iterator[Range]:
    """The same bytes in ranges of at most ``most`` bytes."""
    for start, end in ranges:
        for at in range(start, end, most):
            yield at, min(at + most, end)


def length(ranges: Iterable[Range]) -> int:
    return sum(end - start for start, end in ranges)


HTTPError: type[Exception] = HfHubHTTPError.__bases__[0]
"""What the hub library's HTTP client raises: httpx2's, or httpx's in its older versions."""

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_RETRIED = frozenset({408, 429, 500, 502, 503, 504})
_LONGEST_WAIT = 60.0
_PIECE = 32 * 1024 * 1024
_LOGGED = 8 * 1024 * 1024
_GAP = 16 * 1024
"""Two ranges this near to each other are fetched as one: a request costs more than these bytes."""


@attrs.frozen
class RemoteFile:
    """A file at a URL that never changes, with the size that its hub states."""

    url: str
    headers: dict[str, str] = attrs.field(repr=False)
    size: int


@attrs.frozen
class Downloader:
    """Fetches ranges of files into `SparseFile`s, a few at a time, going on where a connection broke."""

    connections: int = 4
    timeout: float = 30.0
    """Seconds without a byte after which a connection counts as broken."""
    attempts: int = 5
    """How often in a row a request may bring nothing before the download fails."""
    backoff: float = 1.0
    """Seconds before the second attempt; doubled before each further one."""

    def fetch(
        self,
        file: RemoteFile,
        into: SparseFile,
        wanted: Iterable[Range],
        cache: Path,
        report: ProgressCounter,
    ) -> None:
        """Make sure that the ranges ``wanted`` are in ``into``; only what is missing is downloaded.

        Raise `ModelHubError` when the connection keeps breaking or the hub refuses (what has come is kept),
        `CheckpointError` when the file there is not as large as stated, `StorageError` when the disk is full.
        """
        wanted = list(wanted)
        with storage_errors(report.what, into.path):
            if not into.missing(wanted):
                return
        with locked(into.path, cache, f"waiting for another process that is {report.what}", report.progress):
            with storage_errors(report.what, into.path):
                missing = union(into.missing(wanted), _GAP)
            check_room(report.what, into.path, length(missing))
            with storage_errors(report.what, into.path, length(missing)):
                writer = into.write()
            with writer:
                self._fetch_all(file, writer, list(pieces(missing, _PIECE)), report)

    def _fetch_all(
        self, file: RemoteFile, writer: Writer, parts: list[Range], report: ProgressCounter
    ) -> None:
        stop = Event()
        with ThreadPoolExecutor(self.connections, "download") as pool:
            running = [pool.submit(self._fetch_piece, file, writer, part, stop, report) for part in parts]
            try:
                for done in as_completed(running):
                    done.result()
            except BaseException:
                stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _fetch_piece(
        self, file: RemoteFile, writer: Writer, piece: Range, stop: Event, report: ProgressCounter
    ) -> None:
        at, end = piece
        pauses = Backoff(self.backoff, math.inf)
        while at < end:
            begun, wait = at, 0.0
            try:
                at = self._fetch_some(file, writer, (at, end), stop, report)
                reason = "the connection ended early"
            except _BrokenError as exc:
                at, wait, reason = exc.at, exc.retry_after, str(exc)
            if stop.is_set() or at == end:
                return
            if at > begun:
                pauses.reset()
            wait = max(wait, pauses.next())
            if pauses.failures >= self.attempts:
                raise ModelHubError(
                    f"{report.what} failed {pauses.failures} times in a row ({file.url}, byte {at}): "
                    f"{reason}; run it again later, it goes on from there"
                )
            stop.wait(wait)

    def _fetch_some(
        self, file: RemoteFile, writer: Writer, piece: Range, stop: Event, report: ProgressCounter
    ) -> int:
        """Fetch as much of the piece as one request brings; return the position reached."""
        at = logged = piece[0]
        try:
            with closing(self._stream(file, piece)) as stream:
                for data in stream:
                    with storage_errors(report.what, writer.path, report.total - report.done):
                        writer.put(at, data)
                        at += len(data)
                        if at - logged >= _LOGGED:
                            writer.log(logged, at)
                            logged = at
                    report.add(len(data))
                    if stop.is_set():
                        break
        except _BrokenError as exc:
            raise _BrokenError(str(exc), at, exc.retry_after) from exc
        except OfflineModeIsEnabled as exc:
            raise ModelHubError(
                f"{report.what} is not possible in offline mode; unset HF_HUB_OFFLINE"
            ) from exc
        except HTTPError as exc:
            raise _BrokenError(f"{type(exc).__name__}: {one_line(exc)}", at) from exc
        finally:
            with storage_errors(report.what, writer.path):
                writer.log(logged, at)
        return at

    def _stream(self, file: RemoteFile, piece: Range) -> Generator[bytes, None, None]:
        """The bytes of the piece, as they come; fewer when the connection ends early, never more."""
        start, end = piece
        headers = file.headers | {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        with get_session().stream("GET", file.url, headers=headers, timeout=self.timeout) as response:
            _check(file, piece, response.status_code, response.headers)
            left = end - start
            # Without a chunk size: with one, a broken connection would lose the last bytes that came.
            for data in response.iter_raw():
                yield data[:left]
                left -= len(data)
                if left <= 0:
                    return


class _BrokenError(Exception):
    """A request that may work when it is made again."""

    def __init__(self, reason: str, at: int, retry_after: float = 0.0) -> None:
        super().__init__(reason)
        self.at, self.retry_after = at, retry_after


def _check(file: RemoteFile, piece: Range, status: int, headers: dict[str, str]) -> None:
    """Make sure that an answer holds the bytes that were asked for, of the file that was meant."""
    start, end = piece
    if status == 206:
        match = _CONTENT_RANGE.fullmatch(headers.get("content-range", ""))
        if not match or int(match[1]) != start:
            raise ModelHubError(f"{file.url}: the server answered with another range than it was asked for")
        if match[3] != "*" and int(match[3]) != file.size:
            raise _wrong_size(file, int(match[3]))
    elif status == 200:
        if (start, end) != (0, file.size):
            raise ModelHubError(
                f"{file.url}: the server ignores byte ranges, so that a part of the model cannot be had; use "
                f"another mirror (HF_ENDPOINT), or download the whole model and name its folder"
            )
        if (stated := headers.get("content-length")) and int(stated) != file.size:
            raise _wrong_size(file, int(stated))
    elif status == 416:
        raise _wrong_size(file, None)
    elif status in _RETRIED:
        after = headers.get("retry-after", "")
        wait = min(float(after), _LONGEST_WAIT) if after.isdigit() else 0.0
        raise _BrokenError(f"the server answered {status}", start, wait)
    elif status in (401, 403):
        raise ModelHubError(
            f"{file.url}: access denied ({status}); accept the model's terms there, set HF_TOKEN"
        )
    else:
        raise ModelHubError(f"{file.url}: the server answered {status}")


def _wrong_size(file: RemoteFile, actual: int | None) -> CheckpointError:
    has = f"{actual} bytes" if actual is not None else "fewer bytes"
    return CheckpointError(
        f"{file.url} is truncated or damaged: the server has {has}, the hub lists {file.size}",
        actual=actual,
        expected=file.size,
    )


class SparseFile:
    """The part of a file of ``size`` bytes that is here. Methods raise `OSError`."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        self._log = path.with_name(f"{path.name}.ranges")

    def have(self) -> list[Range]:
        """The ranges that are here, as any process has left them."""
        try:
            lines = self._log.read_text("ascii").splitlines()
            held = self.path.stat().st_size
        except FileNotFoundError:
            return []
        return union(found for line in lines if (found := _parse(line)) and found[1] <= min(held, self.size))

    def missing(self, wanted: Iterable[Range]) -> list[Range]:
        return difference(wanted, self.have())

    def read(self, start: int, end: int) -> bytes:
        """Bytes that are here, by `have`."""
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(end - start)

    def discard(self) -> None:
        """Remove it from the disk."""
        self._log.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)

    def write(self) -> Writer:
        """A writer, to be used as a context and from any thread."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return Writer(self.path, self._log)


class Writer:
    """Puts bytes in their place, then logs that they are there."""

    def __init__(self, path: Path, log: Path) -> None:
        self.path = path
        self._data = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        except BaseException:
            os.close(self._data)
            raise

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._data)
        os.close(self._log)

    def put(self, at: int, data: bytes) -> None:
        """Write ``data`` at the position ``at``."""
        view = memoryview(data)
        while view:
            written = os.pwrite(self._data, view, at)
            view, at = view[written:], at + written

    def log(self, start: int, end: int) -> None:
        """Note that ``start`` to ``end`` is there. One short appended line: whole, or not there at all."""
        if start < end:
            os.fsync(self._data)
            os.write(self._log, f"\n{start} {end} .\n".encode("ascii"))


def _parse(line: str) -> Range | None:
    # The dot shows that the line was written to its end.
    match line.split():
        case [start, end, "."] if start.isdigit() and end.isdigit():
            return int(start), int(end)
    return None
