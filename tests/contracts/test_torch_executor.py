import copy
from pathlib import Path
from typing import Any

import pytest

from swarmcore.executor.base import BlockExecutor
from swarmcore.testing.executor_contract import ExecutorContract
from swarmcore.testing.executor_contract.caches import CachesContract
from swarmcore.testing.executor_contract.steps import SpansContract, StepsContract
from swarmcore.types import Span

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module", params=["llama", "mistral", "bloom"])
def checkpoint_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Full attention, a sliding window shorter than the test's sequences, and ALiBi."""
    options = dict(SIZES)
    if request.param == "mistral":
        options["sliding_window"] = 4
    if request.param == "bloom":
        options = {"vocab_size": 32, "hidden_size": 64, "n_layer": 4, "n_head": 4}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(request.param, **options)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    folder: Path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return folder


_loaded: dict[object, Any] = {}


def load_once(checkpoint: Any, span: Span, **options: Any) -> Any:
    """As `load_span`, by which each span is loaded once; what comes of it is copied for each test."""
    from swarmcore.executor.torch.span import load_span

    key = str(checkpoint.folder), span, options["dtype"], options["weights"]
    if key not in _loaded:
        _loaded[key] = load_span(checkpoint, span, **options)
    return copy.deepcopy(_loaded[key])


class LoadsTorch:
    large_step = 1024
    weights = "auto"
    cache_dtype = "auto"

    @pytest.fixture(autouse=True)
    def _use(self, checkpoint_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = checkpoint_folder
        monkeypatch.setattr("swarmcore.executor.torch.executor.load_span", load_once)

    async def make(self) -> BlockExecutor:
        from swarmcore.checkpoint import open_checkpoint
        from swarmcore.executor.torch.executor import TorchExecutor

        checkpoint = open_checkpoint(str(self.folder))
        return TorchExecutor.load(
            checkpoint,
            Span(1, 4),
            dtype="float32",
            weights=self.weights,
            cache_dtype=self.cache_dtype,
            threads=1,
        )


class TestTorchExecutor(LoadsTorch, ExecutorContract):
    pass


@pytest.mark.parametrize("checkpoint_folder", ["llama"], indirect=True)
class TestInt8Caches(LoadsTorch, StepsContract, CachesContract, SpansContract):
    """Without passes for training, which have no caches."""

    cache_dtype = "int8"
    # Where rounding differs, between a batch and its rows, a value may come to be the next integer.
    tolerance = 2e-2


@pytest.mark.parametrize("checkpoint_folder", ["llama"], indirect=True)
class TestInt8Weights(TestTorchExecutor):
    weights = "int8"


@pytest.mark.parametrize("checkpoint_folder", ["llama"], indirect=True)
class TestInt4Weights(TestTorchExecutor):
    weights = "int4"


@pytest.mark.parametrize("checkpoint_folder", ["llama"], indirect=True)
class TestNf4Weights(TestTorchExecutor):
    weights = "nf4"

    @pytest.fixture(autouse=True)
    def _needs(self) -> None:
        pytest.importorskip("bitsandbytes")
