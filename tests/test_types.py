"""Addresses and spans read what they print, and refuse the rest with a cure."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcore.errors import AddressError, InputError, SpanError
from swarmcore.identity import Identity
from swarmcore.types import Address, Numerics, PeerId, ServerInfo, Span, short

PEER = Identity.from_seed(bytes(32)).peer


@pytest.mark.parametrize(
    ("url", "scheme", "location"),
    [
        (f"tcp://example.org:4001/{PEER}", "tcp", "//example.org:4001"),
        (f"tcp://[::1]:4001/{PEER}", "tcp", "//[::1]:4001"),
        (f"libp2p:/ip4/1.2.3.4/tcp/4001/p2p/{PEER}", "libp2p", "/ip4/1.2.3.4/tcp/4001/p2p"),
        (f"unix:///run/swarm.sock/{PEER}", "unix", "///run/swarm.sock"),
        (f"memory://1/{PEER}", "memory", "//1"),
    ],
)
def test_addresses(url: str, scheme: str, location: str) -> None:
    address = Address.parse(url)
    assert address == Address(scheme, location, PEER)
    assert str(address) == url


@pytest.mark.parametrize("url", ["", "example.org:4001", f"//host/{PEER}", f"TCP://host/{PEER}", PEER])
def test_addresses_without_a_scheme(url: str) -> None:
    with pytest.raises(AddressError):
        Address.parse(url)


@pytest.mark.parametrize(
    "peer", ["", "somebody", PEER[:-1], PEER + "x", PEER.replace("K", "O", 1), f"{PEER}/"]
)
def test_addresses_without_a_peer_id(peer: str) -> None:
    with pytest.raises(AddressError, match="does not end in a peer id"):
        Address.parse(f"tcp://host:4001/{peer}")


@given(st.text())
def test_any_text_is_an_address_or_refused(text: str) -> None:
    with pytest.raises(AddressError):
        Address.parse(text)


@given(st.integers(0, 999_998), st.integers(1, 999_999))
def test_spans(start: int, length: int) -> None:
    end = min(start + length, 999_999)
    span = Span.parse(f"{start}:{end}")
    assert (span.start, span.end, len(span), str(span)) == (start, end, end - start, f"{start}:{end}")
    assert start in span
    assert end - 1 in span
    assert end not in span
    assert start - 1 not in span


@pytest.mark.parametrize(
    "text", ["", "1", ":", "1:", ":1", "3:3", "4:3", "-1:3", "1:2:3", "a:b", "1:9999999"]
)
def test_what_is_no_span(text: str) -> None:
    with pytest.raises(SpanError, match="START:END"):
        Span.parse(text)


def test_spans_sort_by_start_then_end() -> None:
    assert sorted([Span(5, 6), Span(0, 9), Span(0, 3)]) == [Span(0, 3), Span(0, 9), Span(5, 6)]


def test_what_people_read() -> None:
    assert short(PEER) == f"12D3…{PEER[-6:]}"
    assert short("test-peer") == "test-peer"
    assert str(ServerInfo(PEER, (), span=Span(0, 10))) == f"{short(PEER)} online blocks 0:10"
    assert str(ServerInfo(PeerId("b"), (), state="draining")) == "b draining no blocks"


@pytest.mark.parametrize(
    ("other", "covered", "common"),
    [
        (Span(2, 6), True, Span(2, 6)),
        (Span(3, 5), True, Span(3, 5)),
        (Span(1, 4), False, Span(2, 4)),
        (Span(5, 8), False, Span(5, 6)),
        (Span(0, 9), False, Span(2, 6)),
        (Span(6, 8), False, None),
        (Span(3, 3), False, None),
        (Span(5, 3), False, None),
    ],
)
def test_spans_cover_and_overlap(other: Span, covered: bool, common: Span | None) -> None:
    assert Span(2, 6).covers(other) == covered
    assert Span(2, 6).overlap(other) == common


def test_a_span_iterates_over_its_blocks() -> None:
    assert list(Span(2, 5)) == [2, 3, 4]


def test_addresses_that_cannot_be_read_are_left_out_of_those_to_dial() -> None:
    good = Address("tcp", "//host:1", PEER)
    info = ServerInfo(PEER, ("some new form", str(good)))
    assert info.dialable == (good,)


@pytest.mark.parametrize(
    ("text", "numerics"),
    [
        ("torch/bf16", Numerics("torch", "bf16", "bf16", "bf16")),
        ("torch/nf4/bf16", Numerics("torch", "nf4", "bf16", "bf16")),
        ("torch/bf16/bf16/int8", Numerics("torch", "bf16", "bf16", "int8")),
        ("ggml/q4_k_m/f32/f16", Numerics("ggml", "q4_k_m", "f32", "f16")),
    ],
)
def test_numerics_are_read_as_they_are_written(text: str, numerics: Numerics) -> None:
    assert Numerics.parse(text) == numerics
    assert str(numerics) == text


PART = st.from_regex(r"[a-z0-9][a-z0-9_.+-]{0,23}", fullmatch=True)


@given(PART, PART, PART, PART)
def test_any_numerics_survive_as_text(executor: str, weights: str, dtype: str, cache_dtype: str) -> None:
    numerics = Numerics(executor, weights, dtype, cache_dtype)
    assert Numerics.parse(str(numerics)) == numerics


@pytest.mark.parametrize(
    "text",
    ["", "torch", "torch/", "/bf16", "torch/BF16", "torch/b f", "a/b/c/d/e", "torch/" + "x" * 25, "a/b\n"],
)
def test_what_names_no_numerics_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="numerics"):
        Numerics.parse(text)


def test_a_server_of_an_earlier_version_computes_with_torch_and_can_do_everything() -> None:
    server = ServerInfo(PEER, (), span=Span(0, 2), dtype="bfloat16")
    assert str(server.computes) == "torch/bf16"
    assert set(server.capabilities) == {"training", "adapters"}
    assert ServerInfo(PEER, ()).computes is None
