"""A peer keeps its identity from one start to the next, and two processes never share one."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from swarmcore.errors import IdentityFileError, IdentityInUseError
from swarmcore.identity import Identity
from swarmcore.identity_files import LockedIdentity, identities_folder, identity_path, stored_identity

HOLD = """
import sys
from swarmcore.identity_files import LockedIdentity
held = LockedIdentity(sys.argv[1])
print(held.identity.peer, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SWARMCORE_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def test_one_for_each_name_kept_for_its_owner_alone(data: Path) -> None:
    with stored_identity() as unnamed, stored_identity("attic") as attic:
        assert unnamed.path == data / "identities" / "default.pem"
        assert attic.path == data / "identities" / "attic.pem"
        assert unnamed.identity.peer != attic.identity.peer
    with stored_identity("attic") as again:
        assert again.identity.peer == attic.identity.peer
    assert stat.S_IMODE(attic.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(attic.path.parent.stat().st_mode) == 0o700


def test_a_second_process_of_a_name_is_another_peer() -> None:
    with stored_identity("attic") as one, stored_identity("attic") as other:
        assert other.path.name == "attic.2.pem"
        assert one.identity.peer != other.identity.peer
    with stored_identity("attic") as again:
        assert again.identity.peer == one.identity.peer


@pytest.mark.parametrize(
    "name", ["a/b", "..", "../../etc/passwd", "Ünï", "a" * 200, ".hidden", "a b", "\udcff", "\0"]
)
def test_any_name_has_a_file_of_its_own_in_the_folder(name: str) -> None:
    path = identity_path(name)
    assert path.parent == identities_folder()
    assert len({path, *(identity_path(other) for other in ("", "default", "a_b", "____", "a" * 40))}) == 5
    with stored_identity(name) as held:
        assert held.path == path


def test_a_file_is_for_one_process_at_a_time(tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(key)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        peer = process.stdout.readline().strip()
        with pytest.raises(IdentityInUseError, match="in use by another process"):
            LockedIdentity(key)
        assert Identity.load_or_create(key).peer == peer  # a client may have it as well
    finally:
        process.kill()  # as it ends, so does its lock
    with LockedIdentity(key, patience=30.0) as held:
        assert held.identity.peer == peer
    process.communicate()


def test_where_nothing_can_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SWARMCORE_DATA", str(tmp_path / "file"))
    with pytest.raises(IdentityFileError, match="SWARMCORE_DATA"):
        stored_identity()


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="takes another user")
def test_a_user_without_a_home() -> None:
    program = (
        "import os; from swarmcore.identity_files import stored_identity\n"
        "os.setgroups([]); os.setuid(12345); stored_identity()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "IdentityFileError: there is no place to keep an identity" in done.stderr


def test_the_places_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SWARMCORE_DATA")
    monkeypatch.setenv("XDG_DATA_HOME", "/somewhere")
    assert identities_folder() == Path("/somewhere/swarmcore/identities")
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert identities_folder() == Path("/home/me/.local/share/swarmcore/identities")
