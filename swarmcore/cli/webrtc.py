"""From the options that concern WebRTC to what its transport is given: ICE servers and certificates."""

from __future__ import annotations

import os
import ssl
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swarmcore.errors import InputError

SCHEME = "webrtc"


def webrtc_options(
    *,
    ice: Sequence[str] = (),
    ice_file: str | None = None,
    ice_relay_only: bool = False,
    signalling_ca: str | None = None,
    signalling_cert: str | None = None,
    signalling_key: str | None = None,
    webrtc_engine: str | None = None,
) -> dict[str, Any]:
    """The keyword arguments of the transport that were given. Raise `InputError` for what cannot be read."""
    options: dict[str, Any] = {}
    if webrtc_engine is not None:
        options["engine"] = webrtc_engine
    if servers := (*ice, *(read_ice_file(ice_file) if ice_file is not None else ())):
        options["ice"] = servers
    if ice_relay_only:
        options["relay_only"] = True
    if signalling_ca is not None:
        options["trusted"] = _context(ssl.Purpose.SERVER_AUTH, signalling_ca)
    if signalling_cert is not None:
        options["tls"] = _context(ssl.Purpose.CLIENT_AUTH, signalling_cert, signalling_key)
    elif signalling_key is not None:
        raise InputError("--signalling-key belongs to a certificate; name it with --signalling-cert")
    return options


def transport_options(**given: Any) -> dict[str, dict[str, Any]]:
    """What was ``given`` to `webrtc_options`, as `connect` takes options of transports."""
    options = webrtc_options(**given)
    return {SCHEME: options} if options else {}


def read_ice_file(file: str) -> tuple[str, ...]:
    """The servers in ``file``, one a line; empty lines and those that begin with # are passed over.

    Raise `InputError` when it cannot be read, or others than its owner can read it.
    """
    path = Path(file)
    try:
        path = path.expanduser()
        if os.name == "posix" and stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise InputError(f"ICE file {path} can be read by other users; run: chmod 600 {path}")
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except (OSError, RuntimeError, UnicodeDecodeError) as exc:
        reason = "it is no text" if isinstance(exc, UnicodeDecodeError) else getattr(exc, "strerror", exc)
        raise InputError(f"ICE file {path} cannot be read: {reason}") from exc
    servers = tuple(line for line in lines if line and not line.startswith("#"))
    if not servers:
        raise InputError(f"ICE file {path} names no server; write one a line, such as stun:HOST:PORT")
    return servers


def _context(purpose: ssl.Purpose, file: str, key: str | None = None) -> ssl.SSLContext:
    try:
        if purpose is ssl.Purpose.SERVER_AUTH:
            return ssl.create_default_context(purpose, cafile=file)
        context = ssl.create_default_context(purpose)
        context.load_cert_chain(file, key)
        return context
    except (OSError, ValueError) as exc:
        if isinstance(exc, ssl.SSLError):  # its own words are those of OpenSSL
            lacks = "no certificate" if purpose is ssl.Purpose.SERVER_AUTH else "no certificate and its key"
            reason = f"there is {lacks} (PEM) in it"
            if purpose is ssl.Purpose.CLIENT_AUTH and key is None:
                reason += "; name a key that is in a file of its own with --signalling-key"
        else:
            reason = (isinstance(exc, OSError) and exc.strerror) or str(exc)
        raise InputError(
            f"the certificate {file}{f' with key {key}' if key else ''} cannot be used: {reason}"
        ) from exc
