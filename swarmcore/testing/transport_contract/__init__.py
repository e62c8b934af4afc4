"""What every `Transport` must satisfy, as tests that a backend runs on itself.

Subclass `TransportContract`, say how a transport is made, and let pytest (with pytest-asyncio) collect it::

    class TestMyTransport(TransportContract):
        def make(self, identity: Identity, limits: Limits, listen_on: Sequence[str]) -> Transport:
            return MyTransport(identity, limits=limits, listen_on=listen_on)

        def free_place(self) -> str:
            return "127.0.0.1:0"

The tests are deterministic and take seconds. They never measure speed.
"""

import pytest

# Before the imports, so that a failing assertion shows its values in an author's own test run.
pytest.register_assert_rewrite(
    *(f"{__name__}.{module}" for module in ("harness", "messages", "endings", "cancellation", "peers"))
)

from swarmcore.testing.transport_contract.cancellation import CancellationContract  # noqa: E402
from swarmcore.testing.transport_contract.endings import EndingsContract  # noqa: E402
from swarmcore.testing.transport_contract.harness import Pair  # noqa: E402
from swarmcore.testing.transport_contract.messages import MessagesContract  # noqa: E402
from swarmcore.testing.transport_contract.peers import PeersContract  # noqa: E402


class TransportContract(MessagesContract, EndingsContract, CancellationContract, PeersContract):
    """The whole contract. Override `send_garbage` and `kill` where the backend has sockets."""


__all__ = ["Pair", "TransportContract"]
