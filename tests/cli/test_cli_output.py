"""The parts of the command line that are plain functions: coverage, places by transport, progress, status."""

import io
import json
import logging
from collections.abc import Mapping

import attrs
import pytest
from rich.table import Table
from rich.text import Text

from swarmcore.cli.command import Failure
from swarmcore.cli.logs import LineFilter, LineLimit, PrintableFormatter
from swarmcore.cli.output import Output
from swarmcore.cli.peer import by_scheme, network_config
from swarmcore.cli.progress import JsonProgress, PlainProgress
from swarmcore.cli.status_view import (
    Diagnostics,
    RoundTrips,
    coverage,
    coverage_bar,
    describe,
    render,
    uncovered,
)
from swarmcore.cli.terminal import PrintableConsole
from swarmcore.errors import InputError
from swarmcore.identity import Identity
from swarmcore.registry.base import SwarmView
from swarmcore.types import ModelInfo, PeerId, ServerInfo, Span, short
from swarmcore_transports.tcp import TcpTransport

MODEL = ModelInfo(name="tiny", fingerprint="f" * 64, blocks=6, hidden_size=8)


def test_coverage_counts_the_servers_of_each_block():
    assert coverage([Span(0, 2), Span(1, 4), Span(5, 9)], 6) == [1, 2, 1, 1, 0, 1]
    assert uncovered([0, 0, 1, 0]) == [Span(0, 2), Span(3, 4)]
    assert uncovered([1, 2]) == []


@pytest.mark.parametrize(
    ("counts", "width", "bar"),
    [
        ([1, 2, 1, 1, 0, 1], 40, "▂▄▂▂·▂"),
        ([1, 2, 3, 4, 5, 0], 3, "▂▆·"),
        ([3] * 100, 10, "▆" * 10),
        ([], 10, ""),
    ],
)
def test_a_character_shows_the_least_covered_of_its_blocks(counts, width, bar):
    assert coverage_bar(counts, width) == bar


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "koi8-r"])
def test_a_bar_is_plain_where_the_terminal_lacks_its_characters(encoding):
    assert coverage_bar([0, 1, 2, 3, 4, 5], 6, encoding) == ".12344"


def test_places_find_their_transport():
    assert by_scheme(["tcp"], ["0.0.0.0:4001", "[::]:4001"]) == {"tcp": ("0.0.0.0:4001", "[::]:4001")}
    assert by_scheme(["tcp", "ws"], ["ws://h:80", "tcp://h:1"]) == {"tcp": ("h:1",), "ws": ("h:80",)}
    assert by_scheme(["libp2p"], ["libp2p:/ip4/0.0.0.0/tcp/4001"]) == {"libp2p": ("/ip4/0.0.0.0/tcp/4001",)}
    assert by_scheme(["tcp", "ws"], []) == {"tcp": (), "ws": ()}
    with pytest.raises(InputError, match="could be any of tcp, ws; write tcp://h:1"):
        by_scheme(["tcp", "ws"], ["h:1"])


def test_multiaddrs_are_for_libp2p():
    anywhere = "/ip4/0.0.0.0/tcp/4001"
    assert by_scheme(["tcp", "libp2p"], [anywhere]) == {"tcp": (), "libp2p": (anywhere,)}
    assert by_scheme(["unix"], ["/tmp/socket"]) == {"unix": ("/tmp/socket",)}
    with pytest.raises(InputError, match="add --transport libp2p"):
        by_scheme(["tcp"], [anywhere])


def test_announced_places_become_whole_addresses():
    peer = Identity.generate().peer
    config = network_config(
        peer,
        transports=["tcp"],
        listen=[],
        announce=["example.org:4001", f"tcp://[2001:db8::1]:4001/{peer}"],
        bootstrap=[],
        allowed_peers=[peer],
    )
    assert config.announce == (f"tcp://example.org:4001/{peer}", f"tcp://[2001:db8::1]:4001/{peer}")
    assert config.transports == {"tcp": TcpTransport.default_places}
    assert config.allowed_peers == {peer}


