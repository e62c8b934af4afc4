"""The cache that stands for a session: copies, cuts, and whose session lives how long."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from tiny_swarm import Tiny

from swarmcore.errors import InputError
from swarmcore.transformers import RemoteCache

IDS = torch.tensor([[9, 41, 7, 66, 12], [30, 31, 32, 33, 34], [50, 60, 70, 80, 90]])


@torch.no_grad()
def logits(
    model: Any, ids: torch.Tensor, cache: Any = None, mask: torch.Tensor | None = None
) -> torch.Tensor:
    output = model(ids, past_key_values=cache, attention_mask=mask, use_cache=cache is not None)
    return output.logits[:, -1]


def test_a_cache_is_made_when_asked_for(llama: Tiny) -> None:
    assert llama.remote(IDS).past_key_values is None
    first = llama.remote(IDS[:, :3], use_cache=True)
    assert isinstance(first.past_key_values, RemoteCache)
    second = llama.remote(IDS[:, 3:], past_key_values=first.past_key_values)
    torch.testing.assert_close(second.logits[:, -1], logits(llama.plain, IDS))
    assert "3 x 5" in repr(second.past_key_values)


def test_what_is_alike_is_sent_once(llama: Tiny) -> None:
    cache = llama.remote.new_cache()
    logits(llama.remote, IDS[[0, 1, 0, 0]], cache)
    assert cache.session.positions == (5, 5, 0, 0)
    ids = torch.tensor([[1], [2], [3], [4]])
    found = logits(llama.remote, ids, cache)
    assert cache.session.positions == (6, 6, 6, 6)
    torch.testing.assert_close(found, logits(llama.plain, torch.cat([IDS[[0, 1, 0, 0]], ids], 1)))


def test_selecting_cropping_and_repeating(llama: Tiny) -> None:
    cache = llama.remote.new_cache()
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    logits(llama.remote, IDS, cache, mask)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    cache.crop(-2)
    cache.batch_select_indices(torch.tensor([True, False, True]))
    assert cache.batch_size == 2
    assert cache.get_seq_length() == 3
    session = cache.session
    ids, kept = torch.tensor([[5, 6], [7, 8]]), torch.cat([mask[[2, 0], :3], torch.ones(2, 2)], 1).long()
    whole = torch.cat([IDS[[2, 0], :3], ids], 1)
    torch.testing.assert_close(logits(llama.remote, ids, cache, kept), logits(llama.plain, whole, mask=kept))
    assert cache.session is session, "the session has room for fewer sequences"
    cache.batch_repeat_interleave(2)
    assert cache.session is None, "and not for more"
    ids, kept = torch.tensor([[1], [2], [3], [4]]), torch.cat([kept, torch.ones(2, 1).long()], 1)
    whole, kept = torch.cat([whole.repeat_interleave(2, 0), ids], 1), kept.repeat_interleave(2, 0)
    torch.testing.assert_close(logits(llama.remote, ids, cache, kept), logits(llama.plain, whole, mask=kept))
    assert cache.session.sequences == 4
    cache.close()
    assert llama.sessions_end()


def test_a_copy_goes_its_own_way(llama: Tiny) -> None:
    cache = llama.remote.new_cache()
    logits(llama.remote, IDS[:1, :4], cache)
    copied = copy.deepcopy(cache)
    found = (
        logits(llama.remote, torch.tensor([[7]]), copied),
        logits(llama.remote, torch.tensor([[8]]), cache),
    )
    for token, one in zip((7, 8), found, strict=True):
        torch.testing.assert_close(
            one, logits(llama.plain, torch.cat([IDS[:1, :4], torch.tensor([[token]])], 1))
        )


def test_the_session_ends_with_its_cache(llama: Tiny) -> None:
    cache = llama.remote.new_cache()
    logits(llama.remote, IDS, cache)
    assert llama.sessions
    del cache
    gc.collect()
    assert llama.sessions_end()


def test_a_closed_cache_opens_another_session(llama: Tiny) -> None:
    cache = llama.remote.new_cache()
    logits(llama.remote, IDS[:, :4], cache)
    cache.close()
    cache.close()
    torch.testing.assert_close(logits(llama.remote, IDS[:, 4:], cache), logits(llama.plain, IDS))
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(logits(llama.remote, IDS[:2], cache), logits(llama.plain, IDS[:2]))
    cache.crop(-5)
    torch.testing.assert_close(logits(llama.remote, IDS, cache), logits(llama.plain, IDS))
    cache.close()
    assert llama.sessions_end()


def test_what_a_cache_refuses(llama: Tiny) -> None:
    cache = llama.remote.new_cache()
    logits(llama.remote, IDS, cache)
    with pytest.raises(InputError, match="3 sequences, and the step 2"):
        logits(llama.remote, IDS[:2], cache)
    with pytest.raises(InputError, match="cannot remove"):
        cache.crop(-6)
    with pytest.raises(InputError, match="follow each other"):
        llama.remote(IDS, past_key_values=cache, position_ids=torch.arange(7, 12)[None])
    embeds = llama.remote.get_input_embeddings()(IDS).requires_grad_()
    with pytest.raises(InputError, match="gradients"):
        llama.remote(inputs_embeds=embeds, past_key_values=cache)
    assert cache.get_seq_length() == 5
