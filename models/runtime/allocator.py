"""Keep large freed blocks of memory in the process instead of handing them back to the kernel."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def reuse_large_allocations() -> bool:
    """Make glibc serve large blocks from its heap and keep them there; True if that was done.

    By default glibc maps every block above 32 MiB (above 128 KiB at first) freshly and unmaps it on free, so each large
    temporary of a training step pays a page fault per 4 KiB. The price is that the process keeps its peak of memory.
    Does nothing where the C library is not glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    settings = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 64 << 20))
    return all(library.mallopt(name, value) == 1 for name, value in settings)
