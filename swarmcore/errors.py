"""Every error swarmcore raises, arranged by what the caller does next.

    SwarmError
    ├── UnavailableError      this peer or path will not do: try elsewhere
    ├── BusyError             it will do, but not now: wait, then retry (see ``retry_after``)
    ├── InputError            what you passed is wrong: fix it, the message says how
    └── InternalError         a bug in swarmcore: report it

An error crosses the wire as its class's ``wire_tag``, message and ``details``; the other side raises the same
class. A class may be renamed, its tag may not. Foreign exceptions (OSError, ssl, torch, …) are translated
once, at the seam where they appear.
"""

from __future__ import annotations

from typing import Any, ClassVar


class SwarmError(Exception):
    """Base of all swarmcore errors.

    ``details`` are plain, msgpack-able values that a program can act on; each is also an attribute.
    """

    origin: str | None = None
    """Id of the peer that raised the error when it came over the wire; None when it arose here."""
    wire_tag: ClassVar[str] = "SwarmError"
    """What the class is called on the wire and in output for programs; its name where none is given."""

    def __init_subclass__(cls, wire_tag: str | None = None) -> None:
        super().__init_subclass__()
        cls.wire_tag = wire_tag or cls.__name__

    def __init__(self, message: str, /, **details: Any) -> None:
        super().__init__(message)
        self.details = details

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["details"][name]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no detail {name!r}") from None

    @property
    def message(self) -> str:
        return str(self.args[0])


# --- try elsewhere -----------------------------------------------------------------------------------


class UnavailableError(SwarmError, wire_tag="UnavailableError"):
    """This peer, or the way to it, cannot serve the request. Another one may."""


class PeerUnreachableError(UnavailableError, wire_tag="PeerUnreachableError"):
    """No connection could be made to any address of the peer."""


class PeerIdentityError(UnavailableError, wire_tag="PeerIdentityError"):
    """The peer that answered could not prove the peer id of the address that was dialled."""


class ConnectionLostError(UnavailableError, wire_tag="ConnectionLostError"):
    """The connection broke, or the peer fell silent past the keep-alive limit."""


class StreamAbortedError(UnavailableError, wire_tag="StreamAbortedError"):
    """The remote side aborted the stream; the message is its reason."""


class StreamClosedError(UnavailableError, wire_tag="StreamClosedError"):
    """The stream has ended: the remote closed it in good order, or it was closed on this side."""


class ProtocolError(UnavailableError, wire_tag="ProtocolError"):
    """The remote peer broke the protocol: garbage, an unknown version, a record out of turn."""


class SessionLostError(UnavailableError, wire_tag="SessionLostError"):
    """The server no longer holds the session: it expired, was closed, or the server restarted."""


class ServerDrainingError(UnavailableError, wire_tag="ServerDrainingError"):
    """The server is shutting down and takes no new sessions."""


class RemoteFaultError(UnavailableError, wire_tag="RemoteFaultError"):
    """The remote peer failed in a way it did not expect; its log has the traceback."""


class MissingBlocksError(UnavailableError, wire_tag="MissingBlocksError"):
    """No server holds some of the model's blocks. ``ranges`` lists them as ``"start:end"``."""


class MissingHeadError(UnavailableError, wire_tag="MissingHeadError"):
    """No peer makes texts of the model for clients that have no part of it."""


class AdapterNotFoundError(UnavailableError, wire_tag="AdapterNotFoundError"):
    """The server has no adapter of that name. Another one may."""


class StaleRoundError(UnavailableError, wire_tag="StaleRoundError"):
    """The training run goes on from other parameters: fetch the current ones."""


class ModelHubError(UnavailableError, wire_tag="ModelHubError"):
    """The model hub, or a mirror of it, does not answer as it should. What was downloaded is kept."""


# --- wait, then retry --------------------------------------------------------------------------------


class BusyError(SwarmError, wire_tag="BusyError"):
    """The request is fine but there is no room for it now."""


class CacheFullError(BusyError, wire_tag="CacheFullError"):
    """The server's attention cache has no room. ``retry_after`` is its estimate in seconds."""


