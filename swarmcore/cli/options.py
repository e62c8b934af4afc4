"""Options that several commands share, and what they have in common: output, logging, how errors end them."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable, Sequence
from traceback import format_exception
from types import TracebackType
from typing import Any

import attrs
import click

from swarmcore.cli.log_lines import LineFilter, PrintableFormatter
from swarmcore.cli.output import Output
from swarmcore.cli.webrtc import CLIENT_OPTIONS, LISTENING_OPTIONS, SCHEME, webrtc_options
from swarmcore.errors import IdentityFileError, InputError, SwarmError
from swarmcore.generation_settings import SETTINGS, WIRE_SETTINGS, Setting
from swarmcore.identity import Identity
from swarmcore.identity_files import HeldIdentity, kept_identity
from swarmcore.printable import printable, printable_line
from swarmcore.session.steps import JournalMode
from swarmcore.types import PeerId

MAX_ERROR = 4000
"""Characters that are shown of one error."""

Option = Callable[[Any], Any]
"""A decorator of click's, or one made of several."""


class Failure(click.ClickException):
    """A `SwarmError` on its way out: one line on stderr, exit status 1."""

    def __init__(self, error: SwarmError) -> None:
        super().__init__(one_line(error))

    def show(self, file: Any = None) -> None:
        click.echo(f"error: {printable(self.message)}", err=True)


class InputFailure(Failure):
    """An `InputError` on its way out: exit status 2, as for click's own usage errors."""

    exit_code = 2


def one_line(error: SwarmError) -> str:
    """The message without line breaks, whatever library it began in."""
    return printable_line(str(error), MAX_ERROR)


def standard(command: Callable[..., Any]) -> Callable[..., None]:
    """Give a command ``--json``, ``--log-level`` and ``--debug``; it is called with an `Output` first.

    A `SwarmError` becomes one line on stderr (and an ``error`` event); with ``--debug`` it is a traceback.
    """

    @click.option("--json", "json_lines", is_flag=True, help="Print one JSON object a line, for programs.")
    @click.option(
        "--log-level",
        type=click.Choice(["debug", "info", "warning", "error"]),
        default="warning",
        show_default=True,
        help="What is logged to stderr.",
    )
    @click.option("--debug", is_flag=True, help="Show the traceback of an error.")
    @functools.wraps(command)
    def wrapped(json_lines: bool, log_level: str, debug: bool, **options: Any) -> None:
        output = Output(json_lines=json_lines)
        _configure_logging(log_level)
        sys.excepthook = _show_traceback
        try:
            command(output, **options)
        except SwarmError as exc:
            output.event("error", error=exc.wire_tag, message=str(exc), details=exc.details)
            if debug:
                raise
            raise (InputFailure if isinstance(exc, InputError) else Failure)(exc) from exc

    return wrapped


