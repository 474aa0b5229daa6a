"""Gathers of elements whose numbers lie side by side in memory, where there is no quick instruction for them.

AMD's processors split a gather into two to four operations for each lane and others that put the lanes together: 1024 rows of 64 elements took
30 us, and 23 by loads of one element each. For those the numbers are wanted in scalar registers, and taking them out of a vector costs as much as
was gained (29 us): so they are read once more, one by one, where all are in bounds; where one is not, lanes are guarded as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from llvmlite import ir

from ...ir.expr import free_symbols
from ...ir.ranges import split_linear
from .intrinsics import call, suffix
from .values import I1, I64, PTR, pack

if TYPE_CHECKING:
    from .access import AccessChunk, Accessor

__all__ = ["by_lane"]


def by_lane(x: Accessor, c: AccessChunk, mask: ir.Value, numbers: Callable[[str], ir.Value | None],
            guarded: Callable[[], Callable[[], ir.Value]]) -> ir.Value | None:
    """Chunk `c` of the load `x` by single loads if all lanes of `mask` hold, or else `guarded`, whose addresses are made by its first call.

    `numbers` gives where in memory the lanes' numbers lie, by their symbol. None if they lie nowhere, or the offset is more than one number and
    what all lanes share.
    """
    lanes, b = c.lanes, x.b
    moved = [s for s in free_symbols(c.offset) if s == lanes.position or s in lanes.vectors]
    split = split_linear(c.offset, moved[0]) if len(moved) == 1 and moved[0] in lanes.vectors else None
    if split is None or not isinstance(split[0], int) or lanes.varies(split[1]):
        return None
    places = numbers(moved[0])
    if places is None:
        return None
    dtype = x.k.resolver.values[moved[0]].type.dtype  # type: ignore[attr-defined]
    base = x.address(split[1])
    otherwise = guarded()
    good, bad, end = (b.append_basic_block(f"lanes.{name}") for name in ("inside", "guarded", "end"))
    b.cbranch(call(b, f"llvm.vector.reduce.and.{suffix(mask.type)}", I1, [mask]), good, bad)
    b.position_at_end(good)
    number = ir.IntType(8 * dtype.bytes)
    read = []
    for i in range(lanes.width):
        n = x.k.widen_index(_load_again(b, b.gep(places, [I64(i)], source_etype=number), number, dtype.bytes), dtype)
        at = b.gep(base, [b.mul(n, I64(split[0]), flags=("nsw",))], source_etype=x.memory)
        read.append(b.load(at, align=x.dtype.bytes, typ=x.memory))
    one = pack(b, read)
    b.branch(end)
    good = b.block
    b.position_at_end(bad)
    two = otherwise()
    b.branch(end)
    bad = b.block
    b.position_at_end(end)
    made = b.phi(one.type)
    made.add_incoming(one, good)
    made.add_incoming(two, bad)
    return made


class _LoadAgain(ir.instructions.LoadInstr):
    """A volatile load: LLVM would take the number out of the vector that was read before."""

    def descr(self, buf: list[str]) -> None:
        plain: list[str] = []
        super().descr(plain)
        buf.append("".join(plain).replace("load ", "load volatile ", 1))


def _load_again(b: ir.IRBuilder, pointer: ir.Value, type_: ir.Type, align: int) -> ir.Value:
    assert pointer.type == PTR
    made = _LoadAgain(b.block, pointer, typ=type_)
    made.align = align
    b._insert(made)
    return made
