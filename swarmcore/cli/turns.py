"""What a person says in a chat: typed at a prompt, or read from a pipe or file line by line."""

from __future__ import annotations

import asyncio
import io
import os
import stat
import sys
from collections.abc import AsyncGenerator
from typing import BinaryIO

_PROMPT = "> "
_LONGEST_LINE = 2**20


def turns() -> AsyncGenerator[str, None]:
    """Each line that is not blank, until Ctrl-D, Ctrl-C at an empty prompt, or the end of the file."""
    if sys.stdin is None:
        return _read(io.BytesIO())
    if sys.stdin.isatty():
        return _typed()
    mode = os.fstat(sys.stdin.fileno()).st_mode
    # No event loop waits for what else there is, files and /dev/null among it.
    waits = stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)
    return _piped() if waits else _read(sys.stdin.buffer)


async def _typed() -> AsyncGenerator[str, None]:
    from prompt_toolkit import PromptSession

    session: PromptSession[str] = PromptSession(_PROMPT)
    while True:
        try:
            # The prompt would take the signal handler away for good; at the prompt Ctrl-C is a key anyway.
            line = await session.prompt_async(handle_sigint=False)
        except EOFError:
            return
        except KeyboardInterrupt:
            if session.default_buffer.text:
                continue
            return
        if line.strip():
            yield line


async def _read(file: BinaryIO) -> AsyncGenerator[str, None]:
    while line := file.readline(_LONGEST_LINE).decode(errors="replace"):
        if line.strip():
            yield line.strip()


async def _piped() -> AsyncGenerator[str, None]:
    reader = asyncio.StreamReader(limit=_LONGEST_LINE)
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )
    try:
        while line := (await reader.readline()).decode(errors="replace"):
            if line.strip():
                yield line.strip()
    finally:
        transport.close()
