"""In which codec the rows of a pass travel: always the same one, or as the link to each server allows."""

from __future__ import annotations

from collections.abc import Iterable

from swarmcore.client.autograd.rpc import PassResult
from swarmcore.routing.link_codec import LinkCodec, TensorKind
from swarmcore.types import PeerId
from swarmcore.wire.tensors import Tensor


class BatchCodecs:
    """Chooses codecs, and learns from each pass. ``codec`` is for all rows, or ``"auto"``, by ``links``."""

    def __init__(self, codec: str, links: LinkCodec | None = None) -> None:
        self._fixed = codec
        self._links: LinkCodec | None = None
        if codec == "auto":
            self._links = LinkCodec() if links is None else links

    def __repr__(self) -> str:
        return f"<BatchCodecs {self._links or self._fixed}>"

    def choose(
        self, peer: PeerId, kind: TensorKind, rows: Tensor, now: float, chain: Iterable[PeerId] = ()
    ) -> tuple[str, str]:
        """The codecs for ``rows`` to ``peer`` and for as many that come back.

        ``chain`` is every server that the micro-batch passes through.
        """
        if self._links is None:
            return self._fixed, self._fixed
        peers = tuple(chain)
        up = self._links.codec(peer, "up", kind, rows.dtype, rows.shape, now, chain=peers)
        down = self._links.codec(peer, "down", kind, rows.dtype, rows.shape, now, chain=peers)
        return up, down

    def done(self, peer: PeerId, kind: TensorKind, rows: Tensor, result: PassResult, now: float) -> None:
        """A pass of ``rows`` has come to its end."""
        if self._links is None:
            return
        self._links.transferred(peer, "up", result.up.nbytes, result.up.seconds, now)
        self._links.transferred(peer, "down", result.down.nbytes, result.down.seconds, now)
        self._links.computed(peer, kind, rows.shape, result.seconds, now)

    def refused(self, peer: PeerId, codecs: Iterable[str]) -> bool:
        """``peer`` does not know one of ``codecs``. Return whether others will now be chosen for it."""
        suspects = [codec for codec in codecs if codec != "raw"]
        if self._links is None or not suspects:
            return False
        # The server does not say which of them; and another micro-batch may have been refused just before.
        for codec in suspects:
            if self._links.refused(peer, codec):
                break
        return True

    def knows(self, peer: PeerId, codec: str) -> bool:
        """Whether ``peer`` has not refused ``codec``, as far as choices are made here."""
        return self._links is None or self._links.knows(peer, codec)
