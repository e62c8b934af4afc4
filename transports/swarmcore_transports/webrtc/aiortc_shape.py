"""What our SCTP builds on in aiortc, none of which the library promises to keep."""

from __future__ import annotations

import inspect

from aiortc import rtcpeerconnection, rtcsctptransport
from aiortc.rtcsctptransport import InboundStream

_METHODS = {
    "_transmit": ["self"],
    "_receive_sack_chunk": ["self", "chunk"],
    "_receive_data_chunk": ["self", "chunk"],
    "_get_inbound_stream": ["self", "stream_id"],
    "_mark_received": ["self", "tsn"],
    "_send_sack": ["self"],
    "_send_chunk": ["self", "chunk"],
    "_set_state": ["self", "state"],
    "_update_rto": ["self", "R"],
    "_t1_expired": ["self"],
    "_t3_cancel": ["self"],
    "_maybe_abandon": ["self", "chunk"],
    "_update_advanced_peer_ack_point": ["self"],
    "_data_channel_flush": ["self"],
    "_flight_size_increase": ["self", "chunk"],
    "_flight_size_decrease": ["self", "chunk"],
    "_abort": ["self"],
}
_STREAM_METHODS = {
    "add_chunk": ["self", "chunk"],
    "pop_messages": ["self"],
    "prune_chunks": ["self", "tsn"],
}
_ATTRIBUTES = {
    "_advertised_rwnd",
    "_association_state",
    "_cwnd",
    "_flight_size",
    "_forward_tsn_chunk",
    "_inbound_streams",
    "_last_received_tsn",
    "_last_sacked_tsn",
    "_local_tsn",
    "_outbound_queue",
    "_rto",
    "_rttvar",
    "_sack_duplicates",
    "_sack_misordered",
    "_sack_needed",
    "_sent_queue",
    "_srtt",
}
_CHUNK_FIELDS = {
    "_abandoned",
    "_acked",
    "_book_size",
    "_in_flight",
    "_retransmit",
    "_sent_count",
    "_sent_time",
}


def missing_parts(transport: type, chunk: type) -> list[str]:
    """What of aiortc that our SCTP builds on is not there, or takes other arguments."""
    missing = []
    for owner, methods in ((transport, _METHODS), (InboundStream, _STREAM_METHODS)):
        for name, parameters in methods.items():
            method = getattr(owner, name, None)
            if method is None or list(inspect.signature(method).parameters) != parameters:
                missing.append(name)
    made = set(transport.__init__.__code__.co_names)  # type: ignore[misc]
    missing += sorted(_ATTRIBUTES - made)
    missing += sorted(_CHUNK_FIELDS - set(getattr(chunk, "__annotations__", ())))
    missing += [
        name
        for name in ("USERDATA_MAX_LENGTH", "LOCAL_MAX_MESSAGE_SIZE")
        if not hasattr(rtcsctptransport, name)
    ]
    if not hasattr(rtcpeerconnection, "RTCSctpTransport"):
        missing.append("rtcpeerconnection.RTCSctpTransport")
    return missing
