"""Codecs by measured times: lossless where a transfer is hidden, less where it holds the others up."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from announced import peer
from hypothesis import given
from hypothesis import strategies as st

from swarmcore.routing.link_codec import LADDERS, PROBE_EVERY, LinkCodec, LinkDirection, LinkRate, TensorKind

SHAPE = (1024, 1024)
VALUES = math.prod(SHAPE)
BITS = {"raw": 16.0} | {rung.codec: rung.bits for ladder in LADDERS.values() for rung in ladder}


class VirtualLink:
    """Passes a second apart over a link of so many bytes a second to a server that computes for so long."""

    def __init__(self, links: LinkCodec, rate: float, seconds: float, *, number: int = 1) -> None:
        self.links, self.rate, self.seconds, self.peer = links, rate, seconds, peer(number)
        self.delay = 0.0
        self.now = 0.0

    def send(
        self,
        direction: LinkDirection = "up",
        kind: TensorKind = "activations",
        rows: int = SHAPE[0],
        **others: object,
    ) -> str:
        shape = (rows, SHAPE[1])
        chain = [peer(n) for n in others.get("chain", ())]  # type: ignore[attr-defined]
        codec = self.links.codec(self.peer, direction, kind, "bfloat16", shape, self.now, chain=chain)
        nbytes = int(math.prod(shape) * BITS[codec] / 8)
        self.now += 1
        self.links.transferred(self.peer, direction, nbytes, self.delay + nbytes / self.rate, self.now)
        self.links.computed(self.peer, kind, shape, self.seconds * rows / SHAPE[0], self.now)
        return codec

    def settle(self, passes: int = 20, **how: object) -> str:
        return [self.send(**how) for _ in range(passes)][-1]  # type: ignore[arg-type]


def hidden_rate(codec: str, seconds: float = 1.0) -> float:
    """Bytes a second at which a tensor in this codec takes exactly ``seconds``."""
    return VALUES * BITS[codec] / 8 / seconds


def test_nothing_is_lost_before_a_link_is_measured() -> None:
    links = LinkCodec()
    assert links.codec(peer(1), "up", "gradients", "bfloat16", SHAPE, 0) == "raw"
    links.transferred(peer(1), "up", 1000, 1e6, 0)
    assert links.codec(peer(1), "up", "gradients", "bfloat16", SHAPE, 0) == "raw"


def test_nothing_is_lost_where_the_transfer_is_hidden_by_the_computation() -> None:
    assert VirtualLink(LinkCodec(), hidden_rate("raw"), 1).settle() == "raw"


@pytest.mark.parametrize("kind", ["activations", "gradients"])
def test_each_link_gets_the_first_rung_that_is_hidden(kind: TensorKind) -> None:
    for rung in LADDERS[kind]:
        link = VirtualLink(LinkCodec(), hidden_rate(rung.codec), 1)
        assert link.settle(kind=kind) == rung.codec


def test_a_link_too_slow_for_any_rung_gets_the_last() -> None:
    assert VirtualLink(LinkCodec(), 1000, 1).settle() == LADDERS["activations"][-1].codec
    assert VirtualLink(LinkCodec(), 1000, 1).settle(kind="gradients") == LADDERS["gradients"][-1].codec


def test_the_slowest_server_of_the_chain_sets_the_pace() -> None:
    links = LinkCodec()
    VirtualLink(links, 1e12, 10, number=2).settle()
    link = VirtualLink(links, hidden_rate("raw", 8), 1)
    assert link.settle(chain=(2,)) == "raw"
    assert link.settle() != "raw"


def test_links_and_directions_are_judged_apart() -> None:
    links = LinkCodec()
    slow, fast = VirtualLink(links, hidden_rate("int8"), 1), VirtualLink(links, 1e12, 1, number=2)
    assert (slow.settle(), fast.settle()) == ("int8", "raw")
    assert slow.send("down") == "raw"


def test_small_changes_of_the_rate_do_not_change_the_codec() -> None:
    link = VirtualLink(LinkCodec(), hidden_rate("raw"), 1)
    chosen = set()
    for passes in range(60):
        link.rate = hidden_rate("raw") * (0.85 if passes % 10 < 5 else 1.2)
        chosen.add(link.send())
    assert chosen == {"raw"}
    link.rate = hidden_rate("int8")
    assert link.settle(20) == "int8"
    link.rate = hidden_rate("raw")  # within the margin of being enough
    assert link.settle(20) == "int8"


def test_a_link_that_gets_faster_becomes_lossless_again() -> None:
    link = VirtualLink(LinkCodec(), 1000, 1)
    assert link.settle() == "mixed2"
    link.rate = hidden_rate("raw") * 2
    assert link.settle(40) == "raw"


def test_a_long_delay_does_not_make_a_fast_link_look_slow() -> None:
    links = LinkCodec()
    link = VirtualLink(links, hidden_rate("int8"), 1)
    assert link.settle() == "int8"
    # Now fast but for a delay that any transfer has: small ones alone could not tell.
    link.rate, link.delay = 1e9, 1.0
    assert link.settle(5 * PROBE_EVERY) == "raw"


def test_one_tensor_in_many_goes_a_rung_higher() -> None:
    link = VirtualLink(LinkCodec(), 1000, 1)
    link.settle()
    sent = [link.send() for _ in range(4 * PROBE_EVERY)]
    assert sent.count("mixed3") == 4 and sent.count("mixed2") == len(sent) - 4


def test_a_codec_that_a_peer_does_not_know_is_not_chosen_for_it_again() -> None:
    links = LinkCodec()
    old, new = VirtualLink(links, 1000, 1), VirtualLink(links, 1000, 1, number=2)
    for codec in ("mixed2", "mixed3", "mixed4"):
        links.refused(peer(1), codec)
    assert (old.settle(), new.settle()) == ("int8", "mixed2")


def test_float32_is_compressed_by_no_more_than_it_takes() -> None:
    links = LinkCodec()
    for now in range(10):
        links.transferred(peer(1), "up", VALUES, VALUES / hidden_rate("int8", 0.95), now)
        links.computed(peer(1), "activations", SHAPE, 1, now)
    assert links.codec(peer(1), "up", "activations", "float32", SHAPE, 10) == "int8"
    assert links.codec(peer(1), "up", "activations", "bfloat16", SHAPE, 10) == "int8"


def test_a_link_not_used_for_long_is_measured_anew() -> None:
    link = VirtualLink(LinkCodec(), 1000, 1)
    assert link.settle() == "mixed2"
    link.now += 1000
    assert link.send() == "raw"


def test_the_peer_used_longest_ago_makes_room() -> None:
    links = LinkCodec(capacity=2)
    for number in (1, 2, 1, 3):
        VirtualLink(links, 1000, 1, number=number).send()
    assert len(links) == 2
    assert VirtualLink(links, 1000, 1).send() == "mixed2"
    assert VirtualLink(links, 1000, 1, number=2).send() == "raw"


def test_its_state_shows() -> None:
    links = LinkCodec()
    VirtualLink(links, 1000, 1).settle()
    VirtualLink(links, 1e12, 1, number=2).settle()
    assert repr(links) == "<LinkCodec 2 links, 1 of them lossy>"


@given(
    st.lists(st.tuples(st.integers(-5, 10**9), st.floats() | st.floats(0, 100)), max_size=30),
    st.lists(st.floats(), max_size=10),
)
def test_whatever_is_reported_a_codec_is_chosen(
    transfers: list[tuple[int, float]], works: list[float]
) -> None:
    links = LinkCodec()
    for now, (nbytes, seconds) in enumerate(transfers):
        links.transferred(peer(1), "up", nbytes, seconds, now)
    for seconds in works:
        links.computed(peer(1), "gradients", SHAPE, seconds, 50)
    assert links.codec(peer(1), "up", "gradients", "bfloat16", SHAPE, 50) in BITS
    assert links.codec(peer(1), "up", "gradients", "bfloat16", (0, 8), 50) in BITS


@given(st.floats(0, 2), st.floats(1e4, 1e9), st.lists(st.integers(10**3, 10**8), min_size=12, max_size=40))
def test_rate_and_delay_are_found_from_transfers_of_different_sizes(
    delay: float, rate: float, sizes: list[int]
) -> None:
    sizes = [*sizes, 10**3, 10**8]  # far enough apart
    link = LinkRate()
    for size in sizes:
        link.measured(size, delay + size / rate)
    assert link.seconds(10**8) == pytest.approx(delay + 10**8 / rate, rel=0.5)
    assert 0 < link.seconds_per_byte <= 1.001 * max((delay + size / rate) / size for size in sizes)


def test_transfers_of_one_size_tell_their_mean_rate() -> None:
    link = LinkRate()
    for seconds in (1, 3, 1, 3):
        link.measured(1000, seconds)
    assert link.delay == pytest.approx(0, abs=1e-9)
    assert link.seconds(1000) == pytest.approx(2, rel=0.2)


FITS: list[tuple[str, Callable[[int], float]]] = [
    ("larger ones faster", lambda size: 1e6 / size),
    ("no time at all", lambda size: 0.0),
    ("squares", lambda size: size**2 / 1e9),
]


@pytest.mark.parametrize(("name", "seconds"), FITS, ids=[name for name, _ in FITS])
def test_what_fits_no_link_still_gives_sane_estimates(name: str, seconds: Callable[[int], float]) -> None:
    link = LinkRate()
    for size in (1000, 50_000, 3000, 80_000):
        link.measured(size, seconds(size))
    assert 0 <= link.seconds_per_byte < math.inf and 0 <= link.delay < math.inf
