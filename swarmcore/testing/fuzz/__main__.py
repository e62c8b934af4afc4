"""``python -m swarmcore.testing.fuzz --seconds 60 --seed 1``."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
from pathlib import Path

from swarmcore.testing.fuzz.hostile_peers import HostilePeers
from swarmcore.testing.fuzz.target import FuzzFailure, fuzz_target

MOST_GROWTH = 512 * 2**20
"""Bytes by which the process, server and hostile peers together, may grow at any time."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long")
    parser.add_argument("--seed", type=int, default=None, help="what is sent; drawn when not given")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(2**32)
    _say(f"fuzzing for {options.seconds:g} s; again with --seed {seed}")
    failed = 0
    try:
        _say(json.dumps(asyncio.run(fuzz(options.seconds, seed))))
    except* FuzzFailure as failures:
        _say(f"FAILED with --seed {seed}: {failures.exceptions[0]}")
        failed = 1
    return failed


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


async def fuzz(seconds: float, seed: int) -> dict[str, float]:
    """Fuzz a server for so long; return what was sent and came of it.

    Raise `FuzzFailure` when it failed, does not answer any more, keeps something, or took too much memory.
    """
    async with fuzz_target() as target:
        await target.check_answers()
        before = _peak_rss()
        peers = HostilePeers(target, random.Random(seed))
        await peers.run(seconds)
        await target.check_answers()
        await target.check_settled()
        target.check()
        grown = _peak_rss() - before
        if grown > MOST_GROWTH:
            raise FuzzFailure(f"the process grew by {grown / 2**20:.0f} MiB")
        return {**peers.counts, "MiB grown": round(grown / 2**20)}


def _peak_rss() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    sys.exit(main())
