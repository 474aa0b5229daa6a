"""Memory of large results, used again once nobody holds it.

A result of a few hundred kilobytes or more would be mapped by the system for every call and cost a page fault per 4 KiB, which takes longer
than many a kernel. So the storages of large results are remembered; when a call needs one of the same size and no tensor, view, storage
object or other process uses a remembered one any more, it is used again. Everything that a caller still holds stays as it is.
"""

from __future__ import annotations

import math
import os
import sys
from functools import cache

import torch

from .huge_pages import prefer_huge_pages

__all__ = ["LARGE", "OutputPool", "shared_outputs"]

LARGE = 1 << 17
"""Results from this many bytes on are remembered; smaller ones come quickly from the allocator."""

KEEP = (1 << 28, 1 << 32)
"""The pool of the process remembers a sixteenth of the machine's memory, within these bounds: the gradients of a model that trains there."""

_use_count = torch._C._storage_Use_Count
Shape = tuple[int, ...]


class OutputPool:
    """Remembers at most `keep_bytes`, used or not. Threads may share it: a storage is out of the pool while it is looked at."""

    def __init__(self, keep_bytes: int = KEEP[0]):
        self.keep_bytes = keep_bytes
        self._known: dict[int, list[tuple[torch.UntypedStorage, int]]] = {}  # with their addresses
        self._bytes = 0
        self.reused = 0

    def empty(self, shape: Shape, strides: Shape, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised CPU tensor with these strides."""
        size = 0 if 0 in shape else dtype.itemsize * (1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)))
        if size < LARGE:
            return torch.empty_strided(shape, strides, dtype=dtype)
        storage = self._take(size)
        return torch.empty(0, dtype=dtype).set_(storage, 0, shape, strides)  # type: ignore[arg-type]

    def _take(self, size: int) -> torch.UntypedStorage:
        known = self._known.setdefault(size, [])
        for _ in range(len(known)):
            try:
                entry = known.pop(0)  # atomic
            except IndexError:
                break
            storage, address = entry
            if storage.data_ptr() != address or storage.nbytes() != size:  # resized, or moved to memory that processes share
                self._bytes -= size
                continue
            idle = _use_count(storage._cdata) == 1 and sys.getrefcount(storage) == 3  # `entry`, `storage` and the argument
            known.append(entry)
            if idle:
                self.reused += 1
                return storage
        storage = torch.UntypedStorage(size)
        prefer_huge_pages(storage.data_ptr(), size)
        if self._bytes + size > self.keep_bytes:
            self.trim()
        if self._bytes + size <= self.keep_bytes:
            self._bytes += size
            self._known[size].append((storage, storage.data_ptr()))
        return storage

    @property
    def bytes(self) -> int:
        """Bytes remembered, in use or not."""
        return self._bytes

    def trim(self) -> None:
        """Forgets everything; memory that is in use lives on with its tensors."""
        self._known = {size: [] for size in self._known}
        self._bytes = 0


def is_large(shape: Shape, strides: Shape, dtype: torch.dtype) -> bool:
    """Whether a result of this shape is worth remembering."""
    return math.prod(shape) * dtype.itemsize >= LARGE


@cache
def shared_outputs() -> OutputPool:
    """The pool of the process."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return OutputPool(max(KEEP[0], min(memory // 16, KEEP[1])))
