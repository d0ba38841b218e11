"""Memory of forward passes on the CPU: kept from one layer to the next."""

import ctypes
import platform

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def keep_freed_memory() -> None:
    """Have glibc's malloc keep what is freed, from now on in this process; with another C library nothing happens.

    By default it gives large blocks back to the system, and each layer of a forward pass gets its own anew, page by
    page. The most memory that the process takes stays the same, but up to 1 GiB of it stays with it afterwards.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        if not libc.mallopt(_MMAP_THRESHOLD, 1 << 30):
            libc.mallopt(_MMAP_THRESHOLD, 1 << 25)  # the most that older versions take
        libc.mallopt(_TRIM_THRESHOLD, 1 << 30)
