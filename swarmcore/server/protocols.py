"""The protocols a block server speaks, as the rpc layer knows them."""

from __future__ import annotations

from swarmcore.rpc.method import Method, Protocol
from swarmcore.wire.messages import (
    INFERENCE,
    INFO,
    PING,
    CachePart,
    CachesTaken,
    Draining,
    HandOver,
    HandOverFailed,
    InfoReply,
    InfoRequest,
    JoinSession,
    OpenSession,
    Ping,
    Pong,
    Replay,
    SessionOpened,
    Step,
    StepFailed,
    StepForwarded,
    StepOutput,
)

INFERENCE_PROTOCOL = Protocol(
    name=INFERENCE,
    openings=(OpenSession, JoinSession),
    to_acceptor=(Step, Replay, HandOver, CachePart),
    to_opener=(
        SessionOpened,
        StepOutput,
        StepForwarded,
        StepFailed,
        Draining,
        HandOverFailed,
        CachesTaken,
    ),
)
INFO_METHOD = Method(name=INFO, request=InfoRequest, reply=InfoReply)
PING_METHOD = Method(name=PING, request=Ping, reply=Pong)
