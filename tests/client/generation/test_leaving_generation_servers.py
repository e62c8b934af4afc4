"""Real generation servers of a tiny model: texts go on, token for token, when one leaves."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_swarm import served

from swarmcore import sync
from swarmcore.errors import ServerDrainingError
from swarmcore.head.queue import GenerationLimits
from swarmcore.loop_thread import background_loop
from swarmcore.server.block_server import BlockServer


@pytest.fixture
def servers(llama_folder: Path) -> Iterator[list[BlockServer]]:
    """Two generation servers, and a server that is none; each has all blocks."""
    with served(llama_folder, "0:3", "0:3", "0:3", heads=[GenerationLimits(), GenerationLimits()]) as servers:
        yield servers


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 11, "top_k": 0}])
def test_another_generation_server_goes_on_with_the_same_tokens(
    servers: list[BlockServer], plain_tokens, options
) -> None:
    expected = plain_tokens("The sea", 100, **options)
    with sync.connect(str(servers[2].node.addresses[0])) as swarm:
        generation = swarm.generate("The sea", max_new_tokens=100, **options)
        pieces = [next(iter(generation)) for _ in range(4)]
        (leaving,) = [server for server in servers if server.node.peer == generation.server]
        assert any(note.startswith("head: makes 1 text") for note in leaving.notes)
        background_loop().run(leaving.leave())
        pieces += list(generation)
        assert generation.tokens == expected
        assert generation.asynchronous.failovers == 1
        assert generation.server != leaving.node.peer
        assert "".join(pieces) == swarm.generate("The sea", max_new_tokens=100, **options).text()


def test_when_the_last_one_leaves_it_says_so(servers: list[BlockServer]) -> None:
    with sync.connect(str(servers[2].node.addresses[0])) as swarm:
        assert swarm.generate("The sea", max_new_tokens=2).text() is not None
        for server in servers[:2]:
            background_loop().run(server.leave())
        with pytest.raises(ServerDrainingError, match="takes no new texts"):
            swarm.generate("The sea", max_new_tokens=2).text()