def _show_traceback(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """What Python shows of an exception that nobody handles, printable."""
    click.echo(printable("".join(format_exception(kind, error, traceback))), err=True, nl=False)


def _configure_logging(level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(LineFilter())
    handler.setFormatter(PrintableFormatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # The model libraries' own bars would fight with ours over the terminal.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


_identity = click.option(
    "--identity",
    "identity_file",
    metavar="FILE",
    help="Private key of this peer, created on first use. Without it: a new identity each time.",
)

_own_identity = (
    click.option(
        "--identity",
        "identity_file",
        metavar="FILE",
        help="Private key of this peer, created on first use. [default: one that is kept for its --name]",
    ),
    click.option(
        "--new-identity",
        is_flag=True,
        envvar="SWARMCORE_NEW_IDENTITY",
        help="Be a new peer each time, unless --identity names a file.",
    ),
)

_mdns = click.option(
    "--mdns",
    is_flag=True,
    is_eager=True,
    help="Find peers on the local network (libp2p): no address has to be given.",
)


_registry = click.option(
    "--registry",
    default="gossip",
    show_default=True,
    metavar="NAME",
    help="How the swarm's peers know of each other, the same at all of them: gossip, dht (libp2p; for very "
    "large swarms), or one that a plug-in brings.",
)


def _whom_to_ask(
    context: click.Context, option: click.Parameter, addresses: tuple[str, ...]
) -> tuple[str, ...]:
    if not addresses and not context.params.get("mdns") and not context.resilient_parsing:
        raise click.MissingParameter(
            "Or set SWARMCORE_BOOTSTRAP, or look on the local network with --mdns.", context, option
        )
    return addresses


_LISTENING = (
    click.option(
        "--transport",
        "transports",
        multiple=True,
        default=("tcp",),
        show_default=True,
        help="Transport to listen on; repeat for several.",
    ),
    click.option(
        "--listen",
        multiple=True,
        metavar="HOST:PORT",
        help="Where to listen; port 0 is any free one. With several transports: SCHEME://HOST:PORT. "
        "/ip4/0.0.0.0/tcp/4001 is for libp2p. [default: port 7927 of 0.0.0.0, or the next free one]",
    ),
    click.option(
        "--announce",
        multiple=True,
        metavar="HOST:PORT",
        help="Where others reach this peer, when that is elsewhere (a forwarded port).",
    ),
    click.option(
        "--bootstrap",
        multiple=True,
        metavar="ADDRESS",
        envvar="SWARMCORE_BOOTSTRAP",
        show_envvar=True,
        help="Address of any peer of the swarm to join; repeat for several. Without it a swarm begins.",
    ),
    _mdns,
    _registry,
    click.option(
        "--relay",
        type=click.Choice(["auto", "on", "off"]),
        help="Relay for peers behind routers (libp2p); auto does once everybody is known to reach this peer. "
        "[default: auto]",
    ),
    click.option(
        "--relay-peer",
        "relay_peers",
        multiple=True,
        metavar="ADDRESS",
        help="Be reached through this relay, should a router be in the way (libp2p); repeat for several. "
        "[default: members that relay]",
    ),
    click.option("--no-upnp", is_flag=True, help="Do not ask the router to map a port (libp2p)."),
    *LISTENING_OPTIONS,
    click.option(
        "--allow-peer",
        "allowed_peers",
        multiple=True,
        metavar="PEER_ID",
        help="Speak to these peers only (a closed swarm); repeat for several.",
    ),
    click.option(
        "--allow-file",
        metavar="FILE",
        help="The same from a file, one id a line, which is read again when it changes.",
    ),
    click.option(
        "--exit-with-stdin",
        is_flag=True,
        help="Leave when stdin ends, for a program that starts peers: they end with it, however it ends.",
    ),
    *_own_identity,
)

_CLIENT = (
    click.option(
        "--bootstrap",
        multiple=True,
        callback=_whom_to_ask,
        metavar="ADDRESS",
        envvar="SWARMCORE_BOOTSTRAP",
        show_envvar=True,
        help="Address of any peer of the swarm; repeat for several. Needed without --mdns.",
    ),
    _mdns,
    _registry,
    *CLIENT_OPTIONS,
    _identity,
)

_REMOTE_MODEL = (
    click.option(
        "--model",
        metavar="MODEL",
        help="Hub id, folder or GGUF file, or the name that the swarm has for it. "
        "[default: the one model that the swarm serves]",
    ),
    click.option("--revision", metavar="NAME", help="Branch, tag or commit of a hub model."),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
        default="auto",
        show_default=True,
        help="Type of embeddings and head here; auto is the checkpoint's own.",
    ),
    click.option("--threads", type=click.IntRange(min=1), metavar="N", help="Compute threads here."),
    click.option(
        "--codec",
        type=click.Choice(["raw", "int8", "raw+zstd", "int8+zstd"]),
        default="raw",
        show_default=True,
        help="How hidden states travel; int8 halves the bytes for 1 to 2 % of precision.",
    ),
    click.option(
        "--allow-server",
        "allowed_servers",
        multiple=True,
        metavar="PEER_ID",
        help="Use blocks of these servers only; repeat for several.",
    ),
    click.option(
        "--block-server",
        "blocked_servers",
        multiple=True,
        metavar="PEER_ID",
        help="Never use blocks of this server; repeat for several.",
    ),
    click.option("--max-hops", type=click.IntRange(min=1), metavar="N", help="At most N servers in a chain."),
    click.option(
        "--journal",
        type=click.Choice(["client", "servers", "off"]),
        default="client",
        show_default=True,
        help="Who keeps what lost servers are rebuilt from; servers spares this machine's downlink, with off "
        "a lost server ends the generation.",
    ),
    click.option(
        "--patience",
        type=click.FloatRange(min=0),
        default=60.0,
        show_default=True,
        metavar="SECONDS",
        help="How long to look for a replacement of a server that was lost.",
    ),
    click.option("--route", is_flag=True, help="Show the servers in use, and where a token's time goes."),
    click.option(
        "--wait",
        type=click.FloatRange(min=0),
        default=10.0,
        show_default=True,
        metavar="SECONDS",
        help="How long to wait for servers of missing blocks.",
    ),
)


def _sampling_option(name: str, setting: Setting) -> Option:
    return click.option(
        f"--{name.replace('_', '-')}",
        type=(int if setting.whole else float) if setting.allowed else str,
        multiple=not setting.allowed,
        help=setting.help if setting.allowed else f"{setting.help} Repeat for several.",
    )


_SAMPLING = [_sampling_option(name, SETTINGS[name]) for name in SETTINGS if name in WIRE_SETTINGS]


def _adding(options: Sequence[Option]) -> Option:
    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _gathering(name: str, make: Callable[..., Any], options: Sequence[Option]) -> Option:
    """As `_adding`, but the command gets all their values in one argument, ``name``, made by ``make``."""
    fields = [parameter.name for parameter in click.command(_adding(options)(lambda: None)).params]

    def decorate(command: Any) -> Any:
        @functools.wraps(command)
        def gathered(**values: Any) -> Any:
            return command(**{name: make(**{field: values.pop(field) for field in fields})}, **values)

        return _adding(options)(gathered)

    return decorate


@attrs.frozen(kw_only=True)
class RemoteModelOptions:
    """The values of `remote_model_options`."""

    bootstrap: tuple[str, ...]
    mdns: bool
    registry: str
    ice: tuple[str, ...]
    ice_file: str | None
    ice_relay_only: bool
    signalling_ca: str | None
    webrtc_engine: str | None
    identity_file: str | None
    model: str | None
    revision: str | None
    dtype: str
    threads: int | None
    codec: str
    allowed_servers: tuple[PeerId, ...]
    blocked_servers: tuple[PeerId, ...]
    max_hops: int | None
    journal: JournalMode
    patience: float
    route: bool
    wait: float

    @property
    def transport_options(self) -> dict[str, dict[str, Any]]:
        """As `connect` takes them."""
        return transport_options(
            ice=self.ice,
            ice_file=self.ice_file,
            ice_relay_only=self.ice_relay_only,
            signalling_ca=self.signalling_ca,
            webrtc_engine=self.webrtc_engine,
        )


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None and value != ()}


network_options = _adding(_LISTENING)
"""What every listening peer takes: its transports, where they listen, whom they join, as whom."""

client_options = _adding(_CLIENT)
"""What every client takes: whom to ask for the swarm, and as whom."""

remote_model_options = _gathering("remote", RemoteModelOptions, (*_CLIENT, *_REMOTE_MODEL))
"""What every client of a model takes; the command gets a `RemoteModelOptions` as ``remote``."""

sampling_options = _gathering("sampling", _given, _SAMPLING)
"""How tokens are chosen; what is not given is left to the model's own generation settings.

The command gets as ``sampling`` the keyword arguments of `RemoteModel.generate` that were given.
"""


def transport_options(**webrtc: Any) -> dict[str, dict[str, Any]]:
    """From the values of `client_options` that concern one transport to what `connect` takes."""
    options = webrtc_options(**webrtc)
    return {SCHEME: options} if options else {}


def load_identity(file: str | None) -> Identity:
    """The identity in ``file``, created there on first use; a new one in memory when there is no file."""
    return Identity.load_or_create(file) if file is not None else Identity.generate()


def own_identity(output: Output, file: str | None, new: bool, name: str) -> Identity:
    """Whom a listening peer is, from `network_options`: the identity in ``file``, a ``new`` one, or the one
    kept for its ``name``, and a new one where none can be kept. No other process gets it before this command
    has ended.

    Raise `IdentityInUseError` when another process uses ``file``, `IdentityFileError` when it is no key.
    """
    if file is None and new:
        return Identity.generate()
    try:
        # Who was killed a moment ago, and is started anew, may not be quite gone yet.
        held = HeldIdentity(file, patience=3.0) if file is not None else kept_identity(name)
    except IdentityFileError as exc:
        if file is not None:
            raise
        output.remark(f"a new identity, which is not kept: {exc}")
        return Identity.generate()
    click.get_current_context().call_on_close(held.release)
    if file is None:
        output.remark(f"this peer is {held.identity.peer}, kept in {held.path}")
    return held.identity


def set_thread_environment(threads: int | None) -> None:
    """Tell OpenMP, which reads this when torch is imported and never again, how many threads to use.

    Idle threads sleep instead of spinning: else they take the cores from the event loop and from other
    processes on the machine.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if threads is not None and threads > 0:
        os.environ["OMP_NUM_THREADS"] = str(threads)
