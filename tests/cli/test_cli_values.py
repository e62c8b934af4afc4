import pytest

from swarmcore.cli.bench import parse_numbers
from swarmcore.cli.serve import parse_bytes, parse_named_paths
from swarmcore.cli.status import usage
from swarmcore.errors import InputError
from swarmcore.resources import ResourceUse


@pytest.mark.parametrize(
    ("text", "count"),
    [("0", 0), ("1000", 1000), ("512M", 512 << 20), ("1.5 GiB", 3 << 29), ("2gb", 2 << 30), ("7k", 7 << 10)],
)
def test_numbers_of_bytes(text: str, count: int) -> None:
    assert parse_bytes("--budget", text) == count


@pytest.mark.parametrize("text", ["", "many", "-1", "1X", "M", "1..5G"])
def test_what_is_no_number_of_bytes(text: str) -> None:
    with pytest.raises(InputError, match="--budget"):
        parse_bytes("--budget", text)


def test_lists_of_numbers() -> None:
    assert parse_numbers("--servers", "3, 1,3") == (3, 1)
    for wrong in ("", ",", "1,", "0", "1,-2", "one", "1.5"):
        with pytest.raises(InputError, match="--servers"):
            parse_numbers("--servers", wrong)


def test_named_paths() -> None:
    assert parse_named_paths("--adapter", ["a=/x", "b=y=z"]) == {"a": "/x", "b": "y=z"}
    for wrong in (["a"], ["=x"], ["a="], ["a=x", "a=y"]):
        with pytest.raises(InputError, match="--adapter"):
            parse_named_paths("--adapter", wrong)


def test_what_is_held_for_peers_is_one_line() -> None:
    uses = (
        ResourceUse("bytes", 3 << 20, 384 << 20),
        ResourceUse("streams", 2, 1024),
        ResourceUse("\x1b[2J", 1, 2),
    )
    assert usage(uses) == "held for peers: 3 of 384 MiB, 2 of 1024 streams, 1 of 2 ^[[2J"
