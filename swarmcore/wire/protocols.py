"""The protocols that servers speak, as the rpc layer knows them."""

from __future__ import annotations

import attrs

from swarmcore.wire.forward_backward import (
    BACKWARD,
    BACKWARD_OF_PADDING,
    FORWARD,
    FORWARD_OF_PADDING,
    AdapterPart,
    AdapterWanted,
    BackwardDone,
    ForwardDone,
    InputsWanted,
    OpenBackward,
    OpenForward,
    PassProgress,
    Rows,
)
from swarmcore.wire.generate import (
    GENERATE,
    GenerationEnded,
    GenerationStarted,
    OpenGeneration,
    TextPiece,
    TokensTaken,
)
from swarmcore.wire.messages import (
    INFERENCE,
    INFO,
    PING,
    SESSION_STATE,
    AllowUpstream,
    AskSession,
    CachePart,
    Draining,
    InfoReply,
    InfoRequest,
    JoinSession,
    KvTransferFailed,
    KvTransferred,
    NamePages,
    OpenSession,
    Ping,
    Pong,
    Recall,
    Replay,
    SessionOpened,
    SessionState,
    Step,
    StepFailed,
    StepForwarded,
    StepOutput,
    TransferKv,
)
from swarmcore.wire.method import Method, Protocol

INFERENCE_PROTOCOL = Protocol(
    name=INFERENCE,
    openings=(OpenSession, JoinSession),
    to_acceptor=(Step, Recall, Replay, TransferKv, AllowUpstream, NamePages, CachePart, AdapterPart),
    to_opener=(
        SessionOpened,
        AdapterWanted,
        StepOutput,
        StepForwarded,
        StepFailed,
        Draining,
        KvTransferFailed,
        KvTransferred,
    ),
)
FORWARD_PROTOCOL = Protocol(
    name=FORWARD,
    openings=(OpenForward,),
    to_acceptor=(Rows, AdapterPart),
    to_opener=(AdapterWanted, Rows, PassProgress, ForwardDone),
)
BACKWARD_PROTOCOL = Protocol(
    name=BACKWARD,
    openings=(OpenBackward,),
    to_acceptor=(Rows, AdapterPart),
    to_opener=(InputsWanted, AdapterWanted, Rows, AdapterPart, PassProgress, BackwardDone),
)
FORWARD_OF_PADDING_PROTOCOL = attrs.evolve(FORWARD_PROTOCOL, name=FORWARD_OF_PADDING)
BACKWARD_OF_PADDING_PROTOCOL = attrs.evolve(BACKWARD_PROTOCOL, name=BACKWARD_OF_PADDING)
GENERATE_PROTOCOL = Protocol(
    name=GENERATE,
    openings=(OpenGeneration,),
    to_acceptor=(TokensTaken,),
    to_opener=(GenerationStarted, TextPiece, GenerationEnded),
)
INFO_METHOD = Method(name=INFO, request=InfoRequest, reply=InfoReply)
PING_METHOD = Method(name=PING, request=Ping, reply=Pong)
SESSION_STATE_METHOD = Method(name=SESSION_STATE, request=AskSession, reply=SessionState)
