from swarmcore.executor.base import BlockExecutor
from swarmcore.testing.executor import CountingExecutor
from swarmcore.testing.executor_contract import ExecutorContract


class TestCountingExecutor(ExecutorContract):
    tolerance = 0.0

    async def make(self) -> BlockExecutor:
        return CountingExecutor()
