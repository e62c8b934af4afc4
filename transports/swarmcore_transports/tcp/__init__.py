"""TCP with TLS 1.3: both peers proven, one connection per stream, idle connections kept for the next."""

from swarmcore_transports.tcp.transport import TcpTransport

__all__ = ["TcpTransport"]
