"""Transformers' automatic classes, over a swarm, and their tokenizers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import transformers

from swarmcore import sync
from swarmcore.checkpoint import Checkpoint, open_checkpoint
from swarmcore.client.autograd.options import PassOptions
from swarmcore.client.generation.generation_config import load_generation_config
from swarmcore.client.generation.without_blocks import load_without_blocks, with_blocks
from swarmcore.client.served_models import may_be_served, open_model
from swarmcore.client.session.options import SessionOptions
from swarmcore.errors import InputError
from swarmcore.executor.torch.device import DTYPE_NAMES
from swarmcore.identity import Identity
from swarmcore.prompts import load_tokenizer
from swarmcore.transformers.model import remote_model
from swarmcore.transformers.saving import read_saved_parts
from swarmcore.transformers.stack import RemoteStack
from swarmcore.types import Progress

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from swarmcore.training.adapter import BlockAdapter


class _AutoRemoteModel:
    """What the automatic classes have in common."""

    _auto: ClassVar[Any]
    _what: ClassVar[str]

    def __init__(self) -> None:
        raise InputError(f"make one with {type(self).__name__}.from_pretrained(name, bootstrap=[address])")

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        bootstrap: str | Sequence[str] = (),
        swarm: sync.Swarm | None = None,
        dtype: str | torch.dtype = "auto",
        revision: str | None = None,
        cache_dir: Path | None = None,
        identity: Identity | None = None,
        session_options: SessionOptions | None = None,
        pass_options: PassOptions | None = None,
        adapter: BlockAdapter | str | None = None,
        progress: Progress | None = None,
        **config: Any,
    ) -> Any:
        """The model of that folder, GGUF file, hub id, or name that the swarm has for it, its blocks remote.

        Or the model that ``save_pretrained`` wrote the trained parts of into that folder, with them.

        The swarm is the one that any of the ``bootstrap`` addresses is a member of, joined under
        ``identity`` and left by the model's ``close()``; or ``swarm``, which stays open. ``dtype`` is that of
        the parts that are here. ``session_options`` say how generations travel, ``pass_options`` how batches
        without a cache do, with their gradients. ``adapter`` is one of the client's own for the blocks, or
        the name of one that servers have; its weights are none of the model's parameters
        (`swarmcore.training.TunedModel` has them). Further options are put into the config: ``num_labels``,
        ``id2label``, ``pad_token_id`` and the like, but nothing that the blocks are computed by.

        Raise `InputError` for options that do not go together or are not in the config, what
        `swarmcore.connect` raises, `ModelNotFoundError`, `CheckpointError`, `ModelMismatchError` for parts
        that were trained on other weights, and `UnsupportedModelError` for a family without such a model.
        """
        addresses = [bootstrap] if isinstance(bootstrap, str) else list(bootstrap)
        if bool(addresses) == (swarm is not None):
            raise InputError("pass bootstrap=[address] of a member of the swarm, or a swarm=, and not both")
        if swarm is not None and identity is not None:
            raise InputError("the identity is that of the swarm= that was passed: leave it out")
        saved = read_saved_parts(Path(name_or_path))
        if saved is not None:
            name_or_path, config = saved.model, {**saved.config, **config}
        connected, served = swarm, None
        try:
            if may_be_served(str(name_or_path)):
                connected = connected or sync.connect(*addresses, identity=identity)
                served = connected.asynchronous.served(str(name_or_path))
            checkpoint = open_model(
                str(name_or_path), served, revision=revision, cache_dir=cache_dir, progress=progress
            )
            model = cls._local_parts(checkpoint, _dtype_name(dtype), config, progress)
            model.config._name_or_path = model.name_or_path = str(name_or_path)
            if saved is not None:
                saved.put_into(model, checkpoint.info)
            connected = connected or sync.connect(*addresses, identity=identity)
            stack = RemoteStack(
                connected,
                checkpoint.info,
                session_options=session_options,
                pass_options=pass_options,
                adapter=adapter,
                owns=swarm is None,
            )
            return remote_model(model, stack)
        except BaseException:
            if swarm is None and connected is not None:
                connected.close()
            raise

    @classmethod
    def _local_parts(
        cls, checkpoint: Checkpoint, dtype: str, settings: Mapping[str, Any], progress: Progress | None
    ) -> PreTrainedModel:
        text = checkpoint.config.get_text_config(decoder=True)
        if unknown := [name for name in settings if not hasattr(text, name)]:
            raise InputError(
                f"{', '.join(unknown)}: neither an option of from_pretrained here, nor in the model's config"
            )
        if changed := [name for name in settings if not _is_of_the_client(name, settings[name], text)]:
            raise InputError(
                f"{', '.join(changed)}: servers compute the blocks as the checkpoint's own config says; "
                f"change it there, and serve that"
            )
        model, _ = load_without_blocks(
            checkpoint,
            cls._auto.from_config,
            what=cls._what,
            dtype=dtype,
            settings=settings,
            progress=progress,
        )
        model.config = with_blocks(model.config, text)
        if model.can_generate():
            model.generation_config = _generation_config(checkpoint)
        return model


_OF_THE_CLIENT = frozenset(
    {
        "bos_token_id",
        "classifier_dropout",
        "dtype",
        "eos_token_id",
        "id2label",
        "label2id",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "use_cache",
    }
)
"""What of a config says nothing about the blocks."""


def _is_of_the_client(name: str, value: Any, config: Any) -> bool:
    return name in _OF_THE_CLIENT or value == getattr(config, name)


class AutoModelForCausalLM(_AutoRemoteModel):
    """Language models: `generate()` in its modes, ``forward(labels=…)``."""

    _auto = transformers.AutoModelForCausalLM
    _what = "causal language model"


class AutoModelForSequenceClassification(_AutoRemoteModel):
    """Classifiers of texts: a head on the last token, which is trained here unless the checkpoint has one."""

    _auto = transformers.AutoModelForSequenceClassification
    _what = "sequence classifier"


class AutoTokenizer:
    """As Transformers' own, for GGUF files and packages too."""

    def __init__(self) -> None:
        raise InputError("make one with AutoTokenizer.from_pretrained(name)")

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: Path | None = None,
        progress: Progress | None = None,
    ) -> PreTrainedTokenizerBase:
        """The tokenizer of that folder, GGUF file or hub id; one without padding pads with its last token.

        Raise `ModelNotFoundError`, and `CheckpointError` when there is no tokenizer.
        """
        checkpoint = open_checkpoint(
            str(name_or_path), revision=revision, cache_dir=cache_dir, progress=progress
        )
        tokenizer = load_tokenizer(checkpoint.folder, checkpoint.name)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer


def _dtype_name(dtype: str | torch.dtype) -> str:
    if isinstance(dtype, str):
        return dtype
    if dtype not in DTYPE_NAMES:
        raise InputError(f"dtype {dtype} is not known; use {', '.join(DTYPE_NAMES.values())}")
    return DTYPE_NAMES[dtype]


def _generation_config(checkpoint: Checkpoint) -> GenerationConfig:
    """The model's own defaults, but for how its cache is kept."""
    config = load_generation_config(checkpoint)
    config.cache_implementation = None
    return config
