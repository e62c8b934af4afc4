"""Each peer's signed record is a file of its own; everybody looks into the folder now and then."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path

from swarmcore.errors import InputError, ProtocolError, StorageError, UnavailableError
from swarmcore.identity import Identity
from swarmcore.registry.base import Change, Registry, SwarmView
from swarmcore.registry.changes import ChangeFeed, ChangeReader
from swarmcore.registry.gossip.records import RecordIssuer, SignedRecord
from swarmcore.registry.gossip.store import Accepted, Drop, RecordStore
from swarmcore.rpc.node import Node
from swarmcore.tasks import BackgroundTasks
from swarmcore.types import Address, PeerId, ServerInfo, short
from swarmcore.wire.framing import decode_record, encode_record

logger = logging.getLogger(__name__)

VARIABLE = "SWARMCORE_FOLDER"
MAX_FILE = 8192
"""Bytes of a record's file above which it is not read."""
MAX_FILES = 10_000
"""Files of the folder that are looked at."""

Stamp = tuple[int, int]
"""When a file was written, and its size: a file whose stamp is the same is not read again."""


def folder_registry(node: Node, bootstrap: Sequence[Address], *, member: bool) -> Registry:
    """The registry of ``node`` in the folder that ``SWARMCORE_FOLDER`` names, for ``--registry folder``.

    Nobody has to be dialled to join, so the bootstrap addresses only say which transports a client has.
    """
    folder = os.environ.get(VARIABLE)
    if not folder:
        raise InputError(f"the registry folder needs a folder that all peers share; name it in {VARIABLE}")
    return FolderRegistry(node.identity, Path(folder), allowed=node.allowed_peers)


class FolderRegistry(Registry):
    """Records in ``folder``, looked at every ``interval`` seconds.

    The folder is not trusted: records are signed by their owners, and checked, expired and bounded by the
    `RecordStore` that the other registries have as well. Clocks may differ by 30 s.
    """

    def __init__(
        self,
        identity: Identity,
        folder: Path,
        *,
        interval: float = 1.0,
        allowed: Collection[PeerId] | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self.peer = identity.peer
        self.folder = folder
        self._interval = interval
        self._now = wall_clock
        self._issuer = RecordIssuer(identity, wall_clock)
        self._store = RecordStore(own=identity.peer, allowed=allowed)
        self._feed = ChangeFeed()
        self._tasks = BackgroundTasks()
        self._stamps: dict[str, Stamp] = {}
        self._announced: tuple[ServerInfo, float] | None = None
        self._refresh_at = 0.0
        self._closed = False

    def __repr__(self) -> str:
        return f"<FolderRegistry {short(self.peer)} in {self.folder} {self._store!r}>"

    async def start(self) -> None:
        """Look into the folder, which is made if need be. Raise `StorageError` when that cannot be done."""
        if self._closed:
            raise UnavailableError("this registry is closed")
        try:
            await asyncio.to_thread(self.folder.mkdir, parents=True, exist_ok=True)
            await self._look()
        except OSError as exc:
            raise StorageError(
                f"the shared folder {self.folder} cannot be used: {exc.strerror or exc}"
            ) from exc
        self._tasks.start(self._follow(), "shared folder")

    async def close(self) -> None:
        self._closed = True
        self._feed.close()
        await self._tasks.close()

    def view(self) -> SwarmView:
        return self._store.view()

    def changes(self) -> ChangeReader:
        return self._feed.reader()

    async def announce(self, info: ServerInfo, ttl: float) -> None:
        if self._closed:
            raise UnavailableError("this registry is closed")
        record = self._issuer.announce(info, ttl)
        self._announced = (info, ttl)
        self._refresh_at = self._now() + ttl / 3
        await self._publish(record)

    async def withdraw(self) -> None:
        if self._announced is not None:
            self._announced = None
            await self._publish(self._issuer.withdraw())

    async def _publish(self, record: SignedRecord) -> None:
        if self._take(record) is Drop.REPLAYED:  # the clock was set back
            self._store.forget_sequence(self.peer)
            self._take(record)
        try:
            await asyncio.to_thread(self._write, record)
        except OSError as exc:
            raise StorageError(f"cannot write into {self.folder}: {exc.strerror or exc}") from exc

    def _write(self, record: SignedRecord) -> None:
        part = self.folder / f".{self.peer}.{os.getpid()}.part"
        part.write_bytes(encode_record(record))
        part.replace(self.folder / self.peer)  # all at once: nobody reads half a record

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            try:
                await self._look()
                if self._announced is not None and self._now() >= self._refresh_at:
                    await self.announce(*self._announced)
            except (OSError, StorageError) as exc:
                logger.warning("the shared folder cannot be used now: %s", exc)

    async def _look(self) -> None:
        for record in await asyncio.to_thread(self._read_news):
            self._take(record)
        self._tell(self._store.expire(self._now()))

    def _read_news(self) -> list[SignedRecord]:
        """The records that are new or were written again since the last look."""
        found: list[SignedRecord] = []
        stamps: dict[str, Stamp] = {}
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if len(stamps) == MAX_FILES:
                    break
                if entry.name.startswith("."):
                    continue
                status = entry.stat(follow_symlinks=False)
                stamps[entry.name] = stamp = (status.st_mtime_ns, status.st_size)
                if self._stamps.get(entry.name) == stamp or stamp[1] > MAX_FILE:
                    continue
                try:
                    found.append(decode_record(Path(entry.path).read_bytes(), SignedRecord))
                except ProtocolError as exc:
                    logger.debug("%s is no record: %s", entry.path, exc)
        self._stamps = stamps
        return found

    def _take(self, record: SignedRecord) -> Accepted | Drop:
        outcome = self._store.apply(record, self._now())
        if isinstance(outcome, Accepted) and outcome.change is not None:
            self._tell([outcome.change])
        return outcome

    def _tell(self, changes: Iterable[Change]) -> None:
        for change in changes:
            self._feed.publish(change)
