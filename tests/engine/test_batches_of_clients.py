"""What several clients gain by sharing passes, on machines and links whose costs are made up."""

from __future__ import annotations

import attrs
import pytest
from decoding_clients import SITUATIONS, Decoded, Decoding

ALONE = SITUATIONS["a server"]
CHAIN = SITUATIONS["a chain of two"]
ONE_MACHINE = SITUATIONS["a chain of two, all on two cores"]


def gain(decoding: Decoding, clients: int) -> tuple[float, Decoded]:
    """How many times the tokens of one client so many get."""
    found = decoding.run(clients)
    return found.tokens_per_second / decoding.run(1).tokens_per_second, found


@pytest.mark.parametrize(("clients", "least"), [(2, 1.7), (4, 2.8), (16, 7.5)])
def test_clients_of_one_server_share_its_passes(clients: int, least: float) -> None:
    times, found = gain(ALONE, clients)
    assert times > least
    assert found.rows[0] > 0.45 * clients
    assert found.head_rows > 0.3 * clients


@pytest.mark.parametrize(("clients", "least"), [(2, 1.9), (4, 3.2), (16, 9.0)])
def test_half_batches_fill_a_chain_of_two(clients: int, least: float) -> None:
    times, found = gain(CHAIN, clients)
    assert times > least
    if clients > 4:
        assert min(found.busy) > 0.7


@pytest.mark.parametrize(("clients", "least"), [(4, 3.2), (16, 7.5)])
def test_a_chain_whose_servers_share_two_cores(clients: int, least: float) -> None:
    times, found = gain(ONE_MACHINE, clients)
    assert times > least
    assert min(found.rows) > 0.3 * clients


def test_a_large_model_on_two_servers() -> None:
    assert gain(SITUATIONS["a chain of two, large model, two cores"], 4)[0] > 3.5


def test_clients_apart_share_passes_too() -> None:
    assert gain(SITUATIONS["a chain of two, clients apart"], 16)[0] > 10.0


def test_nobody_waits_where_there_is_nothing_to_gain() -> None:
    assert gain(SITUATIONS["a chain of two, 25 ms apart"], 4)[0] > 3.6
    fickle = attrs.evolve(ALONE, think=0.1, apart=True, tokens=100)
    assert gain(fickle, 4)[0] > 2.9
