"""The command line, as ``swarmcore`` and as ``python -m swarmcore``."""

from __future__ import annotations

import sys


def run() -> None:
    """Run the command; Ctrl-C ends it without a traceback also while its modules are imported."""
    try:
        from swarmcore.cli import main
    except KeyboardInterrupt:
        sys.exit(130)
    main(prog_name="swarmcore")


if __name__ == "__main__":
    run()
