"""One arena for all threads: what they have freed goes back to the system."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

THREADS_ALLOCATE = """
import ctypes, sys, threading
from swarmcore.resources.allocator import give_back_memory, use_one_arena

libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
if sys.argv[1] == "one":
    use_one_arena()

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def allocate():
    blocks = [libc.malloc(65536) for _ in range(256)]
    for block in blocks:
        ctypes.memset(block, 1, 65536)
    for block in blocks:
        libc.free(block)

libc.mallopt(-1, 2**26)  # what glibc itself comes to, in a process that has freed a large tensor
before = resident()
threads = [threading.Thread(target=allocate) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
give_back_memory()
print(resident() - before)
"""


def left(arenas: str) -> int:
    """Bytes that stay in a process of whose threads each has allocated and freed 16 MB."""
    done = subprocess.run(
        [sys.executable, "-c", THREADS_ALLOCATE, arenas],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return int(done.stdout)


@pytest.mark.skipif(
    not hasattr(os, "confstr") or "glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""),
    reason="glibc only",
)
def test_threads_that_share_an_arena_leave_nothing_behind() -> None:
    assert left("many") > 16 * 2**20
    assert left("one") < 4 * 2**20
