"""Transformers' generate over a swarm gives what it gives of the plain model, in every mode that it has."""

from __future__ import annotations

import runpy
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_swarm import Tiny
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from swarmcore.errors import InputError
from swarmcore.loop_thread import background_loop

PROMPTS = torch.tensor([[0, 0, 0, 17, 80, 33, 5], [9, 41, 7, 66, 12, 100, 31]])
MASK = (PROMPTS > 0).long()
REPEATING = torch.tensor([[9, 41, 7, 66, 9, 41, 7, 66, 9, 41]])


def both(tiny: Tiny, seed: int = 0, **options: Any) -> tuple[Any, Any]:
    """What the plain and the remote model make of the same call."""
    outputs = []
    for model in (tiny.plain, tiny.remote):
        torch.manual_seed(seed)
        outputs.append(model.generate(**{"max_new_tokens": 8, "min_new_tokens": 8} | options))
    return outputs[0], outputs[1]


MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beam search": {"num_beams": 4},
    "several beams returned": {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "processors": {"do_sample": False, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "ending early": {"num_beams": 3, "early_stopping": True, "min_new_tokens": 0, "max_new_tokens": 14},
    "prompt in pieces": {"do_sample": False, "prefill_chunk_size": 3},
    "no cache": {"do_sample": False, "use_cache": False, "max_new_tokens": 4, "min_new_tokens": 4},
}


@pytest.mark.parametrize("mode", MODES)
def test_equal_to_the_plain_model(llama: Tiny, mode: str) -> None:
    plain, remote = both(llama, input_ids=PROMPTS, attention_mask=MASK, **MODES[mode])
    assert torch.equal(plain, remote)
    assert llama.sessions_end(), "its session is closed"


class FewTokens(LogitsProcessor):  # type: ignore[misc]
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.masked_fill(torch.arange(scores.shape[1]) % 3 == 0, -torch.inf)


class Recorder(BaseStreamer):  # type: ignore[misc]
    def __init__(self) -> None:
        self.tokens: list[list[int]] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens.append(value.flatten().tolist())

    def end(self) -> None:
        self.tokens.append([])


def test_processors_and_criteria_of_the_user(llama: Tiny) -> None:
    plain, remote = both(
        llama,
        input_ids=PROMPTS,
        attention_mask=MASK,
        do_sample=False,
        logits_processor=LogitsProcessorList([FewTokens()]),
        stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(11)]),
    )
    assert remote.shape == (2, 11)
    assert torch.equal(plain, remote)


def test_streamers_hear_the_same(llama: Tiny) -> None:
    streamers = Recorder(), Recorder()
    for model, streamer in zip((llama.plain, llama.remote), streamers, strict=True):
        model.generate(PROMPTS[1:], streamer=streamer, max_new_tokens=6, do_sample=False)
    assert streamers[0].tokens == streamers[1].tokens
    assert len(streamers[1].tokens) == 8, "prompt, six tokens and the end"


@pytest.mark.parametrize("draft", ["the model itself", "a worse model", "the prompt"])
def test_assisted_decoding(llama: Tiny, draft: str) -> None:
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 3}
    if draft != "the prompt":
        assistant = llama.plain if draft == "the model itself" else other_model(llama.plain)
        options = {"assistant_model": assistant}
    plain, remote = both(llama, input_ids=REPEATING, do_sample=False, **options)
    assert torch.equal(plain, remote)
    plain, remote = both(llama, input_ids=REPEATING, do_sample=True, **options)
    assert torch.equal(plain, remote)


def other_model(plain: Any) -> Any:
    """A draft that is often wrong."""
    torch.manual_seed(5)
    model = type(plain)(plain.config).eval()
    model.load_state_dict({k: v + 0.05 * torch.randn_like(v) for k, v in plain.state_dict().items()})
    return model


def test_the_remote_model_drafts_for_another(llama: Tiny) -> None:
    target = other_model(llama.plain)
    outputs = [
        target.generate(REPEATING, assistant_model=draft, max_new_tokens=10, do_sample=False)
        for draft in (llama.plain, llama.remote)
    ]
    assert torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("mode", ["greedy", "beam search"])
def test_from_embeddings(llama: Tiny, mode: str) -> None:
    embeds = llama.plain.get_input_embeddings()(PROMPTS).detach()
    plain, remote = both(llama, inputs_embeds=embeds, attention_mask=MASK, **MODES[mode])
    assert torch.equal(plain, remote)


