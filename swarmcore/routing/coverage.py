"""Whether servers cover a span; which banned ones are needed for it; the error when blocks are missing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence

from swarmcore.errors import MissingBlocksError, ModelMismatchError
from swarmcore.registry.base import SwarmView
from swarmcore.routing.health import Ban
from swarmcore.types import ModelInfo, PeerId, ServerInfo, Span, short

Bans = Mapping[PeerId, Ban] | Collection[PeerId]
"""Whom to do without if that can be done; with `Ban`s it is known whose ends first."""


MOST_NAMED = 4
"""Servers that a message names."""


def missing_ranges(spans: Iterable[Span], whole: Span) -> list[Span]:
    """The parts of ``whole`` that none of ``spans`` covers, in order."""
    missing = []
    position = whole.start
    for start, end in sorted({(span.start, span.end) for span in spans}):
        if start > position:
            missing.append(Span(position, min(start, whole.end)))
        position = max(position, end)
        if position >= whole.end:
            break
    if position < whole.end:
        missing.append(Span(position, whole.end))
    return [span for span in missing if span.start < span.end]


def reprieved(suspects: Iterable[ServerInfo], scarce: Collection[int], banned: Bans) -> list[ServerInfo]:
    """Those of the banned ``suspects`` that must be used for the blocks ``scarce``, which nobody else holds.

    No server among them could be left out without a block more going missing. Where there is a choice, those
    whose ban ends first remain.
    """
    held = {server.peer: [b for b in scarce if server.span and b in server.span] for server in suspects}
    needed = [server for server in suspects if held[server.peer]]
    if isinstance(banned, Mapping):
        needed.sort(key=lambda server: banned[server.peer].until)
    holders = Counter(block for server in needed for block in held[server.peer])
    for server in reversed(tuple(needed)):
        if all(holders[block] > 1 for block in held[server.peer]):
            needed.remove(server)
            holders.subtract(held[server.peer])
    return needed


def left_out(servers: Iterable[ServerInfo], needed: Collection[str]) -> str:
    """Which online ``servers`` cannot be used for lack of ``needed`` capabilities, to end a message with;
    empty when all have them."""
    unable = [s for s in servers if s.state == "online" and not set(needed) <= set(s.capabilities)]
    if not unable:
        return ""
    named = ", ".join(f"{short(s.peer)} {s.span} ({s.computes})" for s in unable[:MOST_NAMED])
    return f"; left out, as their executors have no {' or no '.join(needed)}: {named}" + ", …" * (
        len(unable) > MOST_NAMED
    )


def explain_missing(
    view: SwarmView, model: ModelInfo, missing: Sequence[Span], *, chosen: bool = False
) -> MissingBlocksError | ModelMismatchError:
    """The error for blocks that no usable server holds: what to start, or which weights do not match.

    ``chosen`` is whether this peer uses only some servers by its own choice, which may be the reason.
    """
    if not view.serving(model.fingerprint):
        strangers = [m for m in view.models().values() if m.name == model.name]
        if strangers:
            others = ", ".join(f"{m.name} ({m.fingerprint[:12]})" for m in strangers)
            return ModelMismatchError(
                f"the servers hold other weights than this client: they serve {others}, this client has "
                f"{model.name} ({model.fingerprint[:12]}); load the same files on both sides"
            )
    ranges = [str(span) for span in missing]
    served = sorted({m.name for m in view.models().values() if m.fingerprint != model.fingerprint})
    others = f"; this swarm serves {', '.join(served)}" if served else ""
    # The name is what servers announce; it need not be where anyone finds the files.
    commands = "; ".join(f"swarmcore serve --model MODEL --blocks {span} --bootstrap …" for span in ranges)
    return MissingBlocksError(
        f"no server{' that this client may use' if chosen else ''} holds blocks {', '.join(ranges)} of "
        f"{model.name}; start: {commands} (MODEL: the hub id, folder or GGUF file of {model.name}){others}",
        ranges=ranges,
    )
