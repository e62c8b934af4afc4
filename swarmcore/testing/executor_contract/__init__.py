"""What every `BlockExecutor` must satisfy, as tests that a backend runs on itself.

Subclass `ExecutorContract`, say how an executor is made, and let pytest (with pytest-asyncio) collect it::

    class TestMyExecutor(ExecutorContract):
        async def make(self) -> BlockExecutor:
            return MyExecutor(...)
"""

import pytest

# Before the imports, so that a failing assertion shows its values in an author's own test run.
pytest.register_assert_rewrite(
    *(f"{__name__}.{module}" for module in ("harness", "steps", "caches", "forward_backward"))
)

from swarmcore.testing.executor_contract.caches import CachesContract  # noqa: E402
from swarmcore.testing.executor_contract.forward_backward import ForwardBackwardContract  # noqa: E402
from swarmcore.testing.executor_contract.steps import SpansContract, StepsContract  # noqa: E402


class ExecutorContract(StepsContract, CachesContract, SpansContract, ForwardBackwardContract):
    """The whole contract. Override `tolerance` where arithmetic is exact."""


__all__ = ["ExecutorContract"]
