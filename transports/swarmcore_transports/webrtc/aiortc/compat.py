"""What we build on in aiortc and aioice, none of which the libraries promise to keep."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from aioice import Connection
from aioice.ice import StunProtocol, relayed_candidate
from aiortc import RTCIceGatherer, RTCIceTransport, rtcpeerconnection, rtcsctptransport
from aiortc.rtcsctptransport import DataChunk, InboundStream, RTCSctpTransport

_SCTP_METHODS = {
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
    "_data_channel_closed": ["self", "stream_id"],
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
_SCTP_ATTRIBUTES = {
    "_advertised_rwnd",
    "_association_state",
    "_cwnd",
    "_data_channels",
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


_AGENT_METHODS = {
    "_check_list_maybe_complete": ["self"],
    "_check_list_maybe_fail": ["self"],
    "_pair_remote_candidate": ["self", "remote_candidate"],
    "_remote_candidates_expected": ["self"],
    "build_request": ["self", "pair", "nominate"],
    "check_incoming": ["self", "message", "addr", "protocol"],
    "check_start": ["self", "pair"],
    "check_state": ["self", "pair", "state"],
    "gather_candidates": ["self"],
    "sort_check_list": ["self"],
}
_AGENT_ATTRIBUTES = {
    "_check_list",
    "_check_list_done",
    "_closing",
    "_early_checks_done",
    "_local_candidates",
    "_nominated",
    "_protocols",
    "_query_consent_task",
    "_queue",
    "_remote_candidates",
}
_PROTOCOL_METHODS = {
    "datagram_received": ["self", "data", "addr"],
    "error_received": ["self", "exc"],
    "request": ["self", "request", "addr", "integrity_key", "retransmissions"],
    "send_stun": ["self", "message", "addr"],
}
_RELAYED_PARAMETERS = [
    "component",
    "hide_related_address",
    "protocol_factory",
    "turn_server",
    "turn_username",
    "turn_password",
    "turn_ssl",
    "turn_transport",
]
_ICE_TRANSPORT_METHODS = {
    "_monitor": ["self"],
    "_RTCIceTransport__setState": ["self", "state"],
    "stop": ["self"],
}


def missing_of_sctp() -> list[str]:
    """What of aiortc that our SCTP builds on is not there, or takes other arguments."""
    missing = _changed(RTCSctpTransport, _SCTP_METHODS) + _changed(InboundStream, _STREAM_METHODS)
    missing += _not_made(RTCSctpTransport, _SCTP_ATTRIBUTES)
    missing += sorted(_CHUNK_FIELDS - set(getattr(DataChunk, "__annotations__", ())))
    missing += [
        name
        for name in ("USERDATA_MAX_LENGTH", "LOCAL_MAX_MESSAGE_SIZE")
        if not hasattr(rtcsctptransport, name)
    ]
    if not hasattr(rtcpeerconnection, "RTCSctpTransport"):
        missing.append("rtcpeerconnection.RTCSctpTransport")
    return missing


def missing_of_ice() -> list[str]:
    """What of aiortc and aioice that our ICE builds on is not there, or takes other arguments."""
    missing = _changed(Connection, _AGENT_METHODS) + _changed(RTCIceTransport, _ICE_TRANSPORT_METHODS)
    missing += _changed(StunProtocol, _PROTOCOL_METHODS)
    missing += _not_made(Connection, _AGENT_ATTRIBUTES)
    missing += _not_made(RTCIceTransport, {"_connection", "_recv", "_send"})
    missing += _not_made(RTCIceGatherer, {"_connection"})
    if list(inspect.signature(relayed_candidate).parameters) != _RELAYED_PARAMETERS:
        missing.append("relayed_candidate")
    return missing


def _changed(owner: type, methods: dict[str, list[str]]) -> list[str]:
    found: dict[str, Callable[..., Any] | None] = {name: getattr(owner, name, None) for name in methods}
    return [
        name
        for name, method in found.items()
        if method is None or list(inspect.signature(method).parameters) != methods[name]
    ]


def _not_made(owner: type, attributes: set[str]) -> list[str]:
    """Those that the initialiser does not name."""
    return sorted(attributes - set(owner.__init__.__code__.co_names))  # type: ignore[misc]
