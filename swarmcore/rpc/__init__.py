"""Calls and two-way channels of typed records between peers, over any transport."""

from swarmcore.rpc.channel import Channel
from swarmcore.rpc.method import Caller, Method, Protocol
from swarmcore.rpc.node import Node

__all__ = ["Caller", "Channel", "Method", "Node", "Protocol"]
