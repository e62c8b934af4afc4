"""Finding transports by their entry points."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from swarmcore.errors import MissingExtraError, UnknownTransportError
from swarmcore.transport import installed_transports, transport_class
from swarmcore_transports.tcp import TcpTransport


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """Installs a distribution with one transport entry point, as pip would lay it out."""

    def install(scheme: str, target: str, **modules: str) -> None:
        info = tmp_path / f"plugin_{scheme}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: plugin-{scheme}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[swarmcore.transports]\n{scheme} = {target}\n")
        for name, source in modules.items():
            (tmp_path / f"{name}.py").write_text(source)
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.syspath_prepend(str(tmp_path))

    return install


def test_tcp_is_installed() -> None:
    assert transport_class("tcp") is TcpTransport


def test_an_unknown_scheme_lists_those_installed() -> None:
    with pytest.raises(UnknownTransportError) as caught:
        transport_class("carrier-pigeon")
    assert "'carrier-pigeon'" in caught.value.message
    for scheme in installed_transports():
        assert scheme in caught.value.message
    assert "plugin" in caught.value.message


@pytest.mark.parametrize("scheme", ["libp2p", "webrtc"])
def test_a_scheme_of_ours_that_is_not_installed_names_its_extra(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("swarmcore.plugins.entry_points", lambda group: [])
    with pytest.raises(
        UnknownTransportError, match=rf"installed: none.*pip install 'swarmcore-llm\[{scheme}\]'"
    ):
        transport_class(scheme)


def test_a_plugin_is_found(install) -> None:  # type: ignore[no-untyped-def]
    source = """
from swarmcore_transports.tcp import TcpTransport
class Other(TcpTransport):
    scheme = "other"
"""
    install("other", "other_plugin:Other", other_plugin=source)
    assert "other" in installed_transports()
    assert transport_class("other").scheme == "other"


def test_a_plugin_whose_library_is_missing(install) -> None:  # type: ignore[no-untyped-def]
    install("broken", "broken_plugin:Broken", broken_plugin="import a_library_that_is_not_there\n")
    with pytest.raises(MissingExtraError, match="'broken' needs a_library_that_is_not_there"):
        transport_class("broken")


def test_a_backend_of_ours_whose_library_is_missing_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [one for one in sys.modules if one.startswith("swarmcore_transports.webrtc")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "aiortc", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'swarmcore-llm\[webrtc\]'"):
        transport_class("webrtc")


def test_an_entry_point_that_is_no_transport(install) -> None:  # type: ignore[no-untyped-def]
    install("odd", "odd_plugin:thing", odd_plugin="thing = 3\n")
    with pytest.raises(UnknownTransportError, match="odd_plugin:thing"):
        transport_class("odd")
