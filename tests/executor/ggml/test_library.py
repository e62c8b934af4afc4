"""llama.cpp's library is checked before it is used, and its log bounded."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from swarmcore.errors import MissingExtraError

pytest.importorskip("llama_cpp", reason="needs the extra ggml")

from swarmcore.executor.ggml.library import Library, library


def test_the_cpu_is_always_there() -> None:
    assert library().device("CPU").handle is None
    assert library() is library()


@pytest.mark.parametrize("without", ["llama_memory_seq_cp", "llama_state_seq_set_data"])
def test_a_library_that_lacks_a_function_is_refused(without: str) -> None:
    import llama_cpp.llama_cpp as whole

    lacking = SimpleNamespace(**{name: item for name, item in vars(whole).items() if name != without})
    with pytest.raises(MissingExtraError, match=f"cannot be used: it lacks {without}; pip install"):
        Library(lacking)


def test_what_it_complains_of_is_kept_and_bounded(caplog: pytest.LogCaptureFixture) -> None:
    found = library()
    caplog.set_level(logging.DEBUG)
    with found.reporting() as lines:
        for number in range(50):
            found._log.receive(4, f"error {number}\n".encode(), None)
        found._log.receive(2, b"x" * 100_000, None)
        found._log.receive(4, b"\xff\x1b[31m\n", None)
    assert len(lines) == 20 and lines[-2] == "error 49" and "\x1b" not in lines[-1]
    assert len([record for record in caplog.records if "error" in record.message]) == 20
    assert max(len(record.message) for record in caplog.records) < 1000
