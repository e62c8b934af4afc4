"""What every `Registry` backend has to do: a pytest suite to run on yours.

Describe how peers come and go with a `RegistrySwarm`, and give it to the suite as a fixture::

    class TestMyRegistry(RegistryContract):
        @pytest.fixture
        async def swarm(self):
            async with aclosing(MySwarm()) as swarm:
                yield swarm

The tests are coroutines: pytest-asyncio in its ``auto`` mode runs them. A backend that keeps to the time of
its event loop can run them on a `VirtualClockLoop`, where the waits for expiry take no time.
"""

import pytest

# Before the imports, so that a failing assertion shows its values in an author's own test run.
pytest.register_assert_rewrite(*(f"{__name__}.{module}" for module in ("harness", "suite")))

from swarmcore.testing.registry_contract.suite import (  # noqa: E402
    Member,
    RegistryContract,
    RegistrySwarm,
)

__all__ = ["Member", "RegistryContract", "RegistrySwarm"]
