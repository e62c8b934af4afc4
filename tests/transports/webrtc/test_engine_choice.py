"""Which WebRTC implementation a transport takes: aiortc, or one that somebody else has installed."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from swarmcore.errors import InputError

pytest.importorskip("swarmcore_transports.webrtc", reason="needs the extra webrtc")
from memory_engine import MemoryConnection
from webrtc_peers import dialler, echo, exchanged

from swarmcore_transports.webrtc.aiortc.engine import AiortcConnection
from swarmcore_transports.webrtc.engine import ENGINES, connection_class


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine ``memory``, and the entry point ``odd`` that names no engine."""
    targets = {"memory": "memory_engine:MemoryConnection", "odd": "memory_engine:asyncio"}
    entries = [EntryPoint(name, target, ENGINES.entry_points) for name, target in targets.items()]
    monkeypatch.setattr("swarmcore.plugins.entry_points", lambda group: entries)


def test_aiortc_is_the_one_that_is_taken_by_itself() -> None:
    assert connection_class() is connection_class("aiortc") is AiortcConnection


@pytest.mark.usefixtures("installed")
async def test_peers_talk_over_an_engine_of_somebody_else() -> None:
    assert connection_class("memory") is MemoryConnection
    async with (
        dialler(engine="memory", listen_on=["127.0.0.1:0"]) as listener,
        dialler(engine="memory") as transport,
    ):
        [address] = await listener.listen(echo)
        await exchanged(transport, address)
        assert len(MemoryConnection.made) == 2
        await exchanged(transport, address)
    assert not MemoryConnection.made


@pytest.mark.usefixtures("installed")
def test_an_engine_that_is_none_is_named() -> None:
    with pytest.raises(InputError, match=r"no WebRTC engine for 'other' \(installed: memory, odd\)"):
        connection_class("other")
    with pytest.raises(InputError, match=r"'odd' is .* no class of PeerConnection"):
        connection_class("odd")
