"""WebRTC: data channels between peers that meet at a signalling service, through any NAT in between."""

from swarmcore_transports.webrtc.transport import WebRtcTransport

__all__ = ["WebRtcTransport"]
