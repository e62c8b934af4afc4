"""What is checked of requests before they are taken in."""

from __future__ import annotations

from swarmcore.errors import InputError, InvalidStepError, ServerDrainingError, SpanError, UnknownCodecError
from swarmcore.types import Span
from swarmcore.wire.tensors import FLOATS, Tensor, codec_names

MAX_TIMEOUT = 3600.0
"""Longest wait, in seconds, that a caller may ask for; more is cut to this."""


def check_hidden(hidden: Tensor, rows: int, width: int, max_rows: int) -> None:
    """Raise `InvalidStepError` unless ``hidden`` is ``[rows, width]`` in a dtype that executors take."""
    if not 0 < rows <= max_rows:
        raise InvalidStepError(
            f"the step has {rows} tokens; expected 1 to {max_rows}: send a longer one in several steps"
        )
    if hidden.shape != (rows, width):
        raise InvalidStepError(
            f"hidden states have shape {list(hidden.shape)}; expected [{rows}, {width}]: a row for each "
            f"token of the step's lengths, of the model's hidden size"
        )
    if hidden.dtype not in FLOATS:
        raise InvalidStepError(f"hidden states are of dtype {hidden.dtype!r}; expected {', '.join(FLOATS)}")
    if hidden.codec == "raw" and hidden.data.nbytes != hidden.decoded_nbytes:
        raise InvalidStepError(
            f"hidden states hold {hidden.data.nbytes} bytes; expected {hidden.decoded_nbytes} for {rows} "
            f"rows of {width} {hidden.dtype} values"
        )
    check_codec(hidden.codec)


def check_session(sequences: int, max_sequences: int, tokens: int) -> None:
    """Raise `InputError` unless a session may have so many sequences, and ask for so many tokens."""
    if not 0 < sequences <= max_sequences:
        raise InputError(f"a session of {sequences} sequences; expected 1 to {max_sequences}")
    if tokens < 0:
        raise InputError(f"a session that needs {tokens} cache tokens; expected 0 or more")


def check_reply(reply: str, codec: str) -> None:
    """Raise `InvalidStepError` for rows, `UnknownCodecError` for a codec that a step cannot ask for."""
    check_codec(codec)
    if reply not in ("all", "last"):
        raise InvalidStepError(f"the step asks for {reply!r} rows; expected 'all' or 'last'")


def check_codec(codec: str) -> None:
    """Raise `UnknownCodecError` unless tensors can be encoded with ``codec`` here."""
    base, plus, on_top = codec.partition("+")
    if base not in codec_names() or (plus and on_top != "zstd"):
        known = ", ".join(codec_names())
        raise UnknownCodecError(
            f"tensor codec {codec!r} is not known here; expected one of {known}, alone or with +zstd on top"
        )


def check_held(span: Span, held: Span) -> None:
    """Raise `SpanError` unless all blocks of ``span`` are among those ``held``."""
    if not held.covers(span):
        raise SpanError(f"blocks {span} are not all here: this server holds {held}")


def check_timeout(timeout: float) -> float:
    """The wait that is allowed where a caller asks for ``timeout`` seconds."""
    if timeout != timeout:
        raise InvalidStepError("the timeout is not a number; expected seconds")
    return min(timeout, MAX_TIMEOUT)


def draining() -> ServerDrainingError:
    """What is refused with while the engine stops."""
    return ServerDrainingError("the server is shutting down; use another one")
