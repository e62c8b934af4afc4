"""libp2p: TCP with Noise and Yamux, with relays and hole punching for peers behind routers."""

from swarmcore_transports.libp2p.relay.limits import RelayLimits
from swarmcore_transports.libp2p.transport import Libp2pTransport

__all__ = ["Libp2pTransport", "RelayLimits"]