def test_progress_without_a_terminal_is_a_line_for_each_tenth():
    lines = []
    with PlainProgress(lines.append) as progress:
        for done in range(1001):
            progress("loading", done * 1000, 1_000_000)
        progress("waiting", 0, 0)
        progress("waiting", 0, 0)
    assert len(lines) == 12
    assert lines[0] == "loading: 0 % of 1.0 MB"
    assert lines[10] == "loading: 100 % of 1.0 MB"
    assert lines[11] == "waiting"


def test_progress_in_json_is_events(capsys):
    with JsonProgress(Output(json_lines=True).event) as progress:
        progress("loading", 5, 10)
    assert json.loads(capsys.readouterr().out) == {
        "event": "progress",
        "what": "loading",
        "done": 5,
        "total": 10,
    }


def test_progress_ends_a_thread_that_outlives_its_command():
    with PlainProgress(print) as progress:
        pass
    with pytest.raises(KeyboardInterrupt):
        progress("loading", 1, 10)


def server(span: Span | None, **fields) -> ServerInfo:
    peer = Identity.generate().peer
    model = MODEL if span else None
    return ServerInfo(peer=peer, addresses=("tcp://h:1/" + peer,), model=model, span=span, **fields)


def view(*servers: ServerInfo) -> SwarmView:
    return SwarmView({s.peer: s for s in servers})


def test_status_counts_only_servers_that_are_online():
    swarm = view(server(Span(0, 3)), server(Span(2, 6), state="joining"), server(None))
    found = describe(swarm, {}, {})
    assert found["models"] == [
        {
            "name": "tiny",
            "fingerprint": MODEL.fingerprint,
            "source": "",
            "blocks": 6,
            "coverage": [1, 1, 1, 0, 0, 0],
            "missing": ["3:6"],
        }
    ]
    assert [s["span"] for s in found["servers"]] == [None, "0:3", "2:6"]
    json.dumps(found)


def printed(
    swarm: SwarmView,
    diagnostics: Diagnostics,
    width: int,
    paths: Mapping[PeerId, str] | None = None,
    trips: RoundTrips | None = None,
) -> str:
    from rich.console import Console

    console = Console(width=width, record=True, file=io.StringIO())
    console.print(render(swarm, diagnostics, paths or {}, trips))
    return console.export_text()


def test_a_verbose_status_has_all_there_is_to_copy_and_compare():
    model = attrs.evolve(MODEL, source="pypi:tiny")
    busy = server(Span(0, 6), decode_rps=12.34, forward_rps=718, queue_seconds=0.003, version="0.1.0")
    busy = attrs.evolve(
        busy, model=model, public_name="attic", addresses=(f"tcp://{'h' * 60}:1/{busy.peer}",)
    )
    silent = server(None)
    swarm = view(busy, silent)
    lines = printed(swarm, {}, 160, {busy.peer: "relayed"}, {busy.peer: 0.0123}).splitlines()
    at = lines.index(busy.peer)
    assert lines[at : at + 7] == [
        busy.peer,
        "  attic · swarmcore 0.1.0",
        f"  {busy.addresses[0]}",
        "  round trip 12.3 ms, relayed",
        "  decodes 12.3 steps/s, reads 718 tokens/s, a step waits 3.0 ms",
        "  can do inference, training, adapters",
        "  from pypi:tiny",
    ]
    at = lines.index(silent.peer)
    assert lines[at + 1 : at + 4] == [
        "  swarmcore of an unknown version",
        f"  {silent.addresses[0]}",
        "  no answer",
    ]
    narrow = "".join(printed(swarm, {}, 40, {}, {}).split())
    assert busy.peer in narrow and busy.addresses[0] in narrow, "nothing of what is copied is cut off"
    told = {
        values["peer"]: values["round_trip"]
        for values in describe(swarm, {}, {}, {busy.peer: 0.1})["servers"]
    }
    assert told == {busy.peer: 0.1, silent.peer: None}
    assert busy.peer not in printed(swarm, {}, 200)


def test_status_as_a_table():
    swarm = view(
        server(Span(0, 3), public_name="[bold]attic", cache_tokens=1000, cache_tokens_free=750, sessions=2),
        server(Span(3, 6), state="draining"),
        server(None, public_name="door"),
    )
    text = printed(swarm, {}, 160)
    assert "missing 3:6" in text
    assert "[bold]attic" in text, "what strangers announce is not markup"
    assert "▂▂▂···" in text
    assert "25 % of 1000" in text
    assert "draining" in text
    assert "door" in text


