"""Logits, losses, gradients and hidden states of a remote model are those of the plain one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import tiny_config
from tiny_swarm import Tiny, tiny_swarm

from swarmcore.errors import InputError, InvalidBatchError, UnsupportedModelError
from swarmcore.transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from swarmcore.transformers.base_model import _positions

IDS = torch.randint(3, 120, (3, 7), generator=torch.Generator().manual_seed(0))
RIGHT = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]])
LEFT = RIGHT.flip(1)
LABELS = IDS.masked_fill(RIGHT == 0, -100)


@pytest.fixture(scope="module", params=["gpt2", "bloom", "gemma3", "mixtral"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    """A tiny model that is unlike Llama: other positions, ALiBi, scaled embeddings, experts."""
    spans = ("0:3", "3:7") if request.param == "gemma3" else ("0:3", "3:5")
    with tiny_swarm(tmp_path_factory.mktemp(request.param), request.param, *spans) as tiny:
        # The loss that balances experts needs what their routers say, which stays on the servers.
        tiny.plain.config.output_router_logits = False
        yield tiny


def test_losses_gradients_and_states(family: Tiny) -> None:
    outputs = []
    for model in (family.plain, family.remote):
        embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()
        labels = {"labels": LABELS, "output_hidden_states": True}
        output = model(inputs_embeds=embeds, attention_mask=RIGHT, use_cache=False, **labels)
        output.loss.backward()
        outputs.append((output, embeds.grad))
    (plain, plain_grad), (remote, remote_grad) = outputs
    torch.testing.assert_close(remote.loss, plain.loss)
    torch.testing.assert_close(remote.logits[RIGHT > 0], plain.logits[RIGHT > 0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(remote_grad, plain_grad, atol=1e-6, rtol=1e-4)
    assert len(remote.hidden_states) == len(plain.hidden_states) == family.remote.config.num_hidden_layers + 1
    for mine, theirs in zip(remote.hidden_states, plain.hidden_states, strict=True):
        torch.testing.assert_close(mine[RIGHT > 0], theirs[RIGHT > 0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{"do_sample": False}, {"num_beams": 3}])
def test_generation_of_a_padded_batch(family: Tiny, options: dict[str, Any]) -> None:
    options = options | {"max_new_tokens": 5, "min_new_tokens": 5, "attention_mask": LEFT}
    assert torch.equal(family.plain.generate(IDS, **options), family.remote.generate(IDS, **options))


def test_the_model_is_one_of_its_family(family: Tiny) -> None:
    assert isinstance(family.remote, type(family.plain))
    assert family.remote.config.num_hidden_layers == family.plain.config.num_hidden_layers
    # What a model can have besides blocks is here; nothing of it is trained unless it is thawed.
    assert not any(parameter.requires_grad for parameter in family.remote.parameters())
    names = {name for name, _ in family.remote.named_parameters()}
    assert names < {name for name, _ in family.plain.named_parameters()}


def classifiers(tiny: Tiny, **config: Any) -> tuple[Any, Any]:
    """A plain and a remote classifier with the same new head."""
    from transformers import AutoModelForSequenceClassification as Plain

    plain = Plain.from_pretrained(tiny.folder, dtype=torch.float32, num_labels=3, **config).eval()
    remote = AutoModelForSequenceClassification.from_pretrained(
        tiny.folder, swarm=tiny.swarm, dtype=torch.float32, num_labels=3, **config
    )
    remote.score.load_state_dict(plain.score.state_dict())
    return plain, remote


@pytest.mark.parametrize("mask", [LEFT, RIGHT], ids=["left", "right"])
def test_classification(family: Tiny, mask: torch.Tensor) -> None:
    plain, remote = classifiers(family, pad_token_id=0)
    assert [n for n, p in remote.named_parameters() if p.requires_grad] == ["score.weight"]
    outputs = []
    for model in (plain, remote):
        ids = IDS.masked_fill(mask == 0, 0)
        outputs.append(model(ids, attention_mask=mask, labels=torch.tensor([0, 2, 1])))
        outputs[-1].loss.backward()
    # GPT-2 gives padding positions of its own, and so do we.
    torch.testing.assert_close(outputs[1].logits, outputs[0].logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(outputs[1].loss, outputs[0].loss)
    torch.testing.assert_close(remote.score.weight.grad, plain.score.weight.grad, atol=1e-6, rtol=1e-4)
    assert remote.blocks[1:3].span.start == 1


def test_inputs_that_cannot_work(llama: Tiny) -> None:
    with pytest.raises(InputError, match="either input_ids or inputs_embeds"):
        llama.remote()
    with pytest.raises(InputError, match=r"attention_mask of shape \[3, 6\]"):
        llama.remote(IDS, attention_mask=RIGHT[:, :6])
    with pytest.raises(InputError, match="follow each other"):
        llama.remote(IDS, attention_mask=torch.tensor([[1, 1, 0, 1, 1, 1, 1]] * 3))
    with pytest.raises(InputError, match="position_ids of shape"):
        llama.remote(IDS, position_ids=torch.arange(6)[None])
    bad: list[tuple[dict[str, Any], str]] = [
        ({"input_ids": IDS[0]}, r"\[batch, length\] and not empty; got \[7\]"),
        ({"input_ids": IDS[:, :0]}, r"not empty; got \[3, 0\]"),
        ({"input_ids": IDS + 128}, "from 0 to 127; use the tokenizer"),
        ({"input_ids": IDS.float()}, "whole numbers"),
        ({"inputs_embeds": torch.zeros(3, 64)}, r"hidden size\] and not empty; got \[3, 64\]"),
        ({"input_ids": IDS, "labels": IDS[:, 1:]}, r"labels must be \[3, 7\] for this batch, got \[3, 6\]"),
        ({"input_ids": IDS, "labels": IDS + 128}, "token ids from 0 to 127, or -100"),
        ({"input_ids": IDS, "labels": IDS, "logits_to_keep": 3}, r"labels must be \[3, 3\]"),
    ]
    for inputs, message in bad:
        with pytest.raises(InvalidBatchError, match=message):
            llama.remote(**inputs)
    with pytest.raises(InvalidBatchError, match="use the tokenizer"):
        llama.remote.generate(IDS - 100, max_new_tokens=2)
    assert llama.sessions_end()


@pytest.mark.parametrize("ignored", [False, True])
def test_the_first_token_behind_padding(family: Tiny, ignored: bool) -> None:
    """Transformers predicts it from the last column of padding, whose attention has nothing to attend to."""
    if family.plain.config._attn_implementation != "sdpa":
        pytest.skip("another attention, in which padding attends to all columns")
    labels = IDS.masked_fill(LEFT == 0, -100)
    if ignored:
        labels = labels.masked_fill((LEFT.cumsum(1) == 1) & (LEFT == 1), -100)
    outputs = []
    for model in (family.plain, family.remote):
        embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()
        output = model(inputs_embeds=embeds, attention_mask=LEFT, labels=labels, use_cache=False)
        output.loss.backward()
        with torch.no_grad():
            logits = model(IDS, attention_mask=LEFT, use_cache=False).logits
        outputs.append((output, embeds.grad, logits))
    (plain, plain_grad, plain_logits), (remote, remote_grad, remote_logits) = outputs
    torch.testing.assert_close(remote.loss, plain.loss)
    torch.testing.assert_close(remote_grad, plain_grad, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(remote_logits, plain_logits, atol=1e-5, rtol=1e-4)


def test_labels_at_padding_behind_a_sequence(llama: Tiny) -> None:
    with pytest.raises(InvalidBatchError, match=r"padding behind a sequence.*-100"):
        llama.remote(IDS, attention_mask=RIGHT, labels=IDS)
    first = LABELS.clone()
    first[1, 4] = 5  # it is predicted from the last token
    expected = llama.plain(IDS, attention_mask=RIGHT, labels=first).loss
    torch.testing.assert_close(llama.remote(IDS, attention_mask=RIGHT, labels=first).loss, expected)
    shifted = torch.nn.functional.pad(LABELS, (0, 1), value=-100)[:, 1:].contiguous()
    expected = llama.plain(IDS, attention_mask=RIGHT, labels=LABELS, shift_labels=shifted).loss
    found = llama.remote(IDS, attention_mask=RIGHT, labels=LABELS, shift_labels=shifted).loss
    torch.testing.assert_close(found, expected)


PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6]])


def test_packed_rows(family: Tiny) -> None:
    """Sequences that follow each other in a row, told apart by their positions, do not see each other."""
    if family.plain.config.model_type == "bloom":
        pytest.skip("it has no position ids")
    outputs = []
    for model in (family.plain, family.remote):
        embeds = model.get_input_embeddings()(IDS).detach().requires_grad_()
        output = model(
            inputs_embeds=embeds,
            position_ids=PACKED,
            labels=IDS.masked_fill(PACKED == 0, -100),
            use_cache=False,
            output_hidden_states=True,
        )
        output.loss.backward()
        outputs.append((output, embeds.grad))
    (plain, plain_grad), (remote, remote_grad) = outputs
    torch.testing.assert_close(remote.loss, plain.loss)
    torch.testing.assert_close(remote.logits, plain.logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(remote_grad, plain_grad, atol=1e-6, rtol=1e-4)
    for mine, theirs in zip(remote.hidden_states, plain.hidden_states, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_positions_past_which_all_frequencies_change() -> None:
    """Servers count from 0, so that a sequence that begins elsewhere would have those of a short one."""
    config, columns = tiny_config("phi3-longrope"), torch.arange(60, 67)[None]
    limit = config.original_max_position_embeddings
    assert 60 < limit < 67
    with pytest.raises(InputError, match=f"positions from {limit} on.*begin at 0"):
        _positions(config, columns, None, None)
    assert torch.equal(_positions(config, columns - 10, None, None), columns - 10)
    assert torch.equal(_positions(tiny_config("llama"), columns + 900, None, None), columns + 900)


def test_boundaries_of_packed_rows_that_kernels_take(llama: Tiny) -> None:
    ends = torch.tensor([0, 4, 7, 9, 14, 21])
    given: dict[str, Any] = {
        "use_cache": False,
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": 7,
        "max_length_k": 7,
    }
    expected = llama.plain(IDS, position_ids=PACKED, use_cache=False).logits
    found = llama.remote(IDS, position_ids=PACKED, **given).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match="other sequences apart"):
        llama.remote(IDS, position_ids=PACKED, **given | {"cu_seq_lens_q": ends[1:]})
    with pytest.raises(InputError, match="pass position_ids"):
        llama.remote(IDS, **given)
    with pytest.raises(InputError, match="follow each other"):
        llama.remote(IDS, position_ids=PACKED, attention_mask=torch.ones_like(IDS), use_cache=False)
    with pytest.raises(InputError, match="pass use_cache=False"):  # Transformers would not tell them apart
        llama.remote(IDS, position_ids=PACKED)
    with torch.no_grad(), pytest.raises(InputError, match="follow each other"):
        llama.remote(IDS, position_ids=PACKED, use_cache=True)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"output_attentions": True}, "output_attentions"),
    ({"output_router_logits": True}, "router_aux_loss_coef"),
    ({"head_mask": torch.ones(5, 4)}, "head_mask"),
    ({"is_causal": False}, "is_causal"),
    ({"attention_bias": torch.zeros(7, 7)}, "attention_bias"),
    ({"cache_position": torch.arange(1, 8)}, "cache_position"),
    ({"a_new_flag": False}, "a_new_flag"),
    ({"attention_mask": torch.ones(3, 1, 7, 7)}, r"attention_mask of shape \[3, 1, 7, 7\]"),
    ({"attention_mask": {"full_attention": RIGHT}}, "attention_mask is a dict"),
    ({"position_ids": torch.zeros(3, 3, 7, dtype=torch.long)}, r"position_ids of shape \[3, 3, 7\]"),
    ({"position_ids": torch.zeros(2, 7, dtype=torch.long)}, r"position_ids of shape \[2, 7\]"),
    ({"inputs_embeds": torch.zeros(3, 7, 64)}, "either input_ids or inputs_embeds"),
    ({"token_type_ids": torch.ones_like(IDS)}, "token_type_ids"),
    (
        {"use_cache": True, "inputs_embeds": torch.zeros(3, 7, 64, requires_grad=True), "input_ids": None},
        "no gradients",
    ),
    ({"a_new_option": 3}, "a_new_option"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=[message[:20] for _, message in REFUSED])
def test_arguments_that_would_be_ignored(llama: Tiny, given: dict[str, Any], message: str) -> None:
    for model in (llama.remote, llama.remote.base_model):
        with pytest.raises(InputError, match=message):
            model(**{"input_ids": IDS} | given)


def test_arguments_that_change_nothing(llama: Tiny) -> None:
    given = {
        "output_attentions": False,
        "is_causal": True,
        "token_type_ids": torch.zeros_like(IDS),
        "head_mask": None,
    }
    logits = llama.remote(IDS, **given, return_dict=False)
    assert isinstance(logits, tuple)
    torch.testing.assert_close(logits[0], llama.plain(IDS).logits, atol=1e-5, rtol=1e-4)
    states = llama.remote.base_model(IDS, return_dict=False)
    assert isinstance(states, tuple)


def test_masks_that_change_what_is_in_the_cache(llama: Tiny) -> None:
    with torch.no_grad():
        first = llama.remote(IDS, attention_mask=LEFT, use_cache=True)
        mask = torch.cat([LEFT, torch.ones_like(LEFT[:, :1])], 1)
        step = {"input_ids": IDS[:, :1], "past_key_values": first.past_key_values}
        for hidden in (mask.masked_fill(mask == 0, 1), mask.index_fill(1, torch.tensor([6]), 0)):
            with pytest.raises(InputError, match="another one than before"):
                llama.remote(**step, attention_mask=hidden)
        positions = mask.cumsum(1)[:, -1:] - 1
        with pytest.raises(InputError, match="follow each other"):
            llama.remote(**step, attention_mask=mask, position_ids=positions)  # before: columns
        llama.remote(**step, attention_mask=mask)
        first.past_key_values.close()


def test_types_of_tokens_of_the_family_that_has_them(family: Tiny) -> None:
    types = IDS % 5
    if family.plain.config.model_type != "gpt2":
        with pytest.raises(InputError, match="token_type_ids"):
            family.remote(IDS, token_type_ids=types)
        return
    expected = family.plain(IDS, token_type_ids=types).logits
    torch.testing.assert_close(
        family.remote(IDS, token_type_ids=types).logits, expected, atol=1e-5, rtol=1e-4
    )


def test_labels_that_are_no_classes(llama: Tiny) -> None:
    _, remote = classifiers(llama, pad_token_id=0)
    bad: list[tuple[torch.Tensor, str]] = [
        (torch.tensor([0, 1]), r"must be \[3\] for this batch, got \[2\]"),
        (torch.tensor([0, 1, 3]), "from 0 to 2"),
        (torch.tensor([0.5, 1.0, 0.0]), r"must be \[3, 3\]"),
    ]
    for labels, message in bad:
        with pytest.raises(InvalidBatchError, match=message):
            remote(IDS, labels=labels)
    several = torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 0, 0]])
    assert remote(IDS, labels=several).loss > 0


def test_options_that_do_not_work(llama: Tiny) -> None:
    with pytest.raises(InputError, match="bootstrap"):
        AutoModelForCausalLM.from_pretrained(llama.folder)
    with pytest.raises(InputError, match="bootstrap"):
        AutoModelForCausalLM.from_pretrained(llama.folder, bootstrap=llama.address, swarm=llama.swarm)
    with pytest.raises(InputError, match="device_map"):
        AutoModelForCausalLM.from_pretrained(llama.folder, swarm=llama.swarm, device_map="auto")
    with pytest.raises(InputError, match="rms_norm_eps: servers compute the blocks as"):
        AutoModelForCausalLM.from_pretrained(llama.folder, swarm=llama.swarm, rms_norm_eps=1e-3)
    same = llama.plain.config.rms_norm_eps
    AutoModelForCausalLM.from_pretrained(llama.folder, swarm=llama.swarm, rms_norm_eps=same)
    with pytest.raises(InputError, match="float64"):
        AutoModelForCausalLM.from_pretrained(llama.folder, swarm=llama.swarm, dtype=torch.float64)
    with pytest.raises(InputError, match="from_pretrained"):
        AutoModelForCausalLM()


def test_a_family_without_classifiers(tmp_path_factory: pytest.TempPathFactory) -> None:
    from tiny_models import save_random_model, tiny_config

    from swarmcore import sync
    from swarmcore.loop_thread import background_loop

    folder = tmp_path_factory.mktemp("granite")
    save_random_model(tiny_config("granite"), folder)
    swarm = sync.Swarm(background_loop(), None)  # type: ignore[arg-type]  # it is not used before
    with pytest.raises(UnsupportedModelError, match="no sequence classifier"):
        AutoModelForSequenceClassification.from_pretrained(folder, swarm=swarm)
    background_loop().closed(swarm)


def test_a_model_that_joins_by_itself_and_leaves(llama: Tiny) -> None:
    with AutoModelForCausalLM.from_pretrained(
        llama.folder, bootstrap=[llama.address], dtype="float32"
    ) as model:
        model.stack.swarm.wait_for_blocks(model.stack.model, timeout=30)
        cache = model.new_cache()
        with torch.no_grad():
            model(IDS, past_key_values=cache)
        assert llama.sessions == 2
    assert llama.sessions_end()
