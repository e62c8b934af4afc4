"""The options that several commands take, each written once, and the groups that commands take them in."""

from __future__ import annotations

from typing import Any

import attrs
import click

from swarmcore.cli.option_kinds import Option, choice, count, flag, gathered, number, option, options, several
from swarmcore.generation_settings import SETTINGS, SPECULATION, WIRE_SETTINGS, Setting
from swarmcore.session.steps import JournalMode
from swarmcore.types import PeerId

# --- models ----------------------------------------------------------------------------------------------

DTYPES = ("auto", "float32", "bfloat16", "float16")

revision = option("--revision", metavar="NAME", help="Branch, tag or commit of a hub model.")
public_name = option(
    "--name", "public_name", default="", metavar="TEXT", help="Name shown to others in the status."
)


def dtype(of: str) -> Option:
    """``--dtype``; the help says that it is the type of ``of``."""
    return choice("--dtype", *DTYPES, default="auto", help=f"Type of {of}; auto is the checkpoint's own.")


# --- whom to know, and as whom ---------------------------------------------------------------------------

_mdns = flag(
    "--mdns", is_eager=True, help="Find peers on the local network (libp2p): no address has to be given."
)
_registry = option(
    "--registry",
    default="gossip",
    metavar="NAME",
    help="How the swarm's peers know of each other, the same at all of them: gossip, dht (libp2p; for very "
    "large swarms), or one that a plug-in brings.",
)
_webrtc = options(
    several(
        "--ice",
        metavar="SERVER",
        help="STUN or TURN server for the way through routers (WebRTC): stun:HOST:PORT, "
        "turn:USER:PASSWORD@HOST:PORT or turn-secret:SECRET@HOST:PORT, with ?transport=tcp if need be; "
        "repeat for several, of which those are used that answer.",
    ),
    option(
        "--ice-file",
        metavar="FILE",
        help="The same from a file that only its owner may read, one a line: passwords are not for command "
        "lines.",
    ),
    flag(
        "--ice-relay-only",
        help="Talk by way of TURN servers alone (WebRTC): others do not learn this machine's address.",
    ),
    option(
        "--signalling-ca",
        metavar="FILE",
        help="Certificates (PEM) to believe of signalling services with TLS. [default: the system's]",
    ),
    option(
        "--webrtc-engine",
        metavar="NAME",
        help="WebRTC implementation, by the name under which a plugin has installed it. "
        "[default: auto, which is aiortc]",
    ),
)

network_options = gathered(
    "network",
    dict,
    several(
        "--transport",
        "transports",
        metavar="TEXT",
        default=("tcp",),
        help="Transport to listen on; repeat for several.",
    ),
    several(
        "--listen",
        metavar="HOST:PORT",
        help="Where to listen; port 0 is any free one. With several transports: SCHEME://HOST:PORT. "
        "/ip4/0.0.0.0/tcp/4001 is for libp2p. [default: port 7927 of 0.0.0.0, or the next free one]",
    ),
    several(
        "--announce",
        metavar="HOST:PORT",
        help="Where others reach this peer, when that is elsewhere (a forwarded port).",
    ),
    several(
        "--bootstrap",
        metavar="ADDRESS",
        envvar="SWARMCORE_BOOTSTRAP",
        show_envvar=True,
        help="Address of any peer of the swarm to join; repeat for several. Without it a swarm begins.",
    ),
    _mdns,
    _registry,
    choice(
        "--relay",
        *("auto", "on", "off"),
        help="Relay for peers behind routers (libp2p); auto does once everybody is known to reach this peer. "
        "[default: auto]",
    ),
    several(
        "--relay-peer",
        "relay_peers",
        metavar="ADDRESS",
        help="Be reached through this relay, should a router be in the way (libp2p); repeat for several. "
        "[default: members that relay]",
    ),
    flag("--no-upnp", help="Do not ask the router to map a port (libp2p)."),
    _webrtc,
    option(
        "--signalling-cert",
        metavar="FILE",
        help="Certificate chain (PEM) of the signalling service run here (WebRTC); with it, TLS.",
    ),
    option("--signalling-key", metavar="FILE", help="The key of --signalling-cert (PEM)."),
    several(
        "--allow-peer",
        "allowed_peers",
        metavar="PEER_ID",
        help="Speak to these peers only (a closed swarm); repeat for several.",
    ),
    option(
        "--allow-file",
        metavar="FILE",
        help="The same from a file, one id a line, which is read again when it changes.",
    ),
)
"""What every listening peer takes; the command gets as ``network`` the arguments of `network_config`."""


