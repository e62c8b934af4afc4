"""Trainable parts that a client owns: adapters of remote blocks, soft prompts, heads; and their training.

Servers' weights are frozen and shared by everyone (arXiv 2312.08361, section 2.2). What is trained is small
and stays with the client, who also has its optimiser.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swarmcore.training.adapter import BlockAdapter, CombinedAdapter
    from swarmcore.training.fit_run import FitReport
    from swarmcore.training.fit_settings import EarlyStop, Evaluation, FitSettings, StepReport
    from swarmcore.training.fitting import fit, fit_sync
    from swarmcore.training.heads import SequenceClassificationHead, TokenClassificationHead
    from swarmcore.training.local_steps import LocalSteps, LocalStepsSettings, RoundReport
    from swarmcore.training.lora import LoraAdapter
    from swarmcore.training.peft_format import LoadedAdapter, load_adapter, save_adapter
    from swarmcore.training.prefix import PrefixAdapter
    from swarmcore.training.prompt import SoftPrompt
    from swarmcore.training.tuning import TunedModel, deep_prompt_tuning, lora_tuning, prompt_tuning

_PLACES = {
    "BlockAdapter": "adapter",
    "CombinedAdapter": "adapter",
    "EarlyStop": "fit_settings",
    "Evaluation": "fit_settings",
    "FitReport": "fit_run",
    "FitSettings": "fit_settings",
    "LoadedAdapter": "peft_format",
    "LocalSteps": "local_steps",
    "LocalStepsSettings": "local_steps",
    "LoraAdapter": "lora",
    "PrefixAdapter": "prefix",
    "RoundReport": "local_steps",
    "SequenceClassificationHead": "heads",
    "SoftPrompt": "prompt",
    "StepReport": "fit_settings",
    "TokenClassificationHead": "heads",
    "TunedModel": "tuning",
    "deep_prompt_tuning": "tuning",
    "fit": "fitting",
    "fit_sync": "fitting",
    "load_adapter": "peft_format",
    "lora_tuning": "tuning",
    "prompt_tuning": "tuning",
    "save_adapter": "peft_format",
}

__all__ = [
    "BlockAdapter",
    "CombinedAdapter",
    "EarlyStop",
    "Evaluation",
    "FitReport",
    "FitSettings",
    "LoadedAdapter",
    "LocalSteps",
    "LocalStepsSettings",
    "LoraAdapter",
    "PrefixAdapter",
    "RoundReport",
    "SequenceClassificationHead",
    "SoftPrompt",
    "StepReport",
    "TokenClassificationHead",
    "TunedModel",
    "deep_prompt_tuning",
    "fit",
    "fit_sync",
    "load_adapter",
    "lora_tuning",
    "prompt_tuning",
    "save_adapter",
]


def __getattr__(name: str) -> Any:
    place = _PLACES.get(name)
    if place is None:
        raise AttributeError(f"module 'swarmcore.training' has no attribute {name!r}")
    import swarmcore.executor.torch  # noqa: F401  (it says which extra is missing)

    value = getattr(import_module(f"swarmcore.training.{place}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
