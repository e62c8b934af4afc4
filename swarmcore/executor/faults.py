"""What callers get when an executor failed."""

from __future__ import annotations

from swarmcore.errors import RemoteFaultError, SwarmError


def translated(exc: Exception) -> SwarmError:
    """What a caller gets when the executor raised ``exc``: an instance of its own each time."""
    if isinstance(exc, SwarmError):
        return type(exc)(exc.message, **exc.details)
    error = RemoteFaultError(
        f"the server's executor failed ({type(exc).__name__}); its log has the traceback"
    )
    error.__cause__ = exc
    return error
