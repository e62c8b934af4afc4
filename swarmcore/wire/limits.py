"""What a peer accepts from the network. Checked before anything is allocated."""

from __future__ import annotations

import attrs

MAX_ADDRESSES = 16
"""Addresses that a peer may announce."""


MAX_STEPS_IN_FLIGHT = 8
"""Steps of one session, or chunks of long ones, that are under way at a time."""


MAX_DRAFTED = 16
"""Most tokens that a step brings to a sequence to be taken for drafts that are verified, not for a prompt."""


@attrs.frozen
class Limits:
    """Bounds on messages, calls and waits. The defaults suit a server on the open Internet."""

    max_message: int = 64 * 2**20
    """Largest message, in bytes, header and tensors together."""
    max_header: int = 2**20
    """Largest message header, in bytes."""
    max_tensors: int = 64
    """Most tensors beside one header."""
    max_dimensions: int = 8
    """Most dimensions of one tensor."""
    max_decoded: int = 256 * 2**20
    """Most bytes that the tensors of one message take together after decoding."""
    max_calls_per_peer: int = 256
    """Most calls and streams one remote peer may have open here."""
    max_calls: int = 4096
    """Most calls and streams all remote peers together may have open here."""
    connect_timeout: float = 10.0
    """Seconds to dial and prove identities."""
    keepalive: float = 3.0
    """Seconds after which a silent side sends a sign of life; silent for three times that, it is lost."""
    send_buffer: int = 4 * 2**20
    """Bytes that wait for a slow reader before `send` waits too."""