class TooManyCallsError(BusyError, wire_tag="TooManyCallsError"):
    """The peer already runs as many calls as it allows."""


class ResourceLimitError(BusyError, wire_tag="ResourceLimitError"):
    """What was asked for would take more of the peer than it lets one peer, or all together, have at a time.

    ``resource`` (such as ``"bytes"``), ``scope`` and ``limit`` name the bound.
    """


class ServerMemoryError(BusyError, wire_tag="ServerMemoryError"):
    """The server ran out of memory. Smaller micro-batches may fit, or another server."""


class DeadlineExceededError(BusyError, wire_tag="DeadlineExceededError"):
    """The deadline passed before the answer came."""


# --- fix the input -----------------------------------------------------------------------------------


class InputError(SwarmError, wire_tag="InputError"):
    """What was passed in cannot work, on this peer or any other."""


class PeerNotAllowedError(InputError, wire_tag="PeerNotAllowedError"):
    """The swarm is closed: the peer deals only with a list of peers, and this one is not on it."""


class AddressError(InputError, wire_tag="AddressError"):
    """An address is malformed, or lacks its peer id."""


class AddressInUseError(InputError, wire_tag="AddressInUseError"):
    """Another process already listens on the address."""


class UnknownTransportError(InputError, wire_tag="UnknownTransportError"):
    """No installed transport has the address's scheme."""


class MissingExtraError(InputError, wire_tag="MissingExtraError"):
    """An optional dependency is not installed; the message names the extra that brings it."""


class IdentityFileError(InputError, wire_tag="IdentityFileError"):
    """The identity file cannot be read, is not an Ed25519 key, or is readable by others."""


class IdentityInUseError(InputError, wire_tag="IdentityInUseError"):
    """Another process on this machine is this peer already."""


class MessageTooLargeError(InputError, wire_tag="MessageTooLargeError"):
    """A message is above ``limits.max_message``."""


class UnknownCodecError(InputError, wire_tag="UnknownCodecError"):
    """A tensor is encoded with a codec that this peer does not have."""


class ModelNotFoundError(InputError, wire_tag="ModelNotFoundError"):
    """No model at that path, hub id or name."""


class ModelMismatchError(InputError, wire_tag="ModelMismatchError"):
    """Client and server hold different weights under one name; the message names both."""


class CheckpointError(InputError, wire_tag="CheckpointError"):
    """The checkpoint is damaged or incomplete."""


class UnsupportedModelError(InputError, wire_tag="UnsupportedModelError"):
    """The model's architecture, or what its files ask for, is nothing that can be done here."""


class SpanError(InputError, wire_tag="SpanError"):
    """A block range is malformed or outside the model."""


class InvalidStepError(InputError, wire_tag="InvalidStepError"):
    """A step was refused: its shape, dtype, position, session or values are wrong."""


class InvalidBatchError(InputError, wire_tag="InvalidBatchError"):
    """A batch for a forward or backward pass was refused: its shape, dtype, size or values are wrong."""


class AdapterError(InputError, wire_tag="AdapterError"):
    """An adapter does not fit the model, is of a kind that is not served, or its file is damaged."""


class RunMismatchError(InputError, wire_tag="RunMismatchError"):
    """The peer takes part in another training run, or in this one with other settings."""


class DeltaError(InputError, wire_tag="DeltaError"):
    """A delta of parameters was refused: its shape, size or values are wrong."""


class StorageError(InputError, wire_tag="StorageError"):
    """A file could not be written or read: disk full, no permission, no such folder."""


# --- report a bug ------------------------------------------------------------------------------------


class InternalError(SwarmError, wire_tag="InternalError"):
    """A broken invariant inside swarmcore. Please report it with the message."""


def _subclasses(cls: type[SwarmError]) -> dict[str, type[SwarmError]]:
    found = {cls.wire_tag: cls}
    for sub in cls.__subclasses__():
        found |= _subclasses(sub)
    return found


def error_classes() -> dict[str, type[SwarmError]]:
    """All error classes by their ``wire_tag``."""
    return _subclasses(SwarmError)
