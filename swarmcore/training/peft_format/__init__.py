"""PEFT's files: ``adapter_config.json`` and ``adapter_model.safetensors``, read and written without PEFT.

Low-rank updates, prefixes and soft prompts, each with a head if it has one. What PEFT wrote is read here, and
what is written here is read by ``peft.PeftModel.from_pretrained`` on the plain local model.
"""

from swarmcore.training.peft_format.loading import LoadedAdapter, load_adapter, read_adapter
from swarmcore.training.peft_format.saving import save_adapter

__all__ = ["LoadedAdapter", "load_adapter", "read_adapter", "save_adapter"]
