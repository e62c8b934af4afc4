"""A swarm as a client uses it: sessions, batches, texts and models."""

from __future__ import annotations

import functools
import os
import random
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from swarmcore.client.autograd.bridge import batch_runner
from swarmcore.client.autograd.micro_batches import BatchRunner
from swarmcore.client.autograd.options import PassOptions
from swarmcore.client.connection import SwarmConnection
from swarmcore.client.generation.chat import Chat
from swarmcore.client.generation.remote import PATIENCE, GenerationServerChoice, RemoteGeneration, RemoteRun
from swarmcore.client.session.options import SessionOptions
from swarmcore.errors import AddressError, InputError
from swarmcore.generation_settings import GenerationOptions, GenerationSettings, open_generation
from swarmcore.identity import Identity, public_key
from swarmcore.imports import import_large
from swarmcore.registry.choice import RegistryChoice, make_registry
from swarmcore.routing.costs import CostModel, Latencies
from swarmcore.routing.least_latency import LeastLatency
from swarmcore.rpc.node import Node
from swarmcore.transport import transport_class
from swarmcore.types import Address, ModelInfo, PeerId
from swarmcore.wire.limits import Limits

if TYPE_CHECKING:
    from swarmcore.client.generation.model import RemoteModel
    from swarmcore.prompts import Prompt
    from swarmcore.types import Progress

_MDNS = "libp2p"  # the transport whose peers are found that way


class Swarm(SwarmConnection):
    """What a client sees and does in a swarm. Made by `connect`, and then joined: ``async with connect(…) as
    swarm``, which closes it at the end, or ``swarm = await connect(…)``, after which you close it.

    Arguments are those of `SwarmConnection`.
    """

    def batch_runner(self, model: ModelInfo, options: PassOptions | None = None) -> BatchRunner:
        """What runs batches through blocks of ``model`` and back, without torch."""
        return batch_runner(self, model, options)

    def generate(
        self,
        prompt: Prompt,
        *,
        model: str = "",
        adapter: str = "",
        patience: float = PATIENCE,
        **options: Unpack[GenerationOptions],
    ) -> RemoteGeneration:
        """Continue a text, or answer chat messages, without torch and without any part of the model: a
        *generation server*, which was started with ``--serve-head``, runs tokenizer, embeddings, head and
        sampling.

        Iterate over its pieces as they come, or await it whole. ``model`` is a name or fingerprint, and may
        be left out where generation servers offer only one; ``adapter`` is the name of one that servers have.
        ``options`` are those of `RemoteModel.generate`, but for ``logits_processors`` and
        ``chat_template_kwargs``. When the generation server fails, another one goes on with the same tokens;
        before the first of them each is tried once, later they are looked for for ``patience`` seconds.

        Raise `InputError` at once for settings out of range, and at the first piece for what the model does
        not take; `MissingHeadError` when nobody makes texts of the model, `BusyError` when all who do have no
        time, or else what the last of them raised.
        """
        self._check_joined()
        request = open_generation(prompt, GenerationSettings.of(options), adapter=adapter, rng=self._rng)
        choice = GenerationServerChoice(model, self._rng, admits=self.router.admits)
        run = RemoteRun(self.node, self.registry, self.health, choice, patience)
        return RemoteGeneration(run, request)

    def generation_model(self, model: str = "") -> ModelInfo:
        """The one of which generation servers make texts when `generate` is given ``model``.

        Raise `InputError` when that may be several, `MissingHeadError` when no generation server is known.
        """
        return GenerationServerChoice(model, self._rng, admits=self.router.admits).offer(self.view())

    def chat(self, *, system: str | None = None, model: str = "") -> Chat[RemoteGeneration]:
        """A conversation in which generation servers answer: ``async for piece in chat.say("Hello")``."""
        self._check_joined()
        return Chat(functools.partial(self.generate, model=model), system)

    async def load_model(
        self,
        name_or_path: str | os.PathLike[str] | None = None,
        *,
        dtype: str = "auto",
        revision: str | None = None,
        threads: int | None = None,
        executor: str = "auto",
        cache_dir: Path | None = None,
        session_options: SessionOptions | None = None,
        pass_options: PassOptions | None = None,
        draft: str | os.PathLike[str] | None = None,
        progress: Progress | None = None,
    ) -> RemoteModel:
        """Load embeddings, head and tokenizer of a model, for its blocks to be run by the swarm.

        ``name_or_path`` is what servers were started with: a folder, a GGUF file or a hub id; or the name or
        fingerprint of a model that the swarm serves; or None for the only one that it serves. The latter two
        are loaded from the public place that their servers name, if what is there has their fingerprint.

        ``executor`` is what computes the output layer here for single rows: ``"torch"``; ``"ggml"``
        (llama.cpp), of a GGUF as it is in the file; or ``"auto"``, which is ggml for a GGUF where that is
        installed and no ``dtype`` is asked for. Several rows at once are torch's.

        ``draft`` names what guesses tokens ahead of the model, besides the lookup of what came before, which
        costs nothing: a small language model, or an EAGLE head for this one, as a folder, a GGUF file or a
        hub id, which then runs here; or ``"heads"`` for the layer that some models have of their own to
        predict further tokens. It makes texts come sooner, and never others.

        ``session_options`` say how the model's sessions travel: deadlines, codec, chunks of prompts;
        ``pass_options`` the same of batches through `RemoteModel.blocks`. Raise
        `ModelNotFoundError`, `CheckpointError`, `ModelMismatchError`, `MissingBlocksError` when nobody serves
        a model that could be meant, and `MissingExtraError` without the extra ``torch``. Servers of all its
        blocks are looked for when a session opens, not here. ``progress`` is called with what is being done,
        and how many bytes of how many, from another thread; in a notebook there are bars without it.
        """
        self._check_joined()
        self.node.check_loop()
        if progress is None:
            progress = notebook_progress()
        import_large("swarmcore.client.generation.model", progress=progress)
        from swarmcore.client.generation.model import RemoteModel

        if not isinstance(name_or_path, str | os.PathLike | None):
            raise InputError(f"a model is named by a text or a path; got {name_or_path!r:.80}")
        model = await RemoteModel.load(
            self,
            None if name_or_path is None else os.fspath(name_or_path),
            dtype=dtype,
            revision=revision,
            threads=threads,
            executor=executor,
            cache_dir=cache_dir,
            session_options=session_options,
            pass_options=pass_options,
            draft=None if draft is None else os.fspath(draft),
            progress=progress,
        )
        self._users.push_async_callback(model.close)
        return model


