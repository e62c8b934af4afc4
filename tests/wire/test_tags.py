"""What records and errors are called on the wire: classes may be renamed, tags may not."""

from __future__ import annotations

import attrs
import pytest

from swarmcore import errors
from swarmcore.errors import error_classes
from swarmcore.registry.gossip import messages
from swarmcore.wire import framing, local_steps, protocols
from swarmcore.wire.failure import Failure
from swarmcore.wire.framing import encode_message, kinds_of, tag_of, wire_tag
from swarmcore.wire.limits import Limits
from swarmcore.wire.messages import Ping
from swarmcore.wire.method import Method, Protocol

RECORDS = {
    "/swarmcore/inference/1": (
        "AdapterPart AdapterWanted Admit CachePart CachesTaken Draining HandOver HandOverFailed JoinSession "
        "NamePages OpenSession Recall Replay SessionOpened Step StepFailed StepForwarded StepOutput"
    ),
    "/swarmcore/forward/1": "AdapterPart AdapterWanted ForwardDone OpenForward PassProgress Rows",
    "/swarmcore/backward/1": (
        "AdapterPart AdapterWanted BackwardDone InputsWanted OpenBackward PassProgress Rows"
    ),
    "/swarmcore/forward/2": "AdapterPart AdapterWanted ForwardDone OpenForward PassProgress Rows",
    "/swarmcore/backward/2": (
        "AdapterPart AdapterWanted BackwardDone InputsWanted OpenBackward PassProgress Rows"
    ),
    "/swarmcore/generate/1": "GenerationEnded GenerationStarted OpenGeneration TextPiece TokensTaken",
    "/swarmcore/info/1": "InfoReply InfoRequest",
    "/swarmcore/ping/1": "Ping Pong",
    "/swarmcore/session-state/1": "AskSession SessionState",
    "/swarmcore/gossip/compare/1": "CompareDigests DigestsCompared",
    "/swarmcore/gossip/exchange/1": "ExchangeRecords RecordsExchanged",
    "/swarmcore/gossip/check/1": "CheckAlive StillAlive",
    "/swarmcore/registry/report/1": "ReportSuspect SuspectReported",
    "/swarmcore/alive/1": "Beat HoldLine",
    "/swarmcore/registry/watch/1": "RecordBatch WatchRecords",
    "/swarmcore/localsteps/1": (
        "DeliverDelta FetchState GoTo Piece ResultsFollow RoundOpen RoundResult StateFollows"
    ),
    "/swarmcore/localsteps/standing/1": "AskStanding Standing",
}
ERRORS = """
SwarmError UnavailableError PeerUnreachableError PeerIdentityError ConnectionLostError StreamAbortedError
StreamClosedError ProtocolError SessionLostError ServerDrainingError RemoteFaultError MissingBlocksError
MissingHeadError AdapterNotFoundError StaleRoundError ModelHubError BusyError CacheFullError
TooManyCallsError ResourceLimitError ServerMemoryError DeadlineExceededError InputError
PeerNotAllowedError AddressError AddressInUseError UnknownTransportError MissingExtraError
IdentityFileError IdentityInUseError MessageTooLargeError UnknownCodecError ModelNotFoundError
ModelMismatchError CheckpointError UnsupportedModelError SpanError InvalidStepError InvalidBatchError
AdapterError RunMismatchError DeltaError StorageError InternalError
"""


def records(spoken: Method | Protocol) -> tuple[type, ...]:
    if isinstance(spoken, Method):
        return spoken.request, spoken.reply
    return (*spoken.openings, *spoken.to_acceptor, *spoken.to_opener)


SPOKEN = {
    spoken.name: records(spoken)
    for module in (protocols, messages, local_steps)
    for spoken in vars(module).values()
    if isinstance(spoken, (Method, Protocol))
}


def test_records() -> None:
    said = {name: {tag_of(record) for record in of} for name, of in SPOKEN.items()}
    assert said == {name: set(tags.split()) for name, tags in RECORDS.items()}
    assert tag_of(Failure) == "Failure"


@pytest.mark.parametrize("name", SPOKEN)
def test_tags_are_given_and_not_guessed(name: str) -> None:
    assert set(SPOKEN[name]) <= framing._tags.keys()


def test_errors() -> None:
    ours = {tag for tag, cls in error_classes().items() if cls.__module__ == errors.__name__}
    assert ours == set(ERRORS.split())


def test_a_renamed_class_is_the_same_on_the_wire() -> None:
    @wire_tag("Ping")
    @attrs.frozen
    class Probe:
        payload: bytes = b""

    assert kinds_of(Probe) == {"Ping": Probe}
    assert encode_message(Probe(b"hi"), (), Limits()) == encode_message(Ping(b"hi"), (), Limits())
