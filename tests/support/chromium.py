"""Chromium without a window, driven by its own debugging protocol."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import os
import shutil
import signal
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp

START_TIMEOUT = 30.0
CALL_TIMEOUT = 30.0
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    *("--disable-dev-shm-usage", "--window-size=1000,860", "--remote-debugging-port=0"),
)


def installed() -> str | None:
    """The path of the program."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


class Page:
    """One page. As a context manager it starts a browser with the empty folder ``profile``, and ends it."""

    def __init__(self, profile: Path) -> None:
        self._profile = profile
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.console: deque[str] = deque(maxlen=100)
        """What the page logged, errors included."""

    async def __aenter__(self) -> Self:
        program = installed()
        assert program is not None
        self._process = await asyncio.create_subprocess_exec(
            *(program, *FLAGS, f"--user-data-dir={self._profile}", "about:blank"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            env={**os.environ, "HOME": str(self._profile)},
            start_new_session=True,
        )
        try:
            self._session = aiohttp.ClientSession()
            async with asyncio.timeout(START_TIMEOUT):
                url = await self._target()
                self._socket = await self._session.ws_connect(url, max_msg_size=2**26)
            self._reading = asyncio.create_task(self._read())
            for domain in ("Page", "Runtime"):
                await self.call(f"{domain}.enable")
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._reading.cancel()
        await asyncio.wait([self._reading])
        await self._socket.close()
        await self._end()

    async def open(self, url: str) -> None:
        """Go there; the page and its scripts are loaded when this returns."""
        await self.call("Page.navigate", url="about:blank")  # a new fragment alone would not load it again
        await self.call("Page.navigate", url=url)  # answered before the page has its elements
        await self.until("document.readyState === 'complete'")

    async def run(self, script: str, **values: Any) -> Any:
        """What ``script``, the body of an async function, returns; AssertionError with what it throws.

        It finds ``values`` under their names.
        """
        constants = "".join(f"const {name} = {json.dumps(value)};" for name, value in values.items())
        said = await self.call(
            "Runtime.evaluate",
            expression=f"(async () => {{ {constants}{script}\n}})()",
            awaitPromise=True,
            returnByValue=True,
        )
        if "exceptionDetails" in said:
            error = said["exceptionDetails"]
            raise AssertionError(error.get("exception", {}).get("description") or error["text"])
        return said["result"].get("value")

    async def until(self, condition: str, seconds: float = 20.0) -> Any:
        """The first value of the expression ``condition`` that is true."""
        pause = "await new Promise(resolve => setTimeout(resolve, 20))"
        try:
            async with asyncio.timeout(seconds):
                return await self.run(
                    f"for (;;) {{ const value = {condition}; if (value) return value; {pause} }}"
                )
        except TimeoutError as exc:
            console = "\n".join(self.console)
            raise AssertionError(f"not within {seconds:g} s: {condition}\n{console}") from exc

    async def screenshot(self) -> bytes:
        """The page as PNG."""
        return base64.b64decode((await self.call("Page.captureScreenshot"))["data"])

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Any method of the debugging protocol."""
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        try:
            await self._socket.send_json({"id": number, "method": method, "params": parameters})
            async with asyncio.timeout(CALL_TIMEOUT):
                said = await answer
        finally:
            del self._answers[number]
        assert "error" not in said, said["error"]
        result: dict[str, Any] = said["result"]
        return result

    async def _target(self) -> str:
        """Where the empty page is driven from."""
        told = self._profile / "DevToolsActivePort"
        while not (told.exists() and (lines := told.read_text().split())):
            assert self._process.returncode is None, "chromium ended at once"
            await asyncio.sleep(0.05)  # another process writes it
        async with self._session.get(f"http://127.0.0.1:{lines[0]}/json/list") as reply:
            targets = await reply.json()
        url: str = next(one["webSocketDebuggerUrl"] for one in targets if one["type"] == "page")
        return url

    async def _read(self) -> None:
        async for message in self._socket:
            said = message.json()
            if answer := self._answers.get(said.get("id", 0)):
                if not answer.done():
                    answer.set_result(said)
            elif said.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
                self.console.append(str(said["params"])[:2000])

    async def _end(self) -> None:
        await self._session.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()
