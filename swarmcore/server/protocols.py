"""The protocols a block server speaks, as the rpc layer knows them."""

from __future__ import annotations

from swarmcore.rpc.method import Method, Protocol
from swarmcore.wire.messages import (
    INFERENCE,
    INFO,
    PING,
    InfoReply,
    InfoRequest,
    JoinSession,
    OpenSession,
    Ping,
    Pong,
    SessionOpened,
    Step,
    StepFailed,
    StepOutput,
)

INFERENCE_PROTOCOL = Protocol(
    name=INFERENCE,
    openings=(OpenSession, JoinSession),
    to_acceptor=(Step,),
    to_opener=(SessionOpened, StepOutput, StepFailed),
)
INFO_METHOD = Method(name=INFO, request=InfoRequest, reply=InfoReply)
PING_METHOD = Method(name=PING, request=Ping, reply=Pong)
