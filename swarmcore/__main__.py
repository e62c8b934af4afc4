"""``python -m swarmcore`` is the command line."""

from swarmcore.cli import main

main(prog_name="swarmcore")
