"""The list of a closed swarm's peers in a file, read again whenever it changes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from pathlib import Path

from swarmcore.errors import AddressError, InputError
from swarmcore.identity import public_key
from swarmcore.registry.base import Registry
from swarmcore.rpc.node import Node
from swarmcore.types import PeerId

logger = logging.getLogger(__name__)

INTERVAL = 2.0
"""Seconds between two looks at the file."""

MAX_BYTES = 2**20

Stamp = tuple[int, int, int]


class AllowFile:
    """Peer ids in a file, one a line; what follows a # is a remark. ``always`` are allowed besides.

    Raise `InputError` when it cannot be read at the start; a later version that cannot is passed over, with a
    warning, and the list stays as it was.
    """

    def __init__(self, path: Path, always: Collection[PeerId] = ()) -> None:
        self.path = path
        self._always = frozenset(always)
        self._stamp: Stamp | None = None
        self.peers: frozenset[PeerId] = frozenset()
        self.read()

    def read(self) -> bool:
        """Read it if it has changed; return whether it has. Raise `InputError` when it cannot be read."""
        try:
            status = self.path.stat()
            stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
            if stamp == self._stamp:
                return False
            self._stamp = stamp
            if status.st_size > MAX_BYTES:
                raise InputError(f"the list of peers {self.path} is larger than {MAX_BYTES} bytes")
            text = self.path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            reason = exc.strerror if isinstance(exc, OSError) else "it is no text"
            raise InputError(f"the list of peers {self.path} cannot be read: {reason}") from exc
        before, self.peers = self.peers, self._always | parse(text, str(self.path))
        return before != self.peers

    async def follow(self, node: Node, registry: Registry) -> None:
        """Tell ``node`` and ``registry`` of every change; never ends."""
        wrong = ""
        while True:
            await asyncio.sleep(INTERVAL)
            try:
                changed = await asyncio.to_thread(self.read)
            except InputError as exc:
                if str(exc) != wrong:
                    wrong = str(exc)
                    logger.warning("%s; the list stays as it was", exc)
                continue
            wrong = ""
            if changed:
                node.allow_only(self.peers)
                registry.allow_only(self.peers)
                logger.info("%d peers are allowed now, as %s says", len(self.peers), self.path)


def parse(text: str, where: str) -> frozenset[PeerId]:
    """The peer ids in ``text``. Raise `InputError`, with the line, for what is none."""
    found = set()
    for number, line in enumerate(text.splitlines(), 1):
        if peer := line.partition("#")[0].strip():
            try:
                public_key(peer)
            except AddressError as exc:
                raise InputError(f"{where}, line {number}: {exc}") from exc
            found.add(PeerId(peer))
    return frozenset(found)
