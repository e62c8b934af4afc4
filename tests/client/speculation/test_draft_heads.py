"""Draft heads: Transformers' own for MTP layers, and a plain reading of EAGLE, propose the same."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from swarmcore.checkpoint import Checkpoint, open_checkpoint
from swarmcore.client.generation.draft_loading import load_draft
from swarmcore.client.generation.local_model import LocalParts
from swarmcore.client.speculation.draft_heads import DraftHead, DraftHeads
from swarmcore.client.speculation.head_loading import is_eagle, load_eagle_head, load_mtp_head
from swarmcore.errors import CheckpointError, InputError, UnsupportedModelError

VOCABULARY = 257
HIDDEN = 32
FAMILIES: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "kv_lora_rank": 16,
        "q_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "glm4_moe": {"num_key_value_heads": 2, "head_dim": 8},
}
Reference = Callable[[list[int], torch.Tensor, int], list[int]]
"""Of a text, the normed rows of all of its tokens but the last, and a number of tokens: those drafted."""


def random_model(family: str, layers: int, **config: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(
            family,
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=256,
            **config,
        )
    )
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)
        else:
            parameter.data.mul_(6)
    return model.eval()


def save_with_mtp(folder: Path, family: str) -> None:
    """A model of two blocks and an MTP layer, as DeepSeek's checkpoints have it: after the blocks."""
    options = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1}
    model = random_model(family, 3, topk_group=1, first_k_dense_replace=1, **options, **FAMILIES[family])
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    prefix = "model.layers.2."
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{prefix}{norm}.weight"] = 1 + torch.randn(HIDDEN) * 0.2
    tensors[f"{prefix}eh_proj.weight"] = torch.randn(HIDDEN, 2 * HIDDEN) * 0.3
    tensors[f"{prefix}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[f"{prefix}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    edit_config(folder, num_hidden_layers=2, num_nextn_predict_layers=1)


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))


