"""swarmcore's contract for transports, on this plugin as it is installed."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest

from swarmcore.identity import Identity
from swarmcore.testing.transport_contract import TransportContract
from swarmcore.transport import Transport, transport_class
from swarmcore.types import Address
from swarmcore.wire.limits import Limits


class TestUnix(TransportContract):
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path) -> None:
        self._paths = (str(tmp_path / f"{number}.sock") for number in itertools.count())

    def make(self, identity: Identity, limits: Limits, listen_on: Sequence[str]) -> Transport:
        return transport_class("unix")(identity, limits=limits, listen_on=listen_on)

    def free_place(self) -> str:
        return next(self._paths)

    async def send_garbage(self, address: Address, data: bytes) -> None:
        reader, writer = await asyncio.open_unix_connection(self.place_of(address))
        with contextlib.suppress(ConnectionError):
            writer.write(data)
            await reader.read()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
