"""Drafts by suffix lookup: what a naive search finds, within bounds of memory."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swarmcore.client.speculation.suffix_index import BYTES_PER_TOKEN, MAX_MATCH, MAX_TOKENS, SuffixIndex
from swarmcore.client.speculation.suffix_lookup import SuffixDrafter, SuffixLookup
from swarmcore.client.speculation.token_memory import TokenMemory
from swarmcore.errors import InputError


def drafter_of(text: list[int], min_match: int = 2) -> SuffixDrafter:
    drafter = SuffixLookup(min_match=min_match, memory=TokenMemory()).drafter()
    drafter.append(text)
    return drafter


def longest_suffix(text: list[int], ahead: list[int]) -> tuple[int, set[int]]:
    """How much of the end of ``text + ahead`` there is earlier in ``text``, and behind which positions."""
    tail = (text + ahead)[-MAX_MATCH:]
    lengths = {}
    for end in range(1, len(text) + (1 if ahead else 0)):
        length = 0
        while length < min(end, len(tail)) and text[end - 1 - length] == tail[-1 - length]:
            length += 1
        lengths[end] = length
    longest = max(lengths.values(), default=0)
    return longest, {end for end, length in lengths.items() if length == longest}


few_tokens = st.lists(st.integers(0, 3), max_size=40)


@given(few_tokens, few_tokens, st.integers(1, 3), st.lists(st.integers(1, 9), max_size=8))
def test_finds_what_a_naive_search_finds(
    text: list[int], ahead: list[int], min_match: int, pieces: list[int]
) -> None:
    drafter = SuffixLookup(min_match=min_match, memory=TokenMemory()).drafter()
    rest = list(text)
    for piece in pieces:
        drafter.append(rest[:piece])
        del rest[:piece]
    drafter.append(rest)
    index = drafter._index
    length, ends = longest_suffix(text, ahead)
    match = index.find([*text[-MAX_MATCH:], *ahead], own_end=not ahead)
    if length < min_match:
        assert match.ends == () and drafter.propose(ahead, 4) == []
    else:
        assert match.length == length
        assert set(match.ends) <= ends
        assert max(match.ends) == max(ends)
        proposal = drafter.propose(ahead, 4)
        assert len(proposal) == len(drafter.probabilities) <= 4
        assert set(proposal[:1]) <= {(text + ahead)[end] for end in ends}
        # There is one unless it would be of a single token, after which everything came.
        assert proposal or (length == 1 and len(match.ends) > 2)
        assert drafter.propose(ahead, 4) == proposal  # what is ahead has left nothing behind


@given(st.integers(0, 2**32))
def test_a_long_match_is_found_among_many_short_ones(seed: int) -> None:
    chance = random.Random(seed)
    passage = [chance.randrange(3) for _ in range(20)]
    noise = [chance.randrange(3) for _ in range(3000)]
    drafter = drafter_of([*noise[:50], *passage, 7, 8, 9, *noise, *passage])
    assert drafter.propose([], 3) == [7, 8, 9]


def test_the_most_frequent_continuation_comes_first_and_of_equals_the_latest() -> None:
    assert drafter_of([1, 2, 3, 1, 2, 4, 1, 2, 3, 5, 1, 2]).propose([], 2) == [3, 5]
    assert drafter_of([1, 2, 3, 1, 2, 4, 1, 2]).propose([], 1) == [4]
    drafter = drafter_of([1, 2, 3, 1, 2, 4, 1, 2, 3, 5, 1, 2])
    drafter.propose([], 1)
    few, all_alike = drafter.probabilities[0], drafter_of([1, 2, 3, 1, 2])
    all_alike.propose([], 1)
    assert few < all_alike.probabilities[0]


def test_a_proposal_ends_where_it_becomes_unlikely() -> None:
    text = list(range(40))
    after_one, after_many = drafter_of([*text, 90, 5], 1), drafter_of([*text, *text[:20]], 1)
    assert after_one.propose([], 16) == [6, 7]
    assert after_many.propose([], 16) == text[20:36]


def test_what_repeats_itself_goes_on_beyond_the_end() -> None:
    drafter = drafter_of([9, 1, 2, 3, 1, 2, 3, 1, 2])
    assert drafter.propose([], 6) == [3, 1, 2, 3, 1, 2]
    assert drafter.propose([3, 1, 2, 3], 4) == [1, 2, 3, 1]


def test_text_that_grows_token_by_token_is_as_text_at_once() -> None:
    chance = random.Random(0)
    text = [chance.randrange(30) for _ in range(1500)]
    slowly, at_once = drafter_of([]), drafter_of(text)
    for token in text:
        slowly.append([token])
    for _ in range(50):
        place = chance.randrange(1400)
        ahead = text[place : place + 12]
        assert slowly.propose(ahead, 8) == at_once.propose(ahead, 8)


def test_the_older_half_is_forgotten_when_the_memory_is_full() -> None:
    memory = TokenMemory(limit=1024 * BYTES_PER_TOKEN)
    drafter = SuffixLookup(memory=memory).drafter()
    text = list(range(5000))
    for begin in range(0, 5000, 100):
        drafter.append(text[begin : begin + 100])
        assert memory.used == drafter._index.nbytes <= memory.limit
    assert memory.refused > 0
    assert drafter.propose([4700, 4701], 3) == [4702, 4703, 4704]
    assert drafter.propose([10, 11], 3) == []
    drafter.close()
    drafter.close()
    assert memory.used == 0 and memory.of("") == 0


def test_a_text_that_is_longer_than_an_index_may_be_keeps_its_end() -> None:
    drafter = drafter_of(list(range(MAX_TOKENS + 10)))
    assert drafter._index.nbytes == MAX_TOKENS * BYTES_PER_TOKEN
    assert drafter.propose([MAX_TOKENS, MAX_TOKENS + 1], 2) == [MAX_TOKENS + 2, MAX_TOKENS + 3]


def test_without_any_room_nothing_is_proposed() -> None:
    drafter = SuffixLookup(memory=TokenMemory(limit=10)).drafter()
    drafter.append([1, 2, 3, 1, 2])
    drafter.append([3])
    assert drafter.propose([], 4) == drafter.propose([1, 2], 4) == []


def test_earlier_texts_are_those_of_the_same_owner() -> None:
    source = SuffixLookup(earlier_texts=True, memory=TokenMemory())
    first = source.drafter(owner="anna")
    first.append([1, 2, 3])  # a prompt
    for token in (10, 11, 12, 13):
        first.append([token])
    assert source.drafter(owner="anna").propose([10, 11], 2) == []
    first.close()
    anna, ben = source.drafter(owner="anna"), source.drafter(owner="ben")
    for drafter in anna, ben:
        drafter.append([7, 8, 2, 3])
    assert anna.propose([], 9) == [10, 11, 12, 13]
    assert ben.propose([], 9) == []
    anna.append([10, 11, 20, 10, 11])
    assert anna.propose([], 2) == [20, 10]  # its own text has as long a match, and is the later one


def test_earlier_texts_make_way_for_others() -> None:
    memory = TokenMemory(limit=2 * 256 * BYTES_PER_TOKEN)
    source = SuffixLookup(earlier_texts=True, memory=memory)
    for owner in ("anna", "ben"):
        drafter = source.drafter(owner=owner)
        drafter.append([1, 2, 3])
        drafter.close()
    assert memory.of("anna") and memory.of("ben")
    drafter = source.drafter(owner="carl")
    drafter.append([1, 2, 3, 1, 2])
    assert drafter.propose([], 1) == [3]
    assert not memory.of("anna") and memory.of("ben")
    drafter.close()
    source.close()
    assert memory.used == 0


def test_one_owner_has_a_bound_of_its_own() -> None:
    memory = TokenMemory(owner_limit=256 * BYTES_PER_TOKEN)
    index_of = [SuffixLookup(memory=memory).drafter(owner=owner) for owner in ("anna", "anna", "ben")]
    for drafter in index_of:
        drafter.append([1, 2, 3, 1, 2])
    assert [drafter.propose([], 1) for drafter in index_of] == [[3], [], [3]]


def test_min_match_outside_its_range_is_refused() -> None:
    with pytest.raises(InputError, match="min_match"):
        SuffixLookup(min_match=0)


def test_an_index_that_was_closed_can_be_filled_again() -> None:
    index = SuffixIndex(2, _Room())
    index.append([1, 2, 3])
    index.close()
    index.append([4, 5, 4, 5])
    assert list(index.text) == [4, 5, 4, 5]


class _Room:
    def take(self, size: int) -> bool:
        return True

    def give_back(self, size: int) -> None:
        pass
