"""Large pages for memory that lives long and is walked through often: packed parameters, arenas, remembered results.

With pages of 4 KiB a matrix of 64 MiB needs 16384 address translations, and a prefetcher stops at the end of each page. Linux backs a range by
pages of 2 MiB when it is asked to (`madvise(MADV_HUGEPAGE)`), where /sys/kernel/mm/transparent_hugepage/enabled says `madvise` or `always`.
Only whole large pages inside the range are asked for, so that no memory is used beside it. Elsewhere this does nothing.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import cache

__all__ = ["HUGE_PAGE", "prefer_huge_pages", "whole_pages"]

HUGE_PAGE = 1 << 21
_MADV_HUGEPAGE = 14


@cache
def _madvise() -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    return function  # type: ignore[no-any-return]


def whole_pages(address: int, size: int) -> tuple[int, int]:
    """(address, bytes) of the whole large pages inside a range; (_, 0) if there is none."""
    first = -(-address // HUGE_PAGE) * HUGE_PAGE
    return first, max(0, (address + size) // HUGE_PAGE * HUGE_PAGE - first)


def prefer_huge_pages(address: int, size: int) -> bool:
    """Asks for large pages in a range of this process's memory that has not been touched yet; whether the system agreed."""
    first, length = whole_pages(address, size)
    madvise = _madvise() if length else None
    return madvise is not None and madvise(first, length, _MADV_HUGEPAGE) == 0
