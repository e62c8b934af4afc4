"""Calls and two-way channels of typed records between peers, over any transport."""

from swarmcore.rpc.channel import Channel
from swarmcore.rpc.node import Node
from swarmcore.wire.method import Caller, Method, Protocol

__all__ = ["Caller", "Channel", "Method", "Node", "Protocol"]
