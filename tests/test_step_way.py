"""The way of a step's hidden states, from the client through two servers and back, is the one in docs/map.md.

It is followed by a profile hook: a function is on it when one of its variables, or what it returns, holds the
rows, in whatever form they are just in.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from tiny_models import save_random_model, tiny_config
from tiny_swarm import served

import swarmcore
from swarmcore.loop_thread import background_loop
from swarmcore.testing.executor import hidden_states
from swarmcore.types import ModelInfo
from swarmcore.wire.framing import Message
from swarmcore.wire.tensors import Tensor

ROOT = Path(__file__).parent.parent

MOST_FILES, MOST_FUNCTIONS = 26, 71
"""What the way takes now. More than that needs a reason."""


class Way:
    """The functions that hold rows of ``width`` values, by file."""

    def __init__(self, width: int) -> None:
        self.functions: set[tuple[str, str]] = set()
        self.on = False
        self._width = width

    def hook(self, frame: FrameType, event: str, value: Any) -> None:
        if not self.on or event not in ("call", "return"):
            return
        code = frame.f_code
        path = Path(code.co_filename)
        if not path.is_relative_to(ROOT) or path.relative_to(ROOT).parts[0] not in (
            "swarmcore",
            "transports",
        ):
            return
        # Comprehensions are part of the function around them; a stream's handler keeps its first message.
        if code.co_name.startswith("<") or path.parts[-2:] == ("rpc", "serving.py"):
            return
        held = [kept for name, kept in frame.f_locals.items() if name != "self"]
        if any(map(self._rows, held)) or (event == "return" and self._rows(value)):
            self.functions.add((str(path.relative_to(ROOT)), code.co_qualname))

    def _rows(self, value: Any) -> bool:
        match value:
            case bytes() | bytearray() | memoryview():
                return memoryview(value).nbytes >= 2 * self._width
            case torch.Tensor():
                return value.ndim >= 2 and value.shape[-1] == self._width
            case Tensor():
                return True
            case Message():
                return bool(value.tensors)
            case tuple() | list():
                return len(value) < 8 and any(map(self._rows, value))
        return False

    @property
    def files(self) -> set[str]:
        return {file for file, _ in self.functions}


@contextmanager
def profiled(way: Way) -> Iterator[None]:
    """In this thread, and in those that start meanwhile."""
    threading.setprofile(way.hook)
    try:
        yield
    finally:
        threading.setprofile(None)


async def follow(way: Way, address: str, model: ModelInfo) -> None:
    async with swarmcore.connect(address) as swarm:
        await swarm.wait_for_blocks(model, timeout=30)
        async with await swarm.open_session(model, sequences=1) as session:
            rows = hidden_states([[0.1] * model.hidden_size])
            await session.step(rows, (1,))
            sys.setprofile(way.hook)
            try:
                way.on = True
                await session.step(rows, (1,))
                way.on = False
            finally:
                sys.setprofile(None)


def test_rows_pass_the_files_of_the_map_and_no_more_of_them_than_they_did(tmp_path: Path) -> None:
    config = tiny_config("llama")
    save_random_model(config, tmp_path)
    way = Way(config.hidden_size)
    with profiled(way), served(tmp_path, "0:3", "3:5") as servers:
        background_loop().run(follow(way, str(servers[0].node.addresses[0]), servers[0].executor.model))
    life = (ROOT / "docs" / "map.md").read_text().split("## The life of a step")[1].split("\n## ")[0]
    torch_folder = "swarmcore/executor/torch/"
    listed = set(re.findall(r"`((?:swarmcore|transports)/[^`]*[.]py)`", life))
    unlisted = {file for file in way.files - listed if not file.startswith(torch_folder)}
    assert not unlisted, "docs/map.md should tell of them"
    assert len(way.files) <= MOST_FILES, sorted(way.files)
    assert len(way.functions) <= MOST_FUNCTIONS, sorted(way.functions)
    assert len(way.functions) > MOST_FUNCTIONS // 2, "the hook has lost the way"
