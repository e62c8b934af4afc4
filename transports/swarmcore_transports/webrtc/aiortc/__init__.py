"""The WebRTC engine on aiortc and aioice, and what of these is repaired."""