@pytest.mark.parametrize("mode", ["greedy", "beam search"])
def test_scores_and_states(llama: Tiny, mode: str) -> None:
    plain, remote = both(
        llama,
        input_ids=PROMPTS,
        attention_mask=MASK,
        max_new_tokens=3,
        min_new_tokens=3,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
        **MODES[mode],
    )
    assert torch.equal(plain.sequences, remote.sequences)
    torch.testing.assert_close(remote.scores, plain.scores)
    torch.testing.assert_close(remote.logits, plain.logits)
    for plain_states, remote_states in zip(plain.hidden_states, remote.hidden_states, strict=True):
        assert len(plain_states) == len(remote_states) == 6
        for one, other in zip(plain_states, remote_states, strict=True):
            torch.testing.assert_close(other[:, -1], one[:, -1])


def test_a_second_turn_goes_on_with_the_cache(llama: Tiny) -> None:
    first = llama.remote.generate(
        PROMPTS, attention_mask=MASK, max_new_tokens=5, do_sample=False, return_dict_in_generate=True
    )
    cache = first.past_key_values
    assert cache.get_seq_length() == 11
    asked = torch.cat([first.sequences, torch.tensor([[44, 45], [46, 47]])], 1)
    mask = torch.cat([MASK, torch.ones(2, 7, dtype=torch.long)], 1)
    plain = llama.plain.generate(asked, attention_mask=mask, max_new_tokens=5, do_sample=False)
    sent = cache.session.positions
    options = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(plain, llama.remote.generate(asked, past_key_values=cache, **options))
    assert [end - start for start, end in zip(sent, cache.session.positions, strict=True)] == [7, 7]
    cache.close()
    assert llama.sessions_end()


CONTRASTIVE_SEARCH = """
import torch
from torch.nn.functional import cosine_similarity

def generate(model, input_ids, top_k=3, penalty_alpha=0.6, **options):
    output = model.base_model(input_ids, past_key_values=options.get("past_key_values"), use_cache=True)
    cache, seen = output.past_key_values, output.last_hidden_state
    for _ in range(8):
        likely, tokens = model.lm_head(seen[:, -1]).softmax(-1).topk(top_k)
        cache.batch_repeat_interleave(top_k)
        ahead = model.base_model(tokens.view(-1, 1), past_key_values=cache, use_cache=True).last_hidden_state
        ahead = ahead.view(*tokens.shape, -1)
        alike = cosine_similarity(ahead[:, :, None], seen[:, None], dim=-1).amax(-1)
        best = ((1 - penalty_alpha) * likely - penalty_alpha * alike).argmax(1)
        rows = torch.arange(len(best))
        cache.batch_select_indices(rows * top_k + best)
        seen = torch.cat([seen, ahead[rows, best][:, None]], 1)
        input_ids = torch.cat([input_ids, tokens[rows, best][:, None]], 1)
    return input_ids
"""


@pytest.mark.parametrize("where", ["folder", "function"])
def test_contrastive_search_by_a_program_of_the_user(
    llama: Tiny, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Transformers' hub (arXiv 2202.06417): every candidate is tried in a sequence of its own."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    program = tmp_path / "contrastive" / "custom_generate" / "generate.py"
    program.parent.mkdir(parents=True)
    program.write_text(CONTRASTIVE_SEARCH)
    search: dict[str, Any] = {"custom_generate": str(tmp_path / "contrastive"), "trust_remote_code": True}
    if where == "function":
        search = {"custom_generate": runpy.run_path(str(program))["generate"]}
    plain, remote = both(llama, input_ids=PROMPTS[:, 3:], **search)
    assert torch.equal(plain, remote)
    assert not torch.equal(plain, both(llama, input_ids=PROMPTS[:, 3:], do_sample=False)[0])
    assert llama.sessions_end()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Tests that a shell script runs in the background would ignore Ctrl-C."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


class Interrupt(StoppingCriteria):  # type: ignore[misc]
    """Has the loop that serves the next step press Ctrl-C."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if input_ids.shape[1] == 10:
            main = threading.main_thread().ident
            assert main is not None
            background_loop().loop.call_soon_threadsafe(signal.pthread_kill, main, signal.SIGINT)
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_an_interrupt_leaves_nothing_open(llama: Tiny, interruptible: None) -> None:
    criteria = StoppingCriteriaList([Interrupt()])
    with pytest.raises(KeyboardInterrupt):
        llama.remote.generate(PROMPTS[1:], max_new_tokens=200, min_new_tokens=200, stopping_criteria=criteria)
    assert llama.sessions_end()


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"output_attentions": True}])
def test_what_servers_do_not_do(llama: Tiny, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="leave out"):
        llama.remote.generate(PROMPTS[1:], max_new_tokens=2, return_dict_in_generate=True, **options)
    assert llama.sessions_end()


def test_a_cache_of_another_kind(llama: Tiny) -> None:
    from transformers import DynamicCache

    with pytest.raises(InputError, match="new_cache"):
        llama.remote.generate(PROMPTS[1:], max_new_tokens=2, past_key_values=DynamicCache())