def connect(
    *bootstrap: str,
    identity: Identity | None = None,
    transports: Sequence[str] = (),
    transport_options: Mapping[str, Mapping[str, Any]] | None = None,
    mdns: bool = False,
    registry: RegistryChoice = "gossip",
    allowed_servers: Collection[PeerId] | None = None,
    blocked_servers: Collection[PeerId] = (),
    max_hops: int | None = None,
    limits: Limits | None = None,
) -> Swarm:
    """A swarm that any of the ``bootstrap`` addresses is a member of. Join it: ``async with connect(…) as
    swarm``, or ``swarm = await connect(…)``.

    ``transports`` are schemes to have besides those of the bootstrap addresses, ``transport_options`` the
    keyword arguments of their constructors, by scheme (what is named there, the swarm has, too). With
    ``mdns`` members are looked for on the local network, too, over libp2p, and no address is needed.
    ``registry`` is the one that the swarm's members run, by its name or itself. ``allowed_servers``, when
    given, are the only peers whose blocks are used; those of ``blocked_servers`` never are. Chains have at
    most ``max_hops`` servers. Raise `AddressError` for a bad address or peer id,
    `UnknownTransportError` and `MissingExtraError` for a transport that is not installed; joining raises
    `PeerUnreachableError` when no bootstrap peer answers.
    """
    if not bootstrap and not mdns:
        raise AddressError(
            "connect needs the address of at least one member of the swarm, or mdns=True to look for one on "
            "the local network"
        )
    addresses = [Address.parse(url) for url in bootstrap]
    for peer in (*(allowed_servers or ()), *blocked_servers):
        public_key(peer)
    options = transport_options or {}
    schemes = dict.fromkeys(
        [*(a.scheme for a in addresses), *transports, *options, *([_MDNS] if mdns else [])]
    )

    def connection(identity: Identity) -> Swarm:
        transports = [
            transport_class(scheme)(identity, limits=limits, **options.get(scheme, {})) for scheme in schemes
        ]
        node = Node(identity, transports, limits=limits)
        latencies = Latencies()
        router = LeastLatency(
            random.Random(),
            costs=CostModel(rtts=latencies.seconds),
            allowed=allowed_servers,
            blocked=blocked_servers,
            max_hops=max_hops,
        )
        return Swarm(
            node,
            make_registry(registry, node, addresses, member=False),
            router=router,
            latencies=latencies,
            connect_again=lambda: connection(Identity.generate()),
            find_neighbours=mdns,
        )

    return connection(identity or Identity.generate())


def notebook_progress() -> Callable[[str, int, int], None] | None:
    """Bars of tqdm, in a notebook that has it; None elsewhere: there, programs show progress as they like."""
    if "ipykernel" not in sys.modules:
        return None
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return None
    return TqdmProgress(tqdm)


class TqdmProgress:
    """A bar for each piece of work, closed when it is done; one of unknown size when the next begins."""

    def __init__(self, tqdm: Callable[..., Any]) -> None:
        self._tqdm = tqdm
        self._bars: dict[str, Any] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        bar = self._bars.get(what)
        if bar is None:
            for name in [name for name, other in self._bars.items() if not other.total]:
                self._bars.pop(name).close()
            bar = self._bars[what] = self._tqdm(
                desc=what, total=total or None, unit="B", unit_scale=True, unit_divisor=1000
            )
        bar.total = total or None
        bar.update(done - bar.n)
        if total and done >= total:
            self._bars.pop(what).close()
