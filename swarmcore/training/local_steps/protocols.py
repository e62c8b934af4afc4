"""The local-steps protocol, as the rpc layer knows it."""

from __future__ import annotations

from swarmcore.rpc.method import Method, Protocol
from swarmcore.wire.local_steps import (
    LOCAL_STEPS,
    LOCAL_STEPS_STANDING,
    AskStanding,
    DeliverDelta,
    FetchState,
    GoTo,
    Piece,
    ResultsFollow,
    RoundOpen,
    RoundResult,
    Standing,
    StateFollows,
)

LOCAL_STEPS_PROTOCOL = Protocol(
    name=LOCAL_STEPS,
    openings=(DeliverDelta, FetchState),
    to_acceptor=(Piece,),
    to_opener=(RoundOpen, GoTo, RoundResult, ResultsFollow, StateFollows, Piece),
)
STANDING_METHOD = Method(name=LOCAL_STEPS_STANDING, request=AskStanding, reply=Standing)
