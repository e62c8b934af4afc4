"""Streams of whole messages over any `asyncio.Transport`: what TCP, libp2p and WebRTC have in common.

Frames, flow control by credit, heartbeats, orderly ends, migration to another byte transport, reuse of idle
connections. A back end makes byte transports, proves who is at their other end, and gives each to a
`Connection`. A message goes from `stream` (`FramedStream.send`) by `frames` and `connection` to the byte
transport, and on the other side from `connection` by `frames` to `stream` and its `flow_control`.
"""
