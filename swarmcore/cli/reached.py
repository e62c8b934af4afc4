"""Telling the user where a peer is reached, at first and whenever that changes."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from swarmcore.cli.output import Output
from swarmcore.types import Address


class Reached:
    """Prints addresses: the first ones as results, later ones as remarks."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._known: tuple[str, ...] = ()

    def begin(self, addresses: Sequence[str]) -> None:
        """What a peer that has come online gives to others."""
        self._known = tuple(addresses)
        for address in addresses:
            self._output.result(address)
        self._say_if_local()

    def change(self, addresses: tuple[str, ...]) -> None:
        """From now on these; a line for each that is new, and for each that is lost."""
        known, self._known = self._known, addresses
        for address in addresses:
            if address not in known:
                self._output.remark(f"also reached at {address}")
        for address in known:
            if address not in addresses:
                self._output.remark(f"no longer reached at {address}")
        self._say_if_local()
        self._output.event("addresses", addresses=addresses)

    def _say_if_local(self) -> None:
        if self._known and all(Address.parse(url).on_loopback for url in self._known):
            self._output.remark(
                "joinable from this machine only: listen on 0.0.0.0 or [::] to be reached from others; an "
                "address that comes up later is told then"
            )


def say_what_next(output: Output, addresses: Sequence[str], *, model: str = "", chat: str = "") -> None:
    """How others join a peer that is reached at ``addresses``, and talk with its model.

    ``model`` is what another server of it would be started with, ``chat`` a command that talks with it; each
    is empty where there is none.
    """
    if not addresses:
        return
    bootstrap = f"--bootstrap {addresses[0]}"
    output.remark(f"join:  swarmcore serve --model {shlex.quote(model) if model else 'MODEL'} {bootstrap}")
    if chat:
        output.remark(f"chat:  swarmcore {chat} {bootstrap}")
