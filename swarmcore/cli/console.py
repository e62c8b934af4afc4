"""The terminal for tables and bars: what strangers named in them cannot act upon it."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from swarmcore.printable import printable


class PrintableConsole(Console):
    """A console on which only rich itself moves the cursor or sets colours."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))
