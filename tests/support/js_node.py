"""A js-libp2p node in a process of its own, driven by a test."""

from __future__ import annotations

import asyncio
import base64
import fcntl
import json
import shutil
import subprocess
from collections import deque
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any, Self

import pytest

SOURCES = Path(__file__).parents[1] / "interop"
FILES = ("node.mjs", "stream.mjs", "package.json", "package-lock.json")
OLDEST_NODE = 20
INSTALL_TIMEOUT = 180.0
START_TIMEOUT = 20.0
CALL_TIMEOUT = 35.0
"""A little more than the node gives itself, so that its own error is the one reported."""
STOP_TIMEOUT = 10.0
LONGEST_ANSWER = 2**24


def install(cache: Path) -> Path:
    """The folder of a runnable node: this one where ``npm ci`` was run in it, else a copy under ``cache``.

    The copy is made once and shared by the test processes that give the same ``cache``. Skips the test where
    node or npm is missing, or node is too old.
    """
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed: no js-libp2p node to test against")
    version = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int(version.removeprefix("v").partition(".")[0]) < OLDEST_NODE:
        pytest.skip(f"js-libp2p needs Node {OLDEST_NODE} or newer; this is {version}")
    if (SOURCES / "node_modules").is_dir():
        return SOURCES
    folder = cache / "js-libp2p"
    folder.mkdir(parents=True, exist_ok=True)
    installed = folder / "installed"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not installed.exists():
            for name in FILES:
                shutil.copy(SOURCES / name, folder)
            subprocess.run(
                ["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"],
                cwd=folder,
                check=True,
                timeout=INSTALL_TIMEOUT,
            )
            installed.touch()
    return folder


class JsNodeError(Exception):
    """What the node answered instead of a result, or how it ended."""


class JsNode:
    """A running node; leave the ``async with`` block to stop it.

    ``flags`` are those of node.mjs, such as ``"--relay"`` and ``"--dht"``; ``within`` is a command that runs
    the one behind it, as ``ip netns exec`` does. Every call raises
    :class:`JsNodeError` with the node's own error, or once the node has ended, and :class:`TimeoutError` when
    it does not answer.
    """

    id: str
    """Its peer id."""
    addrs: list[str]
    """Where it listens, as multiaddrs that end in its peer id."""

    def __init__(self, folder: Path, *flags: str, within: Sequence[str] = ()) -> None:
        self._folder = folder
        self._within = within
        self._flags = flags
        self._numbers = count(1)
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._complaints: deque[str] = deque(maxlen=20)

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            *self._within,
            "node",
            "node.mjs",
            *self._flags,
            cwd=self._folder,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=LONGEST_ANSWER,
        )
        self._readers = [asyncio.create_task(self._collect_complaints())]
        try:
            async with asyncio.timeout(START_TIMEOUT):
                assert self._process.stdout is not None
                first = await self._process.stdout.readline()
                if not first:
                    await self._readers[0]
                    raise self._ended()
        except BaseException:
            await self._kill()
            raise
        ready = json.loads(first)
        self.id, self.addrs = ready["id"], ready["addrs"]
        self._readers.append(asyncio.create_task(self._take_answers()))
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(STOP_TIMEOUT):
                await self._process.wait()
        finally:
            await self._kill()

    async def kill(self) -> None:
        """End the process at once, without a word to its peers."""
        await self._kill()

    async def ping(self, addr: str) -> float:
        """Seconds of one round trip of the ping protocol."""
        return float(await self._call("ping", addr=addr)) / 1e3

    async def connect(self, addr: str) -> str:
        """Connect, or find that it is connected; the address of the other end of the connection."""
        return str(await self._call("connect", addr=addr))

    async def dial(self, addr: str, protocol: str, sizes: Sequence[int]) -> None:
        """Open a swarmcore stream, send a message of each size (bytes), check that each is echoed."""
        await self._call("dial", addr=addr, protocol=protocol, sizes=list(sizes))

    async def put(self, key: str, value: bytes) -> None:
        """Store a record in the DHT; ``value`` begins with its sequence number, 8 bytes big-endian."""
        await self._call("put", key=key, value=base64.b64encode(value).decode())

    async def get(self, key: str) -> bytes:
        """The best record of the DHT under ``key``."""
        return base64.b64decode(await self._call("get", key=key))

    async def peers(self) -> list[dict[str, Any]]:
        """Every connection: ``id``, ``addr``, ``direction``, ``limited`` (relayed) and ``protocols``."""
        peers: list[dict[str, Any]] = await self._call("peers")
        return peers

    async def reserve(self, addr: str) -> list[str]:
        """Reserve a slot at the relay; this node's addresses, those through the relay among them."""
        addrs: list[str] = await self._call("reserve", addr=addr)
        return addrs

    async def _call(self, name: str, **arguments: object) -> Any:
        if self._readers[-1].done():
            raise self._ended()
        number = next(self._numbers)
        answer = self._calls[number] = asyncio.get_running_loop().create_future()
        line = json.dumps({"call": number, "do": name, **arguments})
        try:
            async with asyncio.timeout(CALL_TIMEOUT):
                assert self._process.stdin is not None
                self._process.stdin.write(line.encode() + b"\n")
                await self._process.stdin.drain()
                return await answer
        finally:
            del self._calls[number]

    async def _take_answers(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            message = json.loads(line)
            answer = self._calls.get(message["call"])
            if answer is None or answer.done():
                continue
            if "error" in message:
                answer.set_exception(JsNodeError(message["error"]))
            else:
                answer.set_result(message["result"])
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(self._ended())

    async def _collect_complaints(self) -> None:
        assert self._process.stderr is not None
        async for line in self._process.stderr:
            self._complaints.append(line.decode(errors="replace"))

    def _ended(self) -> JsNodeError:
        return JsNodeError("the js-libp2p node ended:\n" + "".join(self._complaints))

    async def _kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()
        await asyncio.gather(*self._readers)