@attrs.frozen
class ProcessOptions:
    """The values of `process_options`."""

    exit_with_stdin: bool
    identity_file: str | None
    new_identity: bool


process_options = gathered(
    "process",
    ProcessOptions,
    flag(
        "--exit-with-stdin",
        help="Leave when stdin ends, for a program that starts peers: they end with it, however it ends.",
    ),
    option(
        "--identity",
        "identity_file",
        metavar="FILE",
        help="Private key of this peer, created on first use. [default: one that is kept for its --name]",
    ),
    flag(
        "--new-identity",
        envvar="SWARMCORE_NEW_IDENTITY",
        help="Be a new peer each time, unless --identity names a file.",
    ),
)
"""What every listening peer takes besides: until when it runs, and as whom; the command gets `ProcessOptions`
as ``process``."""


def _generation_limits(serve_head: bool, **limits: int) -> Any:
    from swarmcore.head.queue import GenerationLimits

    return GenerationLimits(**limits) if serve_head else None


generation_server_options = gathered(
    "head",
    _generation_limits,
    flag(
        "--serve-head",
        help="Also make texts for clients that have no part of the model and no torch; this peer then sees "
        "what they ask.",
    ),
    count("--head-at-once", "at_once", default=8, help="Texts that are made for others at the same time."),
    count("--head-waiting", "waiting", default=64, help="Texts that may wait for their turn."),
    count(
        "--head-prompt-tokens",
        "prompt_tokens",
        default=4096,
        help="Longest prompt of a text that is made for others.",
    ),
    count("--head-new-tokens", "new_tokens", default=1024, help="Longest text that is made for others."),
)
"""What a peer takes that may make texts for others; it gets `GenerationLimits` as ``head``, or None."""


# --- clients ---------------------------------------------------------------------------------------------


def _check_bootstrap(
    context: click.Context, parameter: click.Parameter, addresses: tuple[str, ...]
) -> tuple[str, ...]:
    if not addresses and not context.params.get("mdns") and not context.resilient_parsing:
        raise click.MissingParameter(
            "Or set SWARMCORE_BOOTSTRAP, or look on the local network with --mdns.", context, parameter
        )
    return addresses


@attrs.frozen(kw_only=True)
class ClientOptions:
    """The values of `client_options`."""

    bootstrap: tuple[str, ...]
    mdns: bool
    registry: str
    ice: tuple[str, ...]
    ice_file: str | None
    ice_relay_only: bool
    signalling_ca: str | None
    webrtc_engine: str | None
    identity_file: str | None


_client = options(
    several(
        "--bootstrap",
        callback=_check_bootstrap,
        metavar="ADDRESS",
        envvar="SWARMCORE_BOOTSTRAP",
        show_envvar=True,
        help="Address of any peer of the swarm; repeat for several. Needed without --mdns.",
    ),
    _mdns,
    _registry,
    _webrtc,
    option(
        "--identity",
        "identity_file",
        metavar="FILE",
        help="Private key of this peer, created on first use. Without it: a new identity each time.",
    ),
)

client_options = gathered("client", ClientOptions, _client)
"""What every client takes: whom to ask for the swarm, and as whom; it gets `ClientOptions` as ``client``."""


