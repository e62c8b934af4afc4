"""Texts that begin alike, over real servers with a tiny model: computed once, and the same texts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from byte_tokenizer import byte_tokenizer
from tiny_models import save_random_model, tiny_config
from tiny_swarm import served

from swarmcore import sync
from swarmcore.client.generation.token_session import ModelSession
from swarmcore.client.session.options import SessionOptions
from swarmcore.errors import InputError
from swarmcore.server.block_server import BlockServer
from swarmcore.training import PrefixAdapter

SYSTEM = "You are a lighthouse keeper, and answer in words that fit on a postcard from the northern sea. "
TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
TOKENS = 8
PAGE = 64


@attrs.frozen
class Setting:
    plain: Any
    model: sync.Model
    whole: sync.Model
    """The same, which computes all of every prompt."""
    servers: list[BlockServer]

    def rows(self) -> int:
        """Rows computed by the server that has computed most."""
        return max(server.engine.stats.tokens for server in self.servers)

    def generate(self, prompt: str, **options: Any) -> tuple[list[int], int]:
        """The tokens, after checking that they are those of a session of its own; and what was cached."""
        options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, **options}
        expected = self.whole.generate(prompt, **options)
        expected.text()
        assert expected.cached_tokens == 0
        generation = self.model.generate(prompt, **options)
        generation.text()
        assert generation.tokens == expected.tokens
        return generation.tokens, generation.cached_tokens


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setting]:
    folder: Path = tmp_path_factory.mktemp("llama")
    config = tiny_config("llama")
    config.vocab_size, config.max_position_embeddings = 257, 1024
    plain = save_random_model(config, folder)
    byte_tokenizer().save_pretrained(folder)
    with served(folder, "0:2", "2:5") as servers, sync.connect(str(servers[0].node.addresses[0])) as swarm:
        model, whole = (
            swarm.load_model(
                str(folder), dtype="float32", session_options=SessionOptions(prefix_cache=prefix_cache)
            )
            for prefix_cache in (True, False)
        )
        for each in (model, whole):
            each.asynchronous.tokenizer.chat_template = TEMPLATE
        swarm.wait_for_blocks(model.info, timeout=30)
        yield Setting(plain, model, whole, servers)


def test_a_beginning_in_common_is_computed_once(setting: Setting) -> None:
    common = len(SYSTEM) // PAGE * PAGE
    assert setting.generate(SYSTEM + "What do you see?")[1] == 0
    assert setting.generate(SYSTEM + "And who comes by?")[1] == common
    before = setting.rows()
    setting.model.generate(
        SYSTEM + "Is it cold?", max_new_tokens=TOKENS, min_new_tokens=TOKENS, speculation="off"
    ).text()
    assert setting.rows() - before == len(SYSTEM) + len("Is it cold?") - common + TOKENS - 1
    hits = [server.engine.counters["prefix_hits"] for server in setting.servers]
    assert hits == [2, 2]
    assert any("prefix cache: hits 2" in note for note in setting.servers[0].notes)


def test_what_was_answered_belongs_to_the_next_prompt(setting: Setting) -> None:
    prompt = "A tale of the sea, told by a keeper on the night of a storm: "
    assert len(prompt) < PAGE < len(prompt) + TOKENS - 1
    answer, _ = setting.generate(prompt)
    encode = byte_tokenizer()
    tokens = [*encode(prompt)["input_ids"], *answer, *encode(" And then?")["input_ids"]]
    generation = setting.model.generate(tokens, max_new_tokens=TOKENS, min_new_tokens=TOKENS)
    generation.text()
    assert generation.cached_tokens == PAGE
    expected = setting.whole.generate(tokens, max_new_tokens=TOKENS, min_new_tokens=TOKENS)
    expected.text()
    assert generation.tokens == expected.tokens


def test_a_batch_begins_with_what_each_of_its_prompts_has(setting: Setting) -> None:
    setting.generate(SYSTEM)
    prompts = [SYSTEM + "Is anybody there?", "Nobody asked this.", SYSTEM]
    hits = setting.servers[1].engine.prefixes.hits
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
    many = setting.model.generate_batch(prompts, **options)
    assert setting.servers[1].engine.prefixes.hits == hits + 2
    assert many == setting.whole.generate_batch(prompts, **options)


def test_prompts_under_an_adapter_with_a_prefix_have_pages_of_their_own(setting: Setting) -> None:
    setting.generate(SYSTEM)
    adapter = PrefixAdapter.for_model(setting.plain.config, tokens=5)
    with torch.no_grad():
        for weight in adapter.parameters():
            weight.normal_(generator=torch.Generator().manual_seed(3))
    tuned, cached = setting.generate(SYSTEM, adapter=adapter)
    assert cached == 0
    again, cached = setting.generate(SYSTEM, adapter=adapter)
    assert cached == len(SYSTEM) // PAGE * PAGE
    assert tuned == again != setting.generate(SYSTEM)[0]


def test_namespaces_have_nothing_in_common(setting: Setting) -> None:
    setting.generate(SYSTEM, namespace="one user")
    assert setting.generate(SYSTEM, namespace="another")[1] == 0
    assert setting.generate(SYSTEM, namespace="one user")[1] > 0


def test_turns_of_a_chat_go_on_in_another_one(setting: Setting) -> None:
    turns = "What is the weather like at the end of the world?", "And when the ships come home, what then?"
    said: list[list[str]] = []
    cached = []
    for _ in range(2):
        with setting.model.chat(system=SYSTEM) as chat:
            said.append([])
            for turn in turns:
                said[-1].append("".join(chat.say(turn, max_new_tokens=TOKENS, min_new_tokens=TOKENS)))
                cached.append(chat.asynchronous.generation.cached_tokens)
    assert said[0] == said[1]
    assert cached[2] >= PAGE and cached[3] > cached[2]


def test_a_prompt_that_was_given_up_before_it_was_sent_names_nothing(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
    with setting.model.chat() as chat:
        "".join(chat.say(SYSTEM, **options))
    with setting.model.chat() as chat:
        with monkeypatch.context() as patched:

            async def interrupted(*args: Any) -> None:
                raise InputError("given up")

            patched.setattr(ModelSession, "embed", interrupted)
            with pytest.raises(InputError, match="given up"):
                "".join(chat.say(SYSTEM))
        other = (
            "Tell me of the southern sea and of all the ships that came home, if any did, and of their crews."
        )
        said = ["".join(chat.say(other, **options))]
    for model in (setting.whole, setting.model):
        with model.chat() as chat:
            said.append("".join(chat.say(other, **options)))
    assert len(set(said)) == 1
