"""WebRTC: data channels between peers that meet at a signalling service, through any NAT in between."""

import aiortc as _aiortc  # noqa: F401 - whoever lacks the extra hears of it here, before anything is made

from swarmcore_transports.webrtc.transport import WebRtcTransport

__all__ = ["WebRtcTransport"]
