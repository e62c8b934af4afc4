"""The process that is an emulated link: ``python -m swarmcore.bench.link_pump DELAY LOSS RATE SEED``.

Seconds one way, share of packets, bytes per second. It makes the TUN devices `LEFT` and `RIGHT` in its own
network namespace, prints an empty line, and carries packets between them, wherever they are moved, until its
stdin closes. Then it prints a line of JSON, its `Carried`. The kernel's own emulator, netem, does the same
where there is one; many kernels, such as those of containers and small virtual machines, come without.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import random
import select
import struct
import sys
import time
from collections import deque

import attrs

LEFT, RIGHT = "left", "right"

_SET_NAME_AND_KIND = 0x400454CA  # TUNSETIFF
_PLAIN_PACKETS = 0x0001 | 0x1000  # IFF_TUN | IFF_NO_PI
_LARGEST_PACKET = 65536
_READ_AT_ONCE = 64
LONGEST_QUEUE = 0.1
"""Seconds that a packet may wait for those before it to leave; a router would drop it too."""

MOST_PACKETS = 2**14
"""On the way at once, whatever the delay and the rate."""

EARLY = 50e-6
"""Seconds that a packet may leave before its time, so that a burst costs one wake-up."""
_LATE = 1e-3
_STDIN, _STDOUT = 0, 1


@attrs.define
class DelayLine:
    """One direction of an emulated link: takes packets and gives them back ``delay`` seconds later, in order.

    ``now`` is the caller's clock.

    ``loss`` is the share that vanishes, chosen by ``rng``. ``rate``, in bytes per second, is how fast packets
    leave one after the other; those that would wait longer than `LONGEST_QUEUE` are dropped.
    """

    delay: float
    loss: float
    rate: float
    rng: random.Random
    taken: int = 0
    lost: int = 0
    """By chance, as was asked for."""
    dropped: int = 0
    """For want of room."""
    _free_at: float = float("-inf")
    _on_the_way: deque[tuple[float, bytes]] = attrs.field(factory=deque)

    def put(self, packet: bytes, now: float) -> None:
        """``packet`` comes in."""
        self.taken += 1
        if self.loss and self.rng.random() < self.loss:
            self.lost += 1
            return
        starts = max(now, self._free_at)
        if starts - now > LONGEST_QUEUE or len(self._on_the_way) >= MOST_PACKETS:
            self.dropped += 1
            return
        self._free_at = starts + len(packet) / self.rate
        self._on_the_way.append((self._free_at + self.delay, packet))

    def take(self, now: float) -> tuple[float, bytes] | None:
        """The next packet whose time has come, and when that was; None when none is due."""
        if self._on_the_way and self._on_the_way[0][0] <= now:
            return self._on_the_way.popleft()
        return None

    @property
    def next_at(self) -> float:
        """When the next packet is due; infinity when there is none."""
        return self._on_the_way[0][0] if self._on_the_way else float("inf")


@attrs.frozen
class Carried:
    """What a link did."""

    packets: int
    """That came in, both directions together."""
    lost: int
    """By chance, as was asked for."""
    dropped: int
    """Because more waited than a link holds."""
    late: int
    """Delivered more than a millisecond after their time: the emulator could not keep up."""


def carry(left: int, right: int, lines: tuple[DelayLine, DelayLine]) -> Carried:
    """Carry packets between two TUN devices, ``lines`` from left and from right, until stdin closes."""
    directions = ((left, right, lines[0]), (right, left, lines[1]))
    late = 0
    while True:
        # A loop of our own: asyncio's rounds its waits up to whole milliseconds, a share of the delay that
        # would be seen. `select` waits for microseconds, and there are three files.
        wait = min(line.next_at for line in lines) - time.monotonic()
        readable, _, _ = select.select(
            (_STDIN, left, right), (), (), None if wait == float("inf") else max(0.0, wait)
        )
        if _STDIN in readable and not os.read(_STDIN, 1024):
            break
        for source, _, line in directions:
            if source in readable:
                _read(source, line)
        now = time.monotonic()
        for _, target, line in directions:
            while arrived := line.take(now + EARLY):
                late += now - arrived[0] > _LATE
                if not _write(target, arrived[1]):
                    line.dropped += 1
    return Carried(
        sum(line.taken for line in lines),
        sum(line.lost for line in lines),
        sum(line.dropped for line in lines),
        late,
    )


def _read(source: int, line: DelayLine) -> None:
    with contextlib.suppress(BlockingIOError):
        for _ in range(_READ_AT_ONCE):
            line.put(os.read(source, _LARGEST_PACKET), time.monotonic())


def _write(target: int, packet: bytes) -> bool:
    try:
        os.write(target, packet)
    except OSError:  # its queue is full, or the device is down or being moved
        return False
    return True


def _tun(name: str) -> int:
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _SET_NAME_AND_KIND, struct.pack("16sH22x", name.encode(), _PLAIN_PACKETS))
    return device


def main(delay: str, loss: str, rate: str, seed: str) -> None:
    lines = tuple(
        DelayLine(float(delay), float(loss), float(rate), random.Random(f"{seed} {end}"))
        for end in (LEFT, RIGHT)
    )
    left, right = _tun(LEFT), _tun(RIGHT)
    with contextlib.suppress(OSError):  # a link does not wait for those that it joins to finish computing
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    gc.freeze()
    gc.disable()
    os.write(_STDOUT, b"\n")
    carried = carry(left, right, (lines[0], lines[1]))
    with contextlib.suppress(BrokenPipeError):  # nobody is left to be told
        os.write(_STDOUT, json.dumps(attrs.asdict(carried)).encode() + b"\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
