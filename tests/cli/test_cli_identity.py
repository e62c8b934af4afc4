"""Who a peer is by default, and how it is told."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from click.testing import CliRunner

from swarmcore.cli import main
from swarmcore.identity import Identity

PLACE = ("bootstrap", "--listen", "127.0.0.1:0", "--json")


def test_the_id_of_a_key_file(tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    done = CliRunner().invoke(main, ["identity", str(key)])
    assert done.stdout.strip() == Identity.load_or_create(key).peer
    done = CliRunner().invoke(main, ["identity", str(key), "--json"])
    assert json.loads(done.stdout) == {
        "event": "identity",
        "peer": Identity.load_or_create(key).peer,
        "file": str(key),
    }


def test_the_id_of_a_peer_that_is_yet_to_be_started(tmp_path: Path, start) -> None:  # type: ignore[no-untyped-def]
    data = {"SWARMCORE_DATA": str(tmp_path)}
    told = CliRunner(env=data).invoke(main, ["identity", "--name", "attic"]).stdout.strip()
    options = {**data, "SWARMCORE_NEW_IDENTITY": ""}
    first = start(*PLACE, "--name", "attic", **options)
    assert first.event("online")["peer"] == told
    second = start(*PLACE, "--name", "attic", **options).event("online")["peer"]
    assert second != told
    first.signal(signal.SIGKILL)
    first.end()
    assert start(*PLACE, "--name", "attic", **options).event("online")["peer"] == told


def test_two_processes_are_not_one_peer(tmp_path: Path, start) -> None:  # type: ignore[no-untyped-def]
    key = ("--identity", str(tmp_path / "key.pem"))
    start(*PLACE, *key).event("online")
    status, stdout, _ = start(*PLACE, *key).end()
    assert status == 2
    assert json.loads(stdout)["error"] == "IdentityInUseError"


def test_a_peer_that_cannot_keep_its_identity_says_so(tmp_path: Path, start) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "file").write_text("")
    process = start(*PLACE[:-1], SWARMCORE_DATA=str(tmp_path / "file"), SWARMCORE_NEW_IDENTITY="")
    assert process.line().startswith("tcp://")
    process.signal()
    status, _, stderr = process.end()
    assert status == 0
    assert "a new identity, which is not kept" in stderr


def test_what_to_do_next_is_said_once_online(start) -> None:  # type: ignore[no-untyped-def]
    process = start(*PLACE[:-1])
    address = process.line()
    process.signal()
    status, stdout, stderr = process.end()
    assert (status, stdout) == (0, "")  # nothing but addresses on stdout
    assert f"join:  swarmcore serve --model MODEL --bootstrap {address}" in stderr.splitlines()


def test_the_swarm_comes_from_the_environment(start) -> None:  # type: ignore[no-untyped-def]
    first = start(*PLACE).event("online")
    there = {"SWARMCORE_BOOTSTRAP": first["addresses"][0]}
    second = start(*PLACE, **there).event("online")
    status, seen = start("status", "--json", **there), set[str]()
    while len(seen) < 2:  # that one is online does not mean that the other has heard of it
        seen = {server["peer"] for server in status.event("status")["servers"]}
    assert seen == {first["peer"], second["peer"]}


@pytest.mark.parametrize("command", [["status"], ["chat"], ["generate", "x"]])
def test_without_either_both_are_named(command: list[str]) -> None:
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 2
    assert "SWARMCORE_BOOTSTRAP" in done.stderr
