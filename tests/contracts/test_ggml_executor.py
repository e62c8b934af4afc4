from pathlib import Path

import pytest

from swarmcore.executor.base import BlockExecutor
from swarmcore.executor.loader import LoadSettings
from swarmcore.testing.executor_contract import ExecutorContract
from swarmcore.types import Span

pytest.importorskip("llama_cpp", reason="needs the extra ggml")
gguf = pytest.importorskip("gguf")

from random_gguf import write_random_gguf  # noqa: E402

# How far a batch may be from its rows one by one depends on the kernels for the types.
TOLERANCES = {("F32", "f32"): 1e-4, ("BF16", "f16"): 5e-2, ("Q8_0", "f16"): 0.1}


@pytest.fixture(scope="module", params=TOLERANCES, ids="-".join)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, float]:
    kind, cache_dtype = request.param
    path = tmp_path_factory.mktemp("model") / f"{kind}.gguf"
    write_random_gguf(path, kind=gguf.GGMLQuantizationType[kind])
    return path, cache_dtype, TOLERANCES[request.param]


class TestGgmlExecutor(ExecutorContract):
    large_step = 512

    @pytest.fixture(autouse=True)
    def _use(
        self,
        made: tuple[Path, str, float],
        tmp_path_factory: pytest.TempPathFactory,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        self.path, self.cache_dtype, self.tolerance = made
        monkeypatch.setenv("SWARMCORE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))

    async def make(self) -> BlockExecutor:
        from swarmcore.executor.ggml.loader import GgmlLoader

        settings = LoadSettings(model=str(self.path), threads=1, cache_dtype=self.cache_dtype)
        return GgmlLoader(settings).load(Span(1, 4))
