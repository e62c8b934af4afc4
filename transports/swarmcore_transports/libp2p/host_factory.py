"""The host of py-libp2p, as it is configured and repaired here."""

from __future__ import annotations

from collections.abc import Callable

from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.host.basic_host import BasicHost
from libp2p.network.config import ConnectionConfig
from libp2p.network.swarm import Swarm
from libp2p.rcmgr.manager import ResourceLimits, ResourceManager
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.yamux.yamux import Yamux
from multiaddr import Multiaddr

from swarmcore.identity import Identity
from swarmcore.wire.limits import Limits
from swarmcore_transports.libp2p.patches.host import demote_logs, install
from swarmcore_transports.libp2p.patches.tcp import TcpSockets
from swarmcore_transports.libp2p.patches.yamux import YAMUX


def make_host(
    identity: Identity, limits: Limits, sockets: TcpSockets, announced: Callable[[], list[Multiaddr]]
) -> tuple[BasicHost, Swarm]:
    """A host over ``sockets``, with Noise and Yamux, that tells others the addresses ``announced``."""
    demote_logs()
    key_pair = create_new_key_pair(identity.private_key.private_bytes_raw())
    noise = NoiseTransport(key_pair, noise_privkey=create_noise_key_pair().private_key)
    host = new_host(
        key_pair=key_pair,
        sec_opt={NOISE: noise},
        muxer_opt={YAMUX: Yamux},
        transports=[sockets],
        resource_manager=_resources(limits),
        connection_config=_connections(limits),
        negotiate_timeout=max(1, int(limits.connect_timeout)),
        addrs_factory=lambda candidates: announced(),
    )
    swarm = host.get_network()
    assert isinstance(host, BasicHost) and isinstance(swarm, Swarm)
    install(swarm, limits)
    return host, swarm


def _connections(limits: Limits) -> ConnectionConfig:
    return ConnectionConfig(
        max_connections=limits.max_calls,
        high_watermark=limits.max_calls,
        min_connections=0,
        low_watermark=0,
        max_connections_per_peer=8,
        inbound_upgrade_timeout=limits.connect_timeout,
        outbound_upgrade_timeout=limits.connect_timeout,
        outbound_stream_protocol_negotiation_timeout=max(1.0, limits.connect_timeout),
        inbound_stream_protocol_negotiation_timeout=max(1.0, limits.connect_timeout),
    )


def _resources(limits: Limits) -> ResourceManager:
    """Bounds that never bind before ours do, and none of the extras: no metrics, no pools, no rates."""
    return ResourceManager(
        limits=ResourceLimits(
            max_connections=2 * limits.max_calls, max_memory_mb=2**20, max_streams=8 * limits.max_calls
        ),
        enable_metrics=False,
        enable_connection_tracking=False,
        enable_memory_limits=False,
        enable_circuit_breaker=False,
        enable_graceful_degradation=False,
        enable_rate_limiting=False,
    )
