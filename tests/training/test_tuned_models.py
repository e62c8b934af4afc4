"""Tuned models over servers: losses, gradients, logits and texts that PEFT has on the plain local model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_swarm import Tiny, tiny_swarm
from torch.optim.swa_utils import AveragedModel

from swarmcore import PassOptions
from swarmcore.errors import AdapterError, InputError, InvalidBatchError
from swarmcore.training import (
    FitReport,
    PrefixAdapter,
    SequenceClassificationHead,
    SoftPrompt,
    StepReport,
    TokenClassificationHead,
    TunedModel,
    deep_prompt_tuning,
    fit_sync,
    lora_tuning,
    prompt_tuning,
)
from swarmcore.transformers import AutoModelForCausalLM

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),
    pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning"),
]

IDS = torch.randint(3, 120, (3, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]])
LEFT = MASK.flip(1)
LABELS = IDS.masked_fill(MASK == 0, -100)
KINDS = ["prompt", "deep prompt", "lora"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    with tiny_swarm(tmp_path_factory.mktemp("llama"), "llama", "0:2", "2:5") as tiny:
        yield tiny


def tuned_model(kind: str, model: Any, **options: Any) -> TunedModel:
    """One whose parameters all have a part in the result."""
    if kind == "prompt":
        return prompt_tuning(model, tokens=3, seed=1, **options)
    if kind == "deep prompt":
        return deep_prompt_tuning(model, tokens=3, seed=1, **options)
    tuned = lora_tuning(model, targets=("q_proj", "down_proj"), rank=4, seed=1, **options)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in tuned.adapter.parameters() if tuned.adapter is not None else ():
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.3)
    return tuned


def peft_model(tiny: Tiny, tuned: TunedModel, folder: Path) -> Any:
    """The same in PEFT, on the plain model, by way of the saved files."""
    tuned.save(folder)
    config = tiny.plain.config
    plain = type(tiny.plain)(config).eval()
    plain.load_state_dict(tiny.plain.state_dict())
    theirs = PeftModel.from_pretrained(plain, str(folder)).eval()
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_("lora_" in name or "prompt_encoder" in name)
    return theirs


def peft_gradients(kind: str, theirs: Any, tuned: TunedModel) -> list[torch.Tensor]:
    """In the order and the layout of the parameters of ``tuned``."""
    found = {n.removeprefix("base_model.model."): p.grad for n, p in theirs.named_parameters()}
    if kind == "lora":
        assert tuned.adapter is not None
        return [found[f"model.layers.{n}.default.weight"] for n in tuned.adapter.named_weights()]
    (values,) = [grad for name, grad in found.items() if "prompt_encoder" in name]
    if kind == "prompt":
        return [values]
    return list(PrefixAdapter.from_prompt_embeddings(values, tuned.model.config).parameters())


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-4 * other.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_losses_logits_and_gradients_are_those_of_peft(llama: Tiny, kind: str, tmp_path: Path) -> None:
    tuned = tuned_model(kind, llama.remote)
    theirs = peft_model(llama, tuned, tmp_path)
    expected = theirs(input_ids=IDS, attention_mask=MASK, labels=LABELS)
    found = tuned(IDS, MASK, LABELS)
    assert close(found.loss, expected.loss)
    real = MASK.bool()
    assert close(found.logits[real], expected.logits[:, -7:][real])
    assert close(tuned(IDS, MASK).logits[real], expected.logits[:, -7:][real])
    assert tuned(IDS, MASK, logits_to_keep=2).logits.shape == (3, 2, 128)
    states = tuned(IDS, MASK, output_hidden_states=True).hidden_states
    assert [state.shape for state in states] == [(3, 7 + tuned.prompt_tokens, 64)] * 6
    expected.loss.backward()
    found.loss.backward()
    gradients = peft_gradients(kind, theirs, tuned)
    for parameter, wanted in zip(tuned.parameters(), gradients, strict=True):
        assert parameter.grad is not None
        assert close(parameter.grad, wanted)
    assert not any(parameter.requires_grad for parameter in llama.remote.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_padding_at_the_left_gives_the_same(llama: Tiny, kind: str) -> None:
    tuned = tuned_model(kind, llama.remote)
    padding = (MASK == 0).sum(1).tolist()
    turned = torch.stack([row.roll(count) for row, count in zip(IDS, padding, strict=True)])
    # A sequence's first token is predicted by what is before it: not the same thing at both sides.
    labels, turned_labels = LABELS.clone(), turned.masked_fill(LEFT == 0, -100)
    labels[:, 0] = -100
    turned_labels[torch.arange(3), padding] = -100
    right, left = tuned(IDS, MASK, labels), tuned(turned, LEFT, turned_labels)
    assert close(left.logits[LEFT.bool()], right.logits[MASK.bool()])
    assert close(left.loss, right.loss)


@pytest.mark.parametrize("kind", KINDS)
def test_it_generates_as_peft_does(llama: Tiny, kind: str, tmp_path: Path) -> None:
    tuned = tuned_model(kind, llama.remote)
    theirs = peft_model(llama, tuned, tmp_path)
    options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    whole = torch.ones_like(IDS)
    expected = theirs.generate(input_ids=IDS, attention_mask=whole, **options)
    assert torch.equal(tuned.generate(IDS, whole, **options), expected)
    plain = llama.plain.generate(input_ids=IDS, attention_mask=whole, **options)
    assert torch.equal(llama.remote.generate(input_ids=IDS, attention_mask=whole, **options), plain)
    assert not torch.equal(plain, expected)
    beams = tuned.generate(IDS, LEFT, num_beams=3, **options)
    alone = [
        tuned.generate(row[mask.bool()][None], num_beams=3, **options)
        for row, mask in zip(IDS, LEFT, strict=True)
    ]
    assert [row[7:].tolist() for row in beams] == [row[0, -6:].tolist() for row in alone]
    assert llama.sessions_end()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head_class", [SequenceClassificationHead, TokenClassificationHead])
def test_heads_are_trained_saved_and_loaded(llama: Tiny, kind: str, head_class: Any, tmp_path: Path) -> None:
    head = head_class.for_model(llama.remote.config, 2, seed=3)
    tuned = tuned_model(kind, llama.remote, head=head)
    labels = torch.tensor([0, 1, 1])
    if head_class is TokenClassificationHead:
        labels = labels[:, None].expand(3, 7).masked_fill(MASK == 0, -100)

    def collate(rows: list[int]) -> list[int]:
        return rows

    def loss(model: Any, rows: list[int]) -> torch.Tensor:
        found: torch.Tensor = model(IDS[rows], MASK[rows], labels[rows]).loss
        return found

    before = float(loss(tuned, [0, 1, 2]).detach())
    report = fit_sync(tuned, [0, 1, 2], collate, loss, batch_size=3, epochs=4, learning_rate=0.05)
    assert report.steps == 4
    after = float(loss(tuned, [0, 1, 2]).detach())
    assert after < before
    tuned.save(tmp_path)
    again = TunedModel.load(llama.remote, tmp_path)
    assert isinstance(again.head, head_class)
    assert close(again(IDS, MASK).logits, tuned(IDS, MASK).logits)
    with pytest.raises(InputError, match="generates no text"):
        again.generate(IDS)


def test_a_run_that_was_stopped_ends_with_the_same_bits(llama: Tiny, tmp_path: Path) -> None:
    options = PassOptions(reproducible=True, micro_batch_tokens=8)  # several micro-batches at once
    model = AutoModelForCausalLM.from_pretrained(
        llama.folder, swarm=llama.swarm, dtype="float32", pass_options=options
    )

    def loss(tuned: Any, rows: list[int]) -> torch.Tensor:
        found: torch.Tensor = tuned(IDS[rows], MASK[rows], torch.tensor(rows) % 2).loss
        return found

    def fitted(seed: int, **more: Any) -> tuple[FitReport, list[torch.Tensor]]:
        head = SequenceClassificationHead.for_model(model.config, 2, dropout=0.2, seed=3)
        tuned = tuned_model("lora", model, head=head)
        torch.manual_seed(seed)  # of the dropout, where a checkpoint has no other
        report = fit_sync(
            tuned, [0, 1, 2], list, loss, batch_size=1, accumulate=2, epochs=2, clip_norm=1.0, **more
        )
        return report, [weight.detach() for weight in tuned.parameters()]

    def stop(step: StepReport) -> None:
        if step.step == 2:
            raise KeyboardInterrupt

    expected = fitted(1)
    file = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        fitted(1, checkpoint=file, on_step=stop)
    found = fitted(2, checkpoint=file)
    assert found[0] == expected[0]
    assert all(torch.equal(one, other) for one, other in zip(found[1], expected[1], strict=True))


def test_two_over_one_model_do_not_meet(llama: Tiny) -> None:
    one, other = tuned_model("lora", llama.remote), tuned_model("deep prompt", llama.remote)
    alone = one(IDS, MASK).logits, other(IDS, MASK).logits
    first, second = one(IDS, MASK, LABELS), other(IDS, MASK, LABELS)
    (first.loss + second.loss).backward()
    assert close(first.logits, alone[0])
    assert close(second.logits, alone[1])
    assert len(one.state_dict()) == 20
    assert len(other.state_dict()) == 5


def test_a_copy_has_parameters_of_its_own(llama: Tiny) -> None:
    tuned = tuned_model("lora", llama.remote)
    before = tuned(IDS, MASK).logits
    average, copied = AveragedModel(tuned), copy.deepcopy(llama.remote)
    blocks = llama.remote.blocks.adapted(tuned.adapter)[1:3]
    same_blocks = copy.deepcopy(blocks)
    hidden = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(1))
    expected = blocks(hidden)
    with torch.no_grad():
        for weight in tuned.parameters():
            weight.zero_()
    assert close(average(IDS, MASK).logits, before)
    assert average.module.model is llama.remote
    assert close(copied(IDS).logits, tuned(IDS).logits)
    assert close(same_blocks(hidden), expected)
    assert not close(blocks(hidden), expected)


def test_positions_move_on_where_they_are_learned(tmp_path: Path) -> None:
    with tiny_swarm(tmp_path / "model", "gpt2", "0:5") as gpt2:
        for kind in ("prompt", "deep prompt"):
            tuned = tuned_model(kind, gpt2.remote)
            theirs = peft_model(gpt2, tuned, tmp_path / kind)
            logits = theirs(input_ids=IDS).logits[:, -7:]
            assert close(tuned(IDS).logits, logits)
            options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
            whole = torch.ones_like(IDS)
            expected = theirs.generate(input_ids=IDS, attention_mask=whole, **options)
            assert torch.equal(tuned.generate(IDS, whole, **options), expected)


def test_what_cannot_work_is_refused(llama: Tiny, tmp_path: Path) -> None:
    tuned = tuned_model("prompt", llama.remote)
    for batch in (
        (IDS[0],),
        (IDS, MASK[:, :5]),
        (IDS, MASK, LABELS[:, 1:]),
        (IDS, MASK, LABELS + 128),
        (IDS, MASK, LABELS.float()),
        (IDS + 128,),
    ):
        with pytest.raises(InvalidBatchError, match=r"must be|are \["):
            tuned(*batch)
    with pytest.raises(InvalidBatchError, match="attention mask must be"):
        tuned.generate(IDS, MASK[:2])
    with pytest.raises(InputError, match="logits_to_keep"):
        tuned(IDS, MASK, LABELS, logits_to_keep=1)
    with pytest.raises(InputError, match="AutoModelForCausalLM"):
        prompt_tuning(llama.plain)
    with pytest.raises(InputError, match="tokenizer="):
        prompt_tuning(llama.remote, init_text="The sea")
    with pytest.raises(AdapterError, match="nothing to tune"):
        TunedModel(llama.remote)
    with pytest.raises(AdapterError, match=r"hidden size 8.*another model"):
        TunedModel(llama.remote, prompt=SoftPrompt.random(2, 8))
    with pytest.raises(AdapterError, match="no projection of these blocks"):
        lora_tuning(llama.remote, targets=("nothing",))
    both = TunedModel(llama.remote, prompt=tuned.prompt, adapter=tuned_model("lora", llama.remote).adapter)
    assert both(IDS, MASK).logits.shape == (3, 7, 128)
    with pytest.raises(AdapterError, match="no file for a prompt and an adapter"):
        both.save(tmp_path)
    head = SequenceClassificationHead.for_model(llama.remote.config, 2)
    with pytest.raises(InvalidBatchError, match=r"labels must be \[3\] for this batch, got \[2\]"):
        TunedModel(llama.remote, head=head)(IDS, MASK, torch.tensor([0, 1]))
    with pytest.raises(AdapterError, match="a head alone"):
        TunedModel(llama.remote, head=head).save(tmp_path)


def test_padding_before_sequences_as_in_peft(llama: Tiny, tmp_path: Path) -> None:
    """The first token is predicted from padding, which has low-rank updates too."""
    tuned = tuned_model("lora", llama.remote)
    theirs = peft_model(llama, tuned, tmp_path)
    labels = IDS.masked_fill(LEFT == 0, -100)
    expected = theirs(input_ids=IDS, attention_mask=LEFT, labels=labels)
    found = tuned(IDS, LEFT, labels)
    assert close(found.loss, expected.loss)
    expected.loss.backward()
    found.loss.backward()
    gradients = peft_gradients("lora", theirs, tuned)
    for parameter, wanted in zip(tuned.parameters(), gradients, strict=True):
        assert parameter.grad is not None
        assert close(parameter.grad, wanted)
    deep = tuned_model("deep prompt", llama.remote)
    with pytest.raises(InvalidBatchError, match="sees no deep prompt"):
        deep(IDS, LEFT, labels)
    prompted = tuned_model("prompt", llama.remote)  # whose last row predicts it
    one = prompted(IDS[1:2, 3:], labels=IDS[1:2, 3:]).loss
    assert close(prompted(IDS[1:2], LEFT[1:2], labels[1:2]).loss, one)


def test_dropout_of_a_file_is_no_silent_matter(llama: Tiny) -> None:
    tuned = lora_tuning(llama.remote, rank=2)
    tuned.adapter.dropout = 0.1  # type: ignore[union-attr, assignment]
    with pytest.raises(AdapterError, match=r"lora_dropout=0\.1.*adapter\.dropout = 0\.0"):
        tuned(IDS, MASK, LABELS)
    with torch.no_grad():
        tuned(IDS, MASK, LABELS)
    tuned.eval()(IDS, MASK, LABELS)


def test_what_a_tuned_model_is_for_other_libraries(llama: Tiny) -> None:
    tuned, headed = (
        lora_tuning(llama.remote, rank=2, head=head)
        for head in (None, SequenceClassificationHead.for_model(llama.remote.config, 2))
    )
    assert tuned.config is llama.remote.config
    assert tuned.generation_config is llama.remote.generation_config
    assert tuned.loss_type == "ForCausalLM"
    assert headed.loss_type is None
    assert tuned._get_name() == "LlamaForCausalLM"
    assert repr(tuned).startswith("TunedModel(")
    assert repr(headed).startswith("TunedModel(")
    assert tuned.can_generate()
    assert not headed.can_generate()
    assert headed.get_output_embeddings() is None
    states = tuned.base_model(input_ids=IDS, attention_mask=MASK).last_hidden_state
    logits = tuned.get_output_embeddings()(states)
    torch.testing.assert_close(logits, tuned(IDS, MASK).logits)
    assert isinstance(tuned(IDS, MASK, LABELS, return_dict=False), tuple)
    embeds = tuned.get_input_embeddings()(IDS)
    torch.testing.assert_close(tuned(inputs_embeds=embeds, attention_mask=MASK).logits, logits)
    with pytest.raises(AdapterError, match=r"get_peft_model\(model, config\)"):
        tuned.add_adapter(None)
    with pytest.raises(InputError, match=r"TunedModel\.load"):
        TunedModel.from_pretrained("folder")
    with pytest.raises(InputError, match="either input_ids or inputs_embeds"):
        tuned(IDS, inputs_embeds=embeds)


@pytest.mark.parametrize("name", ["position_ids", "token_type_ids", "use_cache", "past_key_values"])
def test_what_does_not_go_together_with_a_soft_prompt(llama: Tiny, name: str) -> None:
    tuned = prompt_tuning(llama.remote, tokens=2, seed=1)
    values = {"use_cache": True, "past_key_values": llama.remote.new_cache()}
    with pytest.raises(InputError, match=f"leave out {name}"):
        tuned(IDS, **{name: values.get(name, IDS)})


def test_packed_rows_of_a_tuned_model(llama: Tiny) -> None:
    tuned = tuned_model("lora", llama.remote)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]] * 3)
    logits = tuned(IDS, position_ids=positions).logits
    torch.testing.assert_close(logits[:, :4], tuned(IDS[:, :4]).logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits[:, 4:], tuned(IDS[:, 4:]).logits, atol=1e-5, rtol=1e-4)
