"""What the pages of a session are called on which chain."""

from __future__ import annotations

from swarmcore.client.session.prefix import SessionPrefix
from swarmcore.routing.chain import Chain, Stage
from swarmcore.types import PeerId, ServerInfo, Span
from swarmcore.wire.prefix_names import MAX_SESSION_NAMES, NAME_BYTES

TOKENS = list(range(200))


def chain(*numerics: str) -> Chain:
    spans = [Span(4 * n, 4 * n + 4) for n in range(len(numerics))]
    servers = [
        ServerInfo(PeerId(str(n)), (), span=spans[n], numerics=each) for n, each in enumerate(numerics)
    ]
    return Chain(tuple(map(Stage, servers, spans)))


def test_names_depend_on_how_the_chain_computes() -> None:
    chains = [chain("torch/bf16"), chain("torch/f32"), chain("torch/bf16", "torch/f32")]
    chains.append(chain("torch/f32", "torch/bf16"))
    found = {SessionPrefix([TOKENS], "model").names(each) for each in chains}
    assert len(found) == 4
    assert SessionPrefix([TOKENS], "model").names(chain("torch/bf16", "torch/bf16")) in found


def test_replacements_that_compute_alike_have_the_same_names_and_others_none() -> None:
    prefix = SessionPrefix([TOKENS], "model")
    prefix.opened_on(chain("torch/bf16", "torch/bf16"))
    names = prefix.names()
    assert names == prefix.names(chain("torch/bf16")) != ()
    prefix.replaced_by(chain("torch/bf16"))
    assert prefix.names() == names
    assert prefix.names(chain("torch/f32")) == ()
    prefix.replaced_by(chain("torch/f32"))
    assert prefix.names() == prefix.names(chain("torch/bf16")) == ()


def test_all_but_the_last_row_may_be_skipped_of_what_has_names() -> None:
    prefix = SessionPrefix([TOKENS, TOKENS[:10]], "model")
    assert [prefix.skipped(0, cached, 200) for cached in (0, 64, 128, 192, 10**9)] == [0, 64, 128, 192, 192]
    assert prefix.skipped(0, 192, 192) == 191
    assert prefix.skipped(0, 192, 0) == prefix.skipped(1, 64, 10) == 0


def test_it_grows_by_whole_pages() -> None:
    prefix = SessionPrefix([TOKENS[:100]], "model")
    assert not prefix.grown([TOKENS[:127]])
    assert prefix.grown([TOKENS[:128]])
    assert not prefix.grown([TOKENS[:128]])
    assert prefix.grown([[7, *TOKENS[1:128]]])


def test_no_more_names_than_a_message_may_hold() -> None:
    prefix = SessionPrefix([list(range(64 * 30))] * 200, "model")
    names = prefix.names(chain("torch/bf16"))
    assert len(names) == 200 and sum(map(len, names)) <= MAX_SESSION_NAMES * NAME_BYTES
    assert min(map(len, names)) == MAX_SESSION_NAMES // 200 * NAME_BYTES