def test_status_lists_training_runs_with_their_members():
    poet, both = server(None, runs=("poems",)), server(None, runs=("[red]prose", "poems"))
    serves = server(Span(0, 6), runs=("poems",), public_name="attic")
    swarm = view(poet, both, serves, server(None, public_name="door"))
    members = sorted([poet.peer, both.peer, serves.peer])
    assert describe(swarm, {}, {})["runs"] == [
        {"name": "[red]prose", "members": [both.peer]},
        {"name": "poems", "members": members},
    ]
    text = printed(swarm, {}, 160)
    assert f"training run [red]prose, 1 member: {short(both.peer)}\n" in text
    line = next(line for line in text.splitlines() if "run poems, 3 members: " in line)
    assert all(short(peer) in line for peer in members)
    assert f"{short(serves.peer)} attic" in line
    without = next(line for line in text.splitlines() if "without blocks" in line)
    assert "door" in without
    assert short(poet.peer) not in without


def test_status_lists_generation_servers_by_model():
    gateway, serves = server(None, heads=(MODEL,)), server(Span(0, 6), heads=(MODEL,), public_name="attic")
    swarm = view(gateway, serves)
    servers = describe(swarm, {}, {})["servers"]
    assert [each["heads"] for each in servers] == [[MODEL.name]] * 2
    text = printed(swarm, {}, 160)
    line = next(line for line in text.splitlines() if f"texts of {MODEL.name} for thin clients: " in line)
    assert short(gateway.peer) in line
    assert f"{short(serves.peer)} attic" in line
    assert "without blocks" not in text


def test_status_shows_moves_and_reasons_and_fits_80_columns():
    mover = server(
        Span(0, 3),
        target=Span(3, 6),
        throughput=1234.5,
        dtype="bfloat16",
        cache_tokens=131_072,
        cache_tokens_free=131_072,
        public_name="attic",
    )
    notes = {mover.peer: ("placement: moving from 0:3 to 3:6: [red]nobody holds these, while " + "x " * 30,)}
    text = printed(view(mover), notes, 80)
    assert max(map(len, text.splitlines())) <= 80
    row = next(line for line in text.splitlines() if "0:3 " in line)
    assert "to 3:6" in row
    assert "1,234" in row
    assert "  missing 3:6  torch/bf16\n" in text
    assert "0 % of 131k" in row
    assert "attic" in row
    assert "placement: moving from 0:3 to 3:6: [red]nobody" in text
    [values] = describe(view(mover), notes, {})["servers"]
    assert (values["target"], values["throughput"], values["notes"]) == (
        "3:6",
        1234.5,
        list(notes[mover.peer]),
    )
    json.dumps(values)


def test_how_servers_compute_is_shown_where_it_differs():
    one, other = (
        server(Span(0, 6), numerics=numerics, capabilities=able)
        for numerics, able in (("torch/bf16", ("adapters", "training")), ("ggml/q4_k_m/f32/f16", ()))
    )
    lines = printed(view(one, other), {}, 100).splitlines()
    for info in one, other:
        row = next(line for line in lines if short(info.peer) in line)
        assert "/".join(info.numerics.split("/")[:2]) in row
    assert "torch/bf16" not in lines[0]
    told = {values["peer"]: values for values in describe(view(one, other), {}, {})["servers"]}
    assert [told[each.peer]["numerics"] for each in (one, other)] == [one.numerics, other.numerics]
    assert [told[each.peer]["capabilities"] for each in (one, other)] == [("adapters", "training"), ()]
    verbose = [line.strip() for line in printed(view(one, other), {}, 100, {}, {}).splitlines()]
    assert {"computes as torch/bf16", "can do inference, adapters, training"} <= set(verbose)
    assert {"computes as ggml/q4_k_m/f32/f16", "can do inference"} <= set(verbose)


