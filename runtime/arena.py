"""Temporary memory for calls, kept between calls.

A graph needs one arena per call. Asking the system for it each time would cost a page fault per 4 KiB, which for the arenas of
large models is more than the kernels take; so arenas go back to a pool. One pool serves all graphs of a program: graphs that
run one after the other share one arena, as large as the largest of them needs.
"""

from __future__ import annotations

import threading
from functools import cache

import torch

from .huge_pages import prefer_huge_pages

__all__ = ["ArenaPool", "shared_pool"]


class ArenaPool:
    """A stack of idle arenas (uint8 tensors). Threads that run at the same time get different ones.

    At most `keep_bytes` stay allocated while idle; a larger arena is given back to the allocator after its call.
    """

    def __init__(self, keep_bytes: int = 1 << 30, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.keep_bytes = keep_bytes
        self._idle: list[torch.Tensor] = []
        self._lock = threading.Lock()

    def acquire(self, size: int) -> torch.Tensor:
        """An arena of at least `size` bytes, aligned to 64, contents undefined."""
        try:
            arena = self._idle.pop()  # atomic: the list is only touched by pop and append outside the lock
        except IndexError:
            return self._allocate(size)
        if arena.nbytes >= size:
            return arena
        del arena  # give the small one back before asking for the large one
        return self._allocate(size)

    def _allocate(self, size: int) -> torch.Tensor:
        arena = torch.empty(size, dtype=torch.uint8, device=self.device)
        if self.device.type == "cpu":
            prefer_huge_pages(arena.data_ptr(), size)
        return arena

    def release(self, arena: torch.Tensor) -> None:
        """The arena may serve other calls from now on."""
        if arena.nbytes <= self.keep_bytes:
            self._idle.append(arena)
            if len(self._idle) > 1:
                self._shrink()

    def _shrink(self) -> None:
        with self._lock:
            while len(self._idle) > 1 and self.idle_bytes > self.keep_bytes:
                try:
                    self._idle.pop(0)
                except IndexError:
                    return

    @property
    def idle_bytes(self) -> int:
        """Bytes held while no call runs."""
        return sum(a.nbytes for a in list(self._idle))

    def trim(self) -> None:
        """Gives all idle memory back to the allocator."""
        with self._lock:
            self._idle.clear()


@cache
def shared_pool() -> ArenaPool:
    """The pool of the process."""
    return ArenaPool()
