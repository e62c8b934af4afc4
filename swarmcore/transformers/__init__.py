"""A swarm through Hugging Face Transformers: its own model classes, with the blocks on servers.

from swarmcore.transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("…", bootstrap=["tcp://…"])
model.generate(**tokenizer("The sea", return_tensors="pt"), num_beams=4)
"""

from __future__ import annotations

import swarmcore.executor.torch  # noqa: F401  (before all else: it says which extra is missing)
from swarmcore.transformers.auto import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from swarmcore.transformers.cache import RemoteCache

__all__ = ["AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoTokenizer", "RemoteCache"]