def test_how_servers_are_reached_is_shown_where_it_matters():
    near, far = (
        ServerInfo(Identity.generate().peer, (), model=MODEL, span=Span(0, 3), dtype="bfloat16")
        for _ in range(2)
    )
    paths = {near.peer: "direct", far.peer: "hole-punched"}
    text = printed(view(near, far), {}, 100, paths)
    assert "hole-punched" in next(line for line in text.splitlines() if short(far.peer) in line)
    assert "direct" in next(line for line in text.splitlines() if short(near.peer) in line)
    assert "direct" not in printed(view(near), {}, 100, paths)
    told = {values["peer"]: values["path"] for values in describe(view(near, far), {}, paths)["servers"]}
    assert told == paths


def test_events_are_json_whatever_is_in_them(capsys: pytest.CaptureFixture[str]) -> None:
    Output(json_lines=True).event("error", message="Überlauf", details={"retry_after": float("inf")})
    line = capsys.readouterr().out
    expected = {"event": "error", "message": "Überlauf", "details": {"retry_after": None}}
    assert json.loads(line, parse_constant=lambda name: pytest.fail(name)) == expected


HOSTILE = "a\x1b]52;c;cm0=\x07b\x9b2Jc\u202ed"
SHOWN = "a^[]52;c;cm0=^Gb<U+009B>2Jc<U+202E>d"


def test_what_strangers_say_cannot_act_upon_the_terminal(capsys):
    output = Output()
    output.result(HOSTILE)
    output.piece(HOSTILE)
    output.remark(HOSTILE)
    Failure(InputError(HOSTILE)).show()
    out, err = capsys.readouterr()
    assert out == f"{SHOWN}\n{SHOWN}"
    assert err == f"{SHOWN}\nerror: {SHOWN}\n"
    Output(json_lines=True).event("piece", text=HOSTILE)
    line = capsys.readouterr().out
    assert json.loads(line) == {"event": "piece", "text": HOSTILE}
    assert line.strip().isascii()


def test_tables_and_bars_show_what_strangers_say_as_it_is():
    file = io.StringIO()
    console = PrintableConsole(file=file, force_terminal=True, width=120)
    table = Table(title=Text(HOSTILE))
    table.add_column("name")
    table.add_row(Text(HOSTILE))
    console.print(table, Text(HOSTILE, style="red"))
    shown = file.getvalue().replace("^G", "")  # rich itself leaves out the bell
    assert shown.count(SHOWN.replace("^G", "")) == 2
    assert "\x1b[31m" in shown
    assert "\x1b]52" not in shown


def test_a_log_line_is_one_line(caplog):
    formatter = PrintableFormatter("%(levelname)s %(message)s")
    record = logging.LogRecord("x", logging.INFO, "x.py", 1, "said %s\nand more", (HOSTILE,), None)
    assert formatter.format(record) == f"INFO said {SHOWN} and more"
    try:
        raise ValueError(HOSTILE)
    except ValueError as exc:
        record.exc_info = (type(exc), exc, exc.__traceback__)
    first, *trace = formatter.format(record).split("\n")
    assert first == f"INFO said {SHOWN} and more"
    assert trace[-1] == f"ValueError: {SHOWN}"


def test_lines_of_a_kind_are_bounded_whoever_causes_them():
    limit = LineLimit(burst=3, per_minute=60)
    assert [limit.take("a", 0.0) for _ in range(5)] == [0, 0, 0, None, None]
    assert limit.take("b", 0.0) == 0
    assert limit.take("a", 1.0) == 2
    assert limit.take("a", 1.0) is None
    assert [limit.take("a", 100.0) for _ in range(4)] == [1, 0, 0, None]
    for number in range(3000):
        limit.take(number, 100.0)
    assert len(limit._kinds) <= 1024


def test_the_log_says_how_many_lines_it_left_out():
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(LineFilter(LineLimit(burst=2, per_minute=60)))
    logger = logging.Logger("strangers")
    logger.addHandler(handler)
    for number in range(5):
        record = logger.makeRecord("strangers", logging.WARNING, "here.py", 7, "line %d", (number,), None)
        record.created = 10.0 if number < 4 else 12.0
        logger.handle(record)
    assert stream.getvalue().splitlines() == ["line 0", "line 1", "line 4 (2 more like it were left out)"]
