"""A router that maps ports when asked over UPnP. Every call blocks: run them in a thread."""

from __future__ import annotations

import threading

import miniupnpc

_DISCOVERY_MILLISECONDS = 1000
_DESCRIPTION = "swarmcore"


class RouterError(Exception):
    """The router does not do what it was asked for."""


class PortTakenError(RouterError):
    """The router maps that port for somebody else."""


class UpnpRouter:
    """The router of this LAN; `find` it."""

    lan_host: str
    """This machine's IP address as the router knows it."""
    external_host: str
    """The router's address on its other side; empty when it has none."""

    def __init__(self, client: miniupnpc.UPnP) -> None:
        self._client = client
        self._lock = threading.Lock()
        self.lan_host = client.lanaddr
        self.external_host = client.externalipaddress() or ""

    @classmethod
    def find(cls) -> UpnpRouter | None:
        """The router that answers within a second, or None."""
        client = miniupnpc.UPnP()
        client.discoverdelay = _DISCOVERY_MILLISECONDS
        try:
            if not client.discover():
                return None
            client.selectigd()
            return cls(client)
        except Exception:  # the library raises nothing more specific, also when nobody has answered
            return None

    def map(self, external: int, port: int, seconds: int) -> None:
        """Let TCP port ``external`` lead to ``port`` here for ``seconds``, or renew that.

        A router that knows only mappings for ever makes one. Raise `PortTakenError` when the port leads
        elsewhere, else `RouterError`.
        """
        with self._lock:
            try:
                there = self._client.getspecificportmapping(external, "TCP")
                if there and (there[0], int(there[1])) != (self.lan_host, port):
                    raise PortTakenError(f"port {external} leads to {there[0]}:{there[1]}")
                try:
                    self._map(external, port, seconds)
                except Exception as exc:
                    if "OnlyPermanentLeasesSupported" not in str(exc):
                        raise
                    self._map(external, port, 0)
            except RouterError:
                raise
            except Exception as exc:
                kind = PortTakenError if "ConflictInMappingEntry" in str(exc) else RouterError
                raise kind(f"mapping port {external}: {exc}") from exc

    def _map(self, external: int, port: int, seconds: int) -> None:
        if not self._client.addportmapping(external, "TCP", self.lan_host, port, _DESCRIPTION, "", seconds):
            raise RouterError("it refuses")

    def unmap(self, external: int) -> None:
        """Undo `map`. Raise `RouterError` when that fails."""
        with self._lock:
            try:
                self._client.deleteportmapping(external, "TCP")
            except Exception as exc:
                raise RouterError(f"unmapping port {external}: {exc}") from exc
