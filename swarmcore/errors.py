"""Every error swarmcore raises, arranged by what the caller does next.

    SwarmError
    ├── UnavailableError      this peer or path will not do: try elsewhere
    ├── BusyError             it will do, but not now: wait, then retry (see ``retry_after``)
    ├── InputError            what you passed is wrong: mend it, the message says how
    └── InternalError         a bug in swarmcore: report it

An error crosses the wire as its class name, message and ``details``; the other side raises the same
class. Foreign exceptions (OSError, ssl, torch, …) are translated once, at the seam where they appear.
"""

from __future__ import annotations

from typing import Any


class SwarmError(Exception):
    """Base of all swarmcore errors.

    ``details`` are plain, msgpack-able values that a program can act on; each is also an attribute.
    """

    origin: str | None = None
    """Id of the peer that raised the error when it came over the wire; None when it arose here."""

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


class UnavailableError(SwarmError):
    """This peer, or the way to it, cannot serve the request. Another one may."""


class PeerUnreachableError(UnavailableError):
    """No connection could be made to any address of the peer."""


class PeerIdentityError(UnavailableError):
    """The peer that answered could not prove the peer id of the address that was dialled."""


class ConnectionLostError(UnavailableError):
    """The connection broke, or the peer fell silent past the keep-alive limit."""


class StreamAbortedError(UnavailableError):
    """The remote side aborted the stream; the message is its reason."""


class StreamClosedError(UnavailableError):
    """The stream has ended: the remote closed it in good order, or it was closed on this side."""


class ProtocolError(UnavailableError):
    """The remote peer broke the protocol: garbage, an unknown version, a record out of turn."""


class SessionLostError(UnavailableError):
    """The server no longer holds the session: it expired, was closed, or the server restarted."""


class ServerDrainingError(UnavailableError):
    """The server is shutting down and takes no new sessions."""


class RemoteFaultError(UnavailableError):
    """The remote peer failed in a way it did not expect; its log has the traceback."""


class MissingBlocksError(UnavailableError):
    """No server holds some of the model's blocks. ``ranges`` lists them as ``"start:end"``."""


class MissingHeadError(UnavailableError):
    """No peer makes texts of the model for clients that have no part of it."""


class AdapterNotFoundError(UnavailableError):
    """The server has no adapter of that name. Another one may."""


class StaleRoundError(UnavailableError):
    """The training run goes on from other parameters: fetch the current ones."""


class ModelHubError(UnavailableError):
    """The model hub, or a mirror of it, does not answer as it should. What was downloaded is kept."""


# --- wait, then retry --------------------------------------------------------------------------------


class BusyError(SwarmError):
    """The request is fine but there is no room for it now."""


class CacheFullError(BusyError):
    """The server's attention cache has no room. ``retry_after`` is its estimate in seconds."""


class TooManyCallsError(BusyError):
    """The peer already runs as many calls as it allows."""


class ResourceLimitError(BusyError):
    """What was asked for would take more of the peer than it lets one peer, or all together, have at a time.

    ``resource`` (such as ``"bytes"``), ``scope`` and ``limit`` name the bound.
    """


class ServerMemoryError(BusyError):
    """The server ran out of memory. Smaller micro-batches may fit, or another server."""


class DeadlineExceededError(BusyError):
    """The deadline passed before the answer came."""


# --- mend the input ----------------------------------------------------------------------------------


class InputError(SwarmError):
    """What was passed in cannot work, on this peer or any other."""


class PeerNotAllowedError(InputError):
    """The swarm is closed: the peer deals only with a list of peers, and this one is not on it."""


class AddressError(InputError):
    """An address is malformed, or lacks its peer id."""


class AddressInUseError(InputError):
    """Another process already listens on the address."""


class UnknownTransportError(InputError):
    """No installed transport has the address's scheme."""


class MissingExtraError(InputError):
    """An optional dependency is not installed; the message names the extra that brings it."""


class IdentityFileError(InputError):
    """The identity file cannot be read, is not an Ed25519 key, or is readable by others."""


class IdentityInUseError(InputError):
    """Another process on this machine is this peer already."""


class MessageTooLargeError(InputError):
    """A message is above ``limits.max_message``."""


class UnknownCodecError(InputError):
    """A tensor is encoded with a codec that this peer does not have."""


class ModelNotFoundError(InputError):
    """No model at that path, hub id or name."""


class ModelMismatchError(InputError):
    """Client and server hold different weights under one name; the message names both."""


class CheckpointError(InputError):
    """The checkpoint is damaged or incomplete."""


class UnsupportedModelError(InputError):
    """The model's architecture, or what its files ask for, is nothing that can be done here."""


class SpanError(InputError):
    """A block range is malformed or outside the model."""


class InvalidStepError(InputError):
    """A step was refused: its shape, dtype, position, session or values are wrong."""


class InvalidBatchError(InputError):
    """A batch for a forward or backward pass was refused: its shape, dtype, size or values are wrong."""


class AdapterError(InputError):
    """An adapter does not fit the model, is of a kind that is not served, or its file is damaged."""


class RunMismatchError(InputError):
    """The peer takes part in another training run, or in this one with other settings."""


class DeltaError(InputError):
    """A delta of parameters was refused: its shape, size or values are wrong."""


class StorageError(InputError):
    """A file could not be written or read: disk full, no permission, no such folder."""


# --- report a bug ------------------------------------------------------------------------------------


class InternalError(SwarmError):
    """A broken invariant inside swarmcore. Please report it with the message."""


def _subclasses(cls: type[SwarmError]) -> dict[str, type[SwarmError]]:
    found = {cls.__name__: cls}
    for sub in cls.__subclasses__():
        found |= _subclasses(sub)
    return found


def error_classes() -> dict[str, type[SwarmError]]:
    """All error classes by name, as they are named on the wire."""
    return _subclasses(SwarmError)
