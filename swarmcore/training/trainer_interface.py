"""What Transformers' Trainer, TRL and pipelines ask of a model besides calling it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self, cast

import torch
from safetensors.torch import save
from transformers import PreTrainedModel

from swarmcore.checkpoint.storage import save_file
from swarmcore.errors import AdapterError, InputError
from swarmcore.training.adapter import BlockAdapter, CombinedAdapter
from swarmcore.training.heads import ClassificationHead
from swarmcore.training.prompt import SoftPrompt
from swarmcore.training.training_modes import NoActivationCheckpointing, note_dropout


class TrainerInterface(NoActivationCheckpointing, PreTrainedModel):  # type: ignore[misc]
    """A ``PreTrainedModel`` that has the config of another one, ``model``, and what is trained besides it."""

    model: Any
    prompt: SoftPrompt | None
    adapter: BlockAdapter | None
    head: ClassificationHead | None

    @property
    def config(self) -> Any:
        """The model's."""
        return self.model.config

    @property
    def generation_config(self) -> Any:
        """The model's."""
        return self.model.generation_config

    @generation_config.setter
    def generation_config(self, config: Any) -> None:
        self.model.generation_config = config

    @property
    def name_or_path(self) -> str:
        """What the model was loaded from."""
        return str(self.model.name_or_path)

    @property
    def dtype(self) -> torch.dtype:
        """That of the model, not of what is trained."""
        return cast(torch.dtype, self.model.dtype)

    @property
    def base_model(self) -> Any:
        """Called as a base model, it gives hidden states instead of logits, with what was tuned."""
        return self._states

    @property
    def loss_type(self) -> str | None:
        """By Transformers' names: ``Trainer`` tells by it how many labels of a batch the loss is over."""
        return cast("str | None", self.model.loss_type) if self.head is None else None

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Transformers' ``Trainer`` asks: whether the loss is over the items of all accumulated batches when
        their number is passed. That of a head is the mean of one batch."""
        return self.head is None

    def _get_name(self) -> str:
        # Trainer's label smoothing shifts labels by one for classes of language models, told by their names.
        return str(self.model._get_name()) if self.head is None else type(self).__name__

    def __repr__(self) -> str:
        return type(self).__name__ + str(super().__repr__()).removeprefix(self._get_name())

    def train(self, mode: bool = True) -> Self:
        """As any module's; says once that dropout inside of the blocks is left out."""
        if mode:
            note_dropout(self.config)
        return cast(Self, super().train(mode))

    def get_input_embeddings(self) -> Any:
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.model.get_output_embeddings() if self.head is None else None

    def can_generate(self) -> bool:
        return self.head is None

    def add_adapter(self, *args: Any, **options: Any) -> None:
        """Raise `AdapterError`: what is trained is given when it is made."""
        raise AdapterError(
            "a TunedModel takes no further adapters: pass adapter= when you make it, or put PEFT's on the "
            "remote model itself (peft.get_peft_model(model, config), model.add_adapter(config))"
        )

    load_adapter = add_adapter

    @classmethod
    def from_pretrained(cls, *args: Any, **options: Any) -> Self:
        """Raise `InputError`: use `load`."""
        raise InputError("use TunedModel.load(model, folder), over a model of AutoModelForCausalLM")

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        **options: Any,
    ) -> None:
        """As ``Trainer`` saves: what `save` writes where PEFT has a file for it, and the `state_dict`.

        Raise `InputError` for ``push_to_hub``, `StorageError` when the disk refuses; other ``options`` make
        no difference.
        """
        if options.get("push_to_hub"):
            raise InputError("leave out push_to_hub: save to a folder, and upload that")
        if not is_main_process:
            return
        state = self.state_dict() if state_dict is None else state_dict
        tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
        save_file(Path(save_directory) / "model.safetensors", save(tensors, metadata={"format": "pt"}))
        if (self.prompt is None) != (self.adapter is None) and not isinstance(self.adapter, CombinedAdapter):
            self.save(save_directory)
