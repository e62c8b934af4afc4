"""Back ends of every seam are found by name, ours and others' in the same way."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from swarmcore import connect
from swarmcore.errors import InputError, MissingExtraError, SwarmError
from swarmcore.executor.loader import EXECUTORS, LoadSettings, loader_class
from swarmcore.identity import Identity
from swarmcore.peer import NetworkConfig, listening
from swarmcore.plugins import PluginGroup
from swarmcore.registry.base import Registry
from swarmcore.registry.choice import REGISTRIES, gossip, make_registry
from swarmcore.registry.gossip.registry import GossipRegistry
from swarmcore.registry.gossip.watch_client import WatchingRegistry
from swarmcore.rpc.node import Node
from swarmcore.server.config import ServerConfig
from swarmcore.transport import TRANSPORTS
from swarmcore.types import Address
from swarmcore_transports.tcp import TcpTransport

SOMEBODY = f"tcp://127.0.0.1:1/{Identity.generate().peer}"

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Installs a distribution with one entry point, as pip would lay it out."""

    def install(group: PluginGroup, name: str, target: str, source: str = "") -> None:
        info = tmp_path / f"plugin_{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: plugin-{name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{group.entry_points}]\n{name} = {target}\n")
        module = target.partition(":")[0]
        (tmp_path / f"{module}.py").write_text(source)
        monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.syspath_prepend(str(tmp_path))

    return install


def node() -> Node:
    identity = Identity.generate()
    return Node(identity, [TcpTransport(identity)])


def test_ours_are_installed_as_others_are() -> None:
    assert {"gossip", "dht"} <= set(REGISTRIES.installed())
    assert "torch" in EXECUTORS.installed()
    assert {"tcp", "libp2p", "webrtc"} <= set(TRANSPORTS.installed())


@pytest.mark.parametrize("group", [TRANSPORTS, REGISTRIES, EXECUTORS], ids=lambda group: group.kind)
def test_a_name_that_nobody_has_lists_those_that_there_are(group: PluginGroup) -> None:
    with pytest.raises(SwarmError) as caught:
        group.load("carrier-pigeon")
    assert isinstance(caught.value, InputError)
    for name in ("carrier-pigeon", group.kind, *group.installed()):
        assert name in caught.value.message


@pytest.mark.parametrize("group", [TRANSPORTS, REGISTRIES, EXECUTORS], ids=lambda group: group.kind)
def test_a_plugin_that_is_broken_says_so(group: PluginGroup, install: Install) -> None:
    install(group, "broken", "broken_plugin:Broken", "import a_library_that_is_not_there\n")
    with pytest.raises(MissingExtraError, match="'broken' needs a_library_that_is_not_there"):
        group.load("broken")
    install(group, "empty", "empty_plugin:thing")
    with pytest.raises(InputError, match=r"empty_plugin:thing.* is not there"):
        group.load("empty")


def test_the_registry_that_is_built_in() -> None:
    address = Address.parse(SOMEBODY)
    assert isinstance(make_registry("gossip", node(), [address], member=True), GossipRegistry)
    assert isinstance(make_registry("gossip", node(), [address], member=False), WatchingRegistry)


@pytest.mark.parametrize("group", [REGISTRIES], ids=lambda group: group.kind)
def test_the_dht_needs_its_transport(group: PluginGroup) -> None:
    pytest.importorskip("libp2p", reason="needs the extra libp2p")
    with pytest.raises(InputError, match="needs the transport libp2p"):
        make_registry("dht", node(), [], member=True)


MINE = """
from swarmcore.registry.memory import MemoryDirectory, MemoryRegistry

directory = MemoryDirectory()
made = []

def mine(node, bootstrap, *, member):
    made.append((bootstrap, member))
    return MemoryRegistry(node.peer, directory)
"""


async def test_clients_and_servers_take_a_registry_by_name(install: Install) -> None:
    install(REGISTRIES, "mine", "my_registry:mine", MINE)
    async with connect(SOMEBODY, registry="mine") as client:
        import my_registry  # type: ignore[import-not-found]

        network = NetworkConfig(transports={"tcp": ["127.0.0.1:0"]}, registry="mine")
        async with listening(Identity.generate(), network) as (_, registry):
            assert type(registry).__name__ == "MemoryRegistry"
        assert my_registry.made == [([Address.parse(SOMEBODY)], False), ([], True)]
        assert client.registry.view() is my_registry.directory._view


async def test_a_program_passes_one_of_its_own() -> None:
    made: list[str] = []

    def mine(node: Node, bootstrap: Sequence[Address], *, member: bool, name: str) -> Registry:
        made.append(name)
        return gossip(node, bootstrap, member=member)

    connect(SOMEBODY, registry=partial(mine, name="by itself"))
    assert made == ["by itself"]


def test_what_makes_no_registry_is_refused(install: Install) -> None:
    install(REGISTRIES, "odd", "odd_registry:thing", "thing = lambda node, bootstrap, *, member: 3\n")
    with pytest.raises(InputError, match="'odd' does not make a Registry, but int"):
        connect(SOMEBODY, registry="odd")
    install(REGISTRIES, "odder", "odder_registry:thing", "thing = 3\n")
    with pytest.raises(InputError, match="'odder' does not make a Registry"):
        connect(SOMEBODY, registry="odder")


def test_what_is_no_loader_is_refused(install: Install) -> None:
    install(EXECUTORS, "odd", "odd_executor:thing", "thing = dict\n")
    with pytest.raises(InputError, match="'odd' is not a BlockLoader"):
        loader_class("odd")


def test_the_executor_that_is_built_in() -> None:
    pytest.importorskip("torch")
    from swarmcore.executor.torch.loader import TorchLoader

    assert loader_class("torch") is loader_class(TorchLoader) is TorchLoader
    assert ServerConfig(model="m").executor == "auto"
    assert LoadSettings(model="m").dtype == "auto"
