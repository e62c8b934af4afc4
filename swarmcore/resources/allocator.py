"""The C library's allocator: having it give back what was freed, which glibc does only in part by itself."""

from __future__ import annotations

import contextlib
import ctypes

_M_ARENA_MAX = -8


def use_one_arena() -> None:
    """Have all threads of this process, which has just begun, allocate from one arena.

    glibc gives threads arenas of their own, and keeps up to 64 MB at the end of each that are free: after
    weights were read by a few threads, hundreds of megabytes in all, which `give_back_memory` does not reach.
    """
    with contextlib.suppress(OSError, AttributeError):  # a system without glibc
        ctypes.CDLL("libc.so.6").mallopt(_M_ARENA_MAX, 1)


def give_back_memory() -> None:
    """Have what was freed returned to the system, where the C library would keep it for later.

    After weights were loaded it is as much as they take.
    """
    with contextlib.suppress(OSError, AttributeError):  # a system without glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