@attrs.frozen(kw_only=True)
class RemoteModelOptions(ClientOptions):
    """The values of `remote_model_options`."""

    model: str | None
    revision: str | None
    dtype: str
    threads: int | None
    executor: str
    codec: str
    allowed_servers: tuple[PeerId, ...]
    blocked_servers: tuple[PeerId, ...]
    max_hops: int | None
    journal: JournalMode
    no_prefix_cache: bool
    patience: float
    route: bool
    wait: float
    thin: bool
    speculation: str
    draft: str | None

    @property
    def drafting(self) -> dict[str, Any]:
        """Keyword arguments of `RemoteModel.generate`."""
        return {} if self.speculation == "auto" else {"speculation": self.speculation}


remote_model_options = gathered(
    "remote",
    RemoteModelOptions,
    flag("--thin", help="Let a generation server make the text; that needs no torch here."),
    _client,
    option(
        "--model",
        metavar="MODEL",
        help="Hub id, folder or GGUF file, or the name that the swarm has for it. "
        "[default: the one model that the swarm serves]",
    ),
    revision,
    dtype("embeddings and head here"),
    count("--threads", help="Compute threads here."),
    choice(
        "--executor",
        *("auto", "torch", "ggml"),
        default="auto",
        help="What computes the output layer here; auto is ggml (llama.cpp) for a GGUF where it is installed "
        "and no --dtype is asked for.",
    ),
    choice(
        "--codec",
        *("raw", "int8", "raw+zstd", "int8+zstd", "auto"),
        default="raw",
        help="How hidden states travel; int8 halves the bytes for 1 to 2 % of precision; auto takes it "
        "on slow links.",
    ),
    several(
        "--allow-server",
        "allowed_servers",
        metavar="PEER_ID",
        help="Use blocks of these servers only; repeat for several.",
    ),
    several(
        "--block-server",
        "blocked_servers",
        metavar="PEER_ID",
        help="Never use blocks of this server; repeat for several.",
    ),
    count("--max-hops", help="At most N servers in a chain."),
    choice(
        "--journal",
        *("client", "servers", "off"),
        default="client",
        help="Who keeps what lost servers are rebuilt from; servers spares this machine's downlink, with off "
        "a lost server ends the generation.",
    ),
    flag(
        "--no-prefix-cache",
        help="Compute all of the prompt, whatever servers have kept of it, and have them keep nothing.",
    ),
    number(
        "--patience",
        default=60.0,
        metavar="SECONDS",
        help="How long to look for a replacement of a server that was lost.",
    ),
    choice(
        "--speculation",
        *SPECULATION,
        default="auto",
        help="Whether tokens are drafted, and several of them verified in a step: the same text, sooner, "
        "where measurements say that it pays.",
    ),
    option(
        "--draft",
        metavar="MODEL",
        help="A small model that drafts, too: a folder, a GGUF file or a hub id, which then runs here; an "
        "EAGLE head; or heads, for the layer that some models have to predict further tokens.",
    ),
    flag(
        "--route",
        help="Show the servers in use, where a token's time goes, and what drafts have brought.",
    ),
    number("--wait", default=10.0, metavar="SECONDS", help="How long to wait for servers of missing blocks."),
)
"""What every client of a model takes; the command gets a `RemoteModelOptions` as ``remote``."""


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None and value != ()}


def _sampling_option(name: str, setting: Setting) -> Option:
    return click.option(
        f"--{name.replace('_', '-')}",
        type=(int if setting.whole else float) if setting.allowed else str,
        multiple=not setting.allowed,
        help=setting.help if setting.allowed else f"{setting.help} Repeat for several.",
    )


sampling_options = gathered(
    "sampling",
    _given,
    *(_sampling_option(name, SETTINGS[name]) for name in SETTINGS if name in WIRE_SETTINGS),
)
"""How tokens are chosen; what is not given is left to the model's own generation settings.

The command gets as ``sampling`` the keyword arguments of `RemoteModel.generate` that were given.
"""
