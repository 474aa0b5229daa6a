"""Memory as kernels see it: a flat run of elements, read and written at offsets by many programs at once.

Fresh memory is poisoned (NaN, or the byte 0xAB), so that an element which nobody writes shows. Every access is checked to be in
bounds. With `check`, an element remembers which program wrote it: a second program that writes or reads it is an error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..core import IRError
from .arith import SAME_WIDTH_SIGNED
from .context import flat_take
from .tensor import scatter_into

Tensor = torch.Tensor

__all__ = ["Memory", "extent"]

NOBODY, ATOMIC = -1, -2  # in place of a writer's number
_POISON_BYTE, _NAN_BYTE = 0xAB, 0x7F


def extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """The number of elements from the first to the last that a layout reaches."""
    return 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))


def _poisoned(n: int, dtype: torch.dtype) -> Tensor:
    if dtype == torch.bool:
        return torch.ones(n, dtype=dtype)
    if dtype.is_floating_point and dtype.itemsize > 1:
        return torch.full((n,), math.nan, dtype=dtype)
    byte = _NAN_BYTE if dtype.is_floating_point else _POISON_BYTE
    return torch.full((n * dtype.itemsize,), byte, dtype=torch.uint8).view(dtype)


@dataclass
class Memory:
    """`flat` holds the elements; `private` programs each have their own `size` of them (scratch memory), else all share."""

    flat: Tensor
    size: int
    private: bool = False
    writers: Tensor | None = None

    @staticmethod
    def fresh(size: int, dtype: torch.dtype, *, programs: int | None = None, check: bool = False) -> Memory:
        """Poisoned memory of `size` elements, once for all or once per program."""
        total = size if programs is None else size * programs
        return Memory(_poisoned(total, dtype), size, programs is not None, torch.full((total,), NOBODY) if check else None)

    @staticmethod
    def holding(x: Tensor, strides: Sequence[int], *, check: bool = False) -> Memory:
        """Memory that holds `x`, laid out with `strides`."""
        memory = Memory.fresh(extent(x.shape, strides), x.dtype, check=check)
        if x.numel():
            for d, s in enumerate(strides):  # elements that share a place are equal: write one of them
                x = x.narrow(d, 0, 1) if s == 0 else x
            memory.flat.as_strided(x.shape, tuple(strides)).copy_(x)
        return memory

    def tensor(self, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
        """The elements as a (contiguous) tensor."""
        return self.flat.as_strided(tuple(shape), tuple(strides)).clone(memory_format=torch.contiguous_format)

    def unwritten(self, shape: Sequence[int], strides: Sequence[int]) -> list[int] | None:
        """The index of an element that no program wrote; None if there is none (or writers were not recorded)."""
        if self.writers is None or 0 in shape:
            return None
        missing = (self.writers.as_strided(tuple(shape), tuple(strides)) == NOBODY).nonzero()
        return missing[0].tolist() if len(missing) else None

    def _addresses(self, offset: Tensor, wanted: Tensor, lanes: Tensor, programs: Tensor) -> Tensor:
        """`offset` as positions in `flat`, 0 where not wanted. IRError if a wanted one is out of bounds.

        `lanes` and `programs` number the programs, here and in the grid.
        """
        outside = wanted & ((offset < 0) | (offset >= self.size))
        if bool(outside.any()):
            where = outside.nonzero()[0].tolist()
            bad = offset.expand(outside.shape)[tuple(where)].item()
            raise IRError(f"offset {bad} is out of bounds of {self.size} elements, at position {where[1:]} of the tile,"
                          f" in program {programs.reshape(-1)[where[0]].item()}")
        base = torch.where(wanted, offset, 0)
        return base + lanes * self.size if self.private else base

    def load(self, offset: Tensor, wanted: Tensor, lanes: Tensor, programs: Tensor) -> Tensor:
        """The elements at `offset` (any value where not `wanted`)."""
        at = self._addresses(offset, wanted, lanes, programs)
        if not self.flat.numel():
            return torch.zeros(at.shape, dtype=self.flat.dtype)
        if self.writers is not None and not self.private:
            writer = self.writers[at]
            race = wanted & (writer != NOBODY) & (writer != programs)
            if bool(race.any()):
                raise IRError(f"element {at.expand(race.shape)[race][0].item()} is read by one program and written by another")
        return flat_take(self.flat, at)

    def store(self, offset: Tensor, wanted: Tensor, value: Tensor, lanes: Tensor, programs: Tensor, *, atomic: str = "",
              ordered: bool = False) -> None:
        """Writes (or combines, by `atomic`) `value` at `offset` where `wanted`; all tensors broadcast.

        If `ordered`, later lanes win.
        """
        offset, wanted, value, lanes, programs = torch.broadcast_tensors(offset, wanted, value, lanes, programs)
        at = self._addresses(offset, wanted, lanes, programs.reshape(programs.shape[0], -1)[:, 0])[wanted]
        chosen = value[wanted]
        if self.writers is not None and not self.private:
            self._record(at, programs[wanted], bool(atomic))
        if atomic or ordered:
            self.flat = scatter_into(atomic or "set", self.flat, at, chosen)
            return
        signed = SAME_WIDTH_SIGNED.get(self.flat.dtype, self.flat.dtype)  # torch cannot index-assign wide unsigned types
        self.flat.view(signed)[at] = chosen.view(signed)

    def _record(self, at: Tensor, programs: Tensor, atomic: bool) -> None:
        assert self.writers is not None
        before = self.writers[at]
        clash = (before != NOBODY) & (before != (ATOMIC if atomic else programs))
        self.writers[at] = torch.full_like(programs, ATOMIC) if atomic else programs
        if not atomic:
            clash |= self.writers[at] != programs
        if bool(clash.any()):
            i = int(clash.nonzero()[0])
            raise IRError(f"element {at[i].item()} is written by program {programs[i].item()} and by another"
                          f" ({'atomically and not' if atomic else 'not atomically'})")
