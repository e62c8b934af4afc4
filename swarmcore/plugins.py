"""Back ends by name: what is installed under an entry-point group, ours and others' alike."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points

import attrs

from swarmcore.distribution import install_command
from swarmcore.errors import InputError, MissingExtraError, SwarmError


@attrs.frozen
class PluginGroup:
    """The back ends of one seam."""

    kind: str
    """What one of them is called in messages: ``"transport"``."""
    entry_points: str
    """The entry-point group, ``swarmcore.transports``, in which each has its name."""
    extras: Mapping[str, str] = attrs.field(factory=dict)
    """Those of ours that need an extra, and which."""
    unknown: type[SwarmError] = InputError
    """Raised for a name that nobody has installed."""

    def installed(self) -> dict[str, EntryPoint]:
        """All of them, by name; nothing is imported."""
        return {entry.name: entry for entry in entry_points(group=self.entry_points)}

    def load(self, name: str) -> object:
        """What is registered as ``name``.

        Raise `unknown` when nothing is, listing what is installed, and `MissingExtraError` when it is there
        but a library that it needs is not.
        """
        installed = self.installed()
        extra = self.extras.get(name)
        cure = f"; install it with: {install_command(extra)}" if extra else ""
        if name not in installed:
            names = ", ".join(sorted(installed)) or "none"
            raise self.unknown(
                f"no {self.kind} for {name!r} (installed: {names})"
                f"{cure or '; a plugin that provides it may need to be installed'}"
            )
        try:
            return installed[name].load()
        except ImportError as exc:
            raise MissingExtraError(f"{self.kind} {name!r} needs {exc.name or exc}{cure}") from exc
        except AttributeError as exc:
            raise self.unknown(f"{self.kind} {name!r}: {installed[name].value!r} is not there") from exc