@torch.inference_mode()
def rows_of(model: Any, text: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """What comes out of the last block, and the same behind the final norm."""
    before: list[torch.Tensor] = []
    hook = model.model.norm.register_forward_pre_hook(lambda module, args: before.append(args[0][0]))
    normed = model.model(torch.tensor([text])).last_hidden_state[0]
    hook.remove()
    return before[0], normed


def mtp_reference(folder: Path) -> tuple[Any, Reference]:
    layers = pytest.importorskip("transformers.modeling_layers")
    if not hasattr(layers, "MtpModel"):
        pytest.skip("this version of Transformers has no MTP layers")
    from transformers.cache_utils import MtpCache

    main = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    main._keys_to_ignore_on_load_unexpected = [r"model\.layers\.2\..*"]
    mtp = layers.MtpModel.from_pretrained(main).eval()

    @torch.inference_mode()
    def draft(text: list[int], normed: torch.Tensor, k: int) -> list[int]:
        cache = MtpCache(config=main.config.get_mtp_config())
        ids, hidden = list(text[1:]), normed[None]
        place, tokens = 1, list[int]()
        while len(tokens) < k:
            positions = torch.arange(place, place + len(ids))[None]
            out = mtp.forward_layer(0, hidden, positions, cache, input_ids=torch.tensor([ids]))
            place += len(ids)
            hidden = out[:, -1:]
            ids = [int(main.lm_head(hidden)[0, 0].argmax())]
            tokens += ids
        return tokens

    return main, draft


def eagle_reference(main: Any, head: Any, fc: nn.Linear) -> Reference:
    """From the whole text each time: a layer of Llama without its first norm, over joined vectors."""
    head.model.layers[0].input_layernorm = nn.Identity()
    head.model.norm = nn.Identity()

    @torch.inference_mode()
    def draft(text: list[int], normed: torch.Tensor, k: int) -> list[int]:
        ids, hidden = list(text[1:]), normed
        for _ in range(k):
            joined = fc(torch.cat([main.model.embed_tokens(torch.tensor(ids)), hidden], -1))
            out = head.model(inputs_embeds=joined[None], use_cache=False).last_hidden_state[0]
            hidden = torch.cat([hidden, out[-1:]])
            ids.append(int(main.lm_head(out[-1]).argmax()))
        return ids[len(text) - 1 :]

    return draft


def save_eagle(folder: Path, *, bias: bool = False) -> tuple[Any, nn.Linear]:
    head = random_model("llama", 1, num_key_value_heads=2)
    head.save_pretrained(folder)
    fc = nn.Linear(2 * HIDDEN, HIDDEN, bias=bias)
    fc.weight.data.normal_(0, 0.3)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    for name in ("layers.0.input_layernorm.weight", "norm.weight", "lm_head.weight"):
        del tensors[name]
    tensors |= {f"fc.{name}": tensor.data for name, tensor in fc.named_parameters()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    edit_config(folder, architectures=["LlamaForCausalLMEagle"], bias=bias)
    return head, fc


def opened(folder: Path, tmp_path: Path) -> Checkpoint:
    return open_checkpoint(str(folder), cache_dir=tmp_path / "cache")


@pytest.fixture(params=[*FAMILIES, "eagle", "eagle with bias"])
def case(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[DraftHead, LocalParts, Any, Reference]:
    """A head, the parts of its model that clients have, the whole model, and what should be drafted."""
    if request.param in FAMILIES:
        folder = tmp_path / "model"
        save_with_mtp(folder, request.param)
        checkpoint = opened(folder, tmp_path)
        main, reference = mtp_reference(folder)
        head = load_mtp_head(checkpoint, dtype="float32")
    else:
        folder = tmp_path / "model"
        main = random_model("llama", 2, num_key_value_heads=2)
        main.save_pretrained(folder)
        checkpoint = opened(folder, tmp_path)
        block, fc = save_eagle(tmp_path / "eagle", bias="bias" in request.param)
        reference = eagle_reference(main, block, fc)
        head = load_eagle_head(opened(tmp_path / "eagle", tmp_path), HIDDEN, VOCABULARY, dtype="float32")
    return head, LocalParts.load(checkpoint, dtype="float32"), main, reference


def test_it_drafts_what_the_reference_drafts(case: tuple[DraftHead, LocalParts, Any, Reference]) -> None:
    head, parts, main, reference = case
    chance = random.Random(0)
    source = DraftHeads(head, parts, stop_below=0.0)
    text = [chance.randrange(256) for _ in range(12)]
    hidden, normed = rows_of(main, text)
    drafter = source.drafter()
    drafter.append(text)
    assert drafter.propose([], 3) == []  # it has seen no row yet
    drafter.observe(0, hidden[:11])
    assert drafter.propose([], 4) == reference(text, normed[:11], 4)
    assert len(drafter.probabilities) == 4 and all(0 < each <= 1 for each in drafter.probabilities)
    # Drafts that are under way: it goes through them on its own guesses, and forgets them.
    ahead = reference(text, normed[:11], 2)
    assert [*ahead, *drafter.propose(ahead, 2)] == reference(text, normed[:11], 4)
    assert drafter.propose([], 4) == reference(text, normed[:11], 4)
    # Some are accepted; their rows come before or after the tokens themselves, at once or in parts.
    for accepted in (3, 1, 2):
        new = [chance.randrange(256) for _ in range(accepted)]
        start = len(text) - 1
        text += new
        hidden, normed = rows_of(main, text)
        drafter.observe(start, hidden[start : start + 2][:accepted])
        drafter.append(new)
        drafter.observe(start + 2, hidden[start + 2 : -1])
        assert drafter.propose([], 3) == reference(text, normed[:-1], 3)
    drafter.close()


def test_where_rows_are_missing_it_begins_with_those_it_has(
    case: tuple[DraftHead, LocalParts, Any, Reference],
) -> None:
    head, parts, main, reference = case
    text = list(range(40, 60))
    hidden, normed = rows_of(main, text)
    drafter = DraftHeads(head, parts, stop_below=0.0).drafter()
    drafter.append(text)
    drafter.observe(9, hidden[9:19])
    late = drafter.propose([], 3)
    assert late == reference(text[9:], normed[9:19], 3)
    drafter.observe(15, hidden[15:19])
    assert drafter.propose([], 3) == reference(text[15:], normed[15:19], 3)


def test_a_proposal_ends_where_it_becomes_unlikely(
    case: tuple[DraftHead, LocalParts, Any, Reference],
) -> None:
    head, parts, main, _ = case
    text = list(range(20))
    drafter = DraftHeads(head, parts, stop_below=1.0).drafter()
    drafter.append(text)
    drafter.observe(0, rows_of(main, text)[0][:19])
    assert len(drafter.propose([], 5)) == 1


def test_they_are_named_as_drafts(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_with_mtp(folder, "glm4_moe")
    save_eagle(tmp_path / "eagle")
    checkpoint = opened(folder, tmp_path)
    parts = LocalParts.load(checkpoint, dtype="float32")
    for draft in ("heads", str(tmp_path / "eagle")):
        assert isinstance(load_draft(draft, checkpoint, parts, byte_tokenizer()), DraftHeads)


# --- what is refused, by name ---------------------------------------------------------------------------


def test_a_model_without_heads_says_so(llama_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="brings no draft heads"):
        load_mtp_head(opened(llama_folder, tmp_path))


def test_heads_of_another_family_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    random_model("llama", 2, num_key_value_heads=2).save_pretrained(folder)
    edit_config(folder, num_nextn_predict_layers=1)
    with pytest.raises(UnsupportedModelError, match=r"'llama'.*those of deepseek_v3 and glm4_moe are"):
        load_mtp_head(opened(folder, tmp_path))


@pytest.mark.parametrize("change", ["two layers", "missing", "misshapen", "unknown"])
def test_an_mtp_layer_that_is_not_understood_is_refused(change: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    save_with_mtp(folder, "glm4_moe")
    tensors = load_file(folder / "model.safetensors")
    expected: tuple[type[Exception], str]
    match change:
        case "two layers":
            edit_config(folder, num_nextn_predict_layers=2)
            expected = UnsupportedModelError, "num_nextn_predict_layers 2"
        case "missing":
            del tensors["model.layers.2.hnorm.weight"]
            expected = CheckpointError, "hnorm"
        case "misshapen":
            tensors["model.layers.2.eh_proj.weight"] = torch.zeros(HIDDEN, HIDDEN)
            expected = CheckpointError, r"eh_proj.*\[32, 32\]"
        case _:
            tensors["model.layers.2.gate_of_heads.weight"] = torch.zeros(3)
            expected = UnsupportedModelError, "gate_of_heads"
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(expected[0], match=expected[1]):
        load_mtp_head(opened(folder, tmp_path))


def test_eagle_heads_are_told_from_models(llama_folder: Path, tmp_path: Path) -> None:
    save_eagle(tmp_path / "eagle")
    assert is_eagle(opened(tmp_path / "eagle", tmp_path))
    assert not is_eagle(opened(llama_folder, tmp_path))


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({"architectures": ["LlamaForCausalLMEagle3"]}, {}, "EAGLE-3 head: it reads what inner blocks"),
        ({}, {"d2t": torch.zeros(4)}, "EAGLE-3"),
        ({}, {"layers.0.input_layernorm.weight": torch.ones(HIDDEN)}, "input_layernorm"),
        ({}, {"layers.0.self_attn.sinks": torch.ones(4)}, "sinks"),
        ({"draft_vocab_size": 100}, {}, "draft_vocab_size 100"),
        ({"residual_scale": 2.0}, {}, "residual_scale"),
        ({"num_hidden_layers": 2}, {}, "2 blocks"),
        ({"hidden_size": 64}, {}, "hidden states of 64"),
        ({"vocab_size": 300}, {}, "300 tokens"),
    ],
)
def test_an_eagle_head_that_is_not_understood_is_refused(
    config: dict[str, Any], tensors: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    folder = tmp_path / "eagle"
    save_eagle(folder)
    edit_config(folder, **config)
    save_file(
        load_file(folder / "model.safetensors") | tensors, folder / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(UnsupportedModelError, match=message):
        load_eagle_head(opened(folder, tmp_path), HIDDEN, VOCABULARY)
