"""Memory of large results, used again once nobody holds it.

A result of a few hundred kilobytes or more would be mapped by the system for every call and cost a page fault per 4 KiB, which takes longer
than many a kernel. So the storages of large results are remembered; when a call needs one of the same size and no tensor, view, storage
object or other process uses a remembered one any more, it is used again. Everything that a caller still holds stays as it is.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from functools import cache

import torch
from torch.utils._python_dispatch import _disable_current_modes

from .huge_pages import prefer_huge_pages

__all__ = ["LARGE", "OutputPool", "empty_strided", "is_large", "shared_outputs", "strided_bytes"]

LARGE = 1 << 17
"""Results from this many bytes on are remembered; smaller ones come quickly from the allocator."""

KEEP = (1 << 28, 1 << 32)
"""The pool of the process remembers a sixteenth of the machine's memory, within these bounds: the gradients of a model that trains there."""

Shape = tuple[int, ...]
_Entry = tuple[torch.UntypedStorage, int, torch.Tensor]
"""A storage, its address, and a tensor of the last type in it."""
_MOST_SIZES = 512
_use_count = torch._C._storage_Use_Count
_guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)


def _set_in_storage(holder: torch.Tensor, shape: Shape, strides: Shape, offset: int) -> torch.Tensor:
    return torch.empty(0, dtype=holder.dtype, device="cpu").set_(holder.untyped_storage(), offset, shape, strides)


# Torch's own shortcuts past the dispatcher where this torch has them (0.7 microseconds for 1.8). What they make is a tensor of its own, with its own
# version counter, and one of inference mode where that is on.
empty_strided: Callable[[Shape, Shape, torch.dtype], torch.Tensor] = getattr(
    _guards, "_empty_strided_cpu", lambda shape, strides, dtype: torch.empty_strided(shape, strides, dtype=dtype, device="cpu"))
_in_storage: Callable[[torch.Tensor, Shape, Shape, int], torch.Tensor] = getattr(
    _guards, "_reinterpret_tensor", _set_in_storage)


class OutputPool:
    """Remembers at most `keep_bytes`, used or not. Threads may share it: a storage is out of the pool while it is looked at."""

    def __init__(self, keep_bytes: int = KEEP[0]):
        self.keep_bytes = keep_bytes
        self._known: dict[int, list[_Entry]] = {}
        self._sizes: dict[tuple[Shape, Shape, torch.dtype], int] = {}
        self._bytes = 0
        self.reused = 0

    def empty(self, shape: Shape, strides: Shape, dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised CPU tensor with these strides."""
        size = self._sizes.get((shape, strides, dtype))
        if size is None:
            if len(self._sizes) >= _MOST_SIZES:
                self._sizes.clear()
            size = self._sizes[shape, strides, dtype] = strided_bytes(shape, strides, dtype)
        if size < LARGE:
            return empty_strided(shape, strides, dtype)
        _storage, holder = self._take(size, dtype)  # holding the storage: other threads see that it is in use
        return _in_storage(holder, shape, strides, 0)

    def _take(self, size: int, dtype: torch.dtype) -> tuple[torch.UntypedStorage, torch.Tensor]:
        """A storage that nobody uses, and a tensor of this type in it; not to be given away, for it is remembered too."""
        known = self._known.setdefault(size, [])
        for _ in range(len(known)):
            try:
                entry = known.pop(0)  # atomic
            except IndexError:
                break
            storage, address, holder = entry
            if storage.data_ptr() != address or storage.nbytes() != size:  # resized, or moved to memory that processes share
                self._bytes -= size
                continue
            # By C++: `storage` and `holder`. By Python: `entry`, `storage` and the argument, and in some versions of torch the C++ object.
            idle = _use_count(storage._cdata) == 2 and sys.getrefcount(storage) == 3 + _OF_TORCH
            if idle and holder.dtype != dtype:
                holder = _whole(storage, dtype)
                entry = (storage, address, holder)
            known.append(entry)
            if idle:
                self.reused += 1
                return storage, holder
        storage = torch.UntypedStorage(size)
        prefer_huge_pages(storage.data_ptr(), size)
        holder = _whole(storage, dtype)
        if self._bytes + size > self.keep_bytes:
            self.trim()
        if self._bytes + size <= self.keep_bytes:
            self._bytes += size
            self._known[size].append((storage, storage.data_ptr(), holder))
        return storage, holder

    @property
    def bytes(self) -> int:
        """Bytes remembered, in use or not."""
        return self._bytes

    def trim(self) -> None:
        """Forgets everything; memory that is in use lives on with its tensors."""
        self._known = {size: [] for size in self._known}
        self._bytes = 0


def _whole(storage: torch.UntypedStorage, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(0, dtype=dtype, device="cpu").set_(storage, 0, (storage.nbytes() // dtype.itemsize,), (1,))  # type: ignore[call-overload,no-any-return]


def _of_torch() -> int:
    """Python references to a storage's object that its C++ object has while a tensor is in it."""
    storage = torch.UntypedStorage(8)
    alone = sys.getrefcount(storage)
    holder = _whole(storage, torch.uint8)
    references = sys.getrefcount(storage) - alone
    del holder
    return references


with _disable_current_modes():  # whatever is traced where this is imported
    _OF_TORCH = _of_torch()


def strided_bytes(shape: Shape, strides: Shape, dtype: torch.dtype) -> int:
    """From the first element to the last."""
    return 0 if 0 in shape else dtype.itemsize * (1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)))


def is_large(shape: Shape, strides: Shape, dtype: torch.dtype) -> bool:
    """Whether a result of this shape is worth remembering."""
    return math.prod(shape) * dtype.itemsize >= LARGE


@cache
def shared_outputs() -> OutputPool:
    """The pool of the process."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return OutputPool(max(KEEP[0], min(memory // 16, KEEP[1])))
