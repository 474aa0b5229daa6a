"""Asking for the next program's rows while this one computes.

A kernel that passes over a row several times (a norm, a softmax) waits for memory in its first pass alone and leaves memory idle in the others,
whose loops find the row in the caches. So the last loop that reads an operand (or, if only the first does, the last of all) asks, line by line,
for what the next program will read first.

On AMD's processors, a kernel that reads its operands once, from memory, asks for each line a little before it wants it (`ask_soon`), for its own use
alone: the line need not be kept in the outer caches. Hardware asks for lines too, but for fewer than memory could bring (sums of 64 MB on a Zen 4
take a tenth to a third less time). On Intel's the same costs a quarter (18 -> 13 GB/s on a Sapphire Rapids, 27 -> 17 from L3).

Rows of a table that data names are foreseen by nobody, but their numbers lie ahead in memory: `ask_for_named_rows` reads the one that will be
wanted some rows later, in this bag or the next, and asks for that row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...ir import Builder, Dim, Operation, TensorType, Value
from ...ir.expr import free_symbols, minimum, substitute, sym
from ...ir.ranges import simplify, split_linear
from .emit import Emitter
from .frame import Access

__all__ = ["Leaf", "ask_ahead", "ask_beyond", "ask_for_named_rows", "ask_soon", "named_by"]

LINE = 64
AHEAD = 16
"""Rows between the one that is asked for and the one that is read."""
BEYOND = 2048
"""Bytes before what a pipeline of rows reads first: hardware does not look past a page, and a row is one or two."""
NEAR = 256
"""Bytes before what is read once: from 128 to 320 it is the same on a Zen 4, at 512 the gain is gone."""
LONG = 16384
"""Bytes of a row of which the lines asked for past its end are no matter."""


@dataclass(frozen=True)
class Leaf:
    """The innermost loop of a stage, complete: `e` writes to its body, `at` is the position of each dimension of the frame in it."""

    e: Emitter
    at: Mapping[str, Dim]


def ask_ahead(leaves: Mapping[int, Leaf], reads: Sequence[tuple[Access, Value, set[int]]], program: str, width: int) -> int:
    """Adds prefetches to the bodies of loops; gives for how many operands.

    `leaves` is by stage; `reads` are accesses with their buffers and the stages that load them; `program` is the loop variable of the grid's fastest
    axis, `width` the elements of a loop's step. Operands that do not move with the program (a norm's weights) are in the caches already; others are
    only asked for along contiguous memory.
    """
    asked: set[tuple[Value, Dim]] = set()
    for access, buffer, stages in reads:
        later = [s for s in stages if s > min(stages)] or [s for s in leaves if s > min(stages)]
        if not later:
            continue
        leaf = leaves[max(later)]
        here = simplify(substitute(access.offset, leaf.at), leaf.e.bounds())
        along, down = split_linear(here, "t1"), split_linear(here, program)
        if along is None or along[0] != 1 or down is None or down[0] == 0 or (buffer, here) in asked:
            continue
        asked.add((buffer, here))
        e = Emitter(Builder.before_op(leaf.e.builder.block.terminator), leaf.e.shape, leaf.e.symbols, leaf.e.variables, leaf.e.ranges)
        ahead = substitute(here, {"t1": 0, program: sym(program) + 1})
        for n in range(0, width, max(1, LINE // access.bytes)):
            e.prefetch(buffer, ahead + n)
    return len(asked)


def ask_soon(leaf: Leaf, reads: Sequence[tuple[Access, Value]], width: int, around: str | None, size: Dim) -> int:
    """Asks for what the one loop over a row reads NEAR bytes later, of `reads` that come from memory; gives for how many operands.

    `width` are the elements of a loop's step, `size` those of the row; `around` is the dimension that is walked after it. Short rows that do not
    follow each other in memory are left to the hardware.
    """
    asked: set[tuple[Value, Dim]] = set()
    for access, buffer in reads:
        here = simplify(substitute(access.offset, leaf.at), leaf.e.bounds())
        along, down = split_linear(here, "t1"), split_linear(access.offset, around) if around is not None else None
        follows = down is not None and down[0] == size
        long = not isinstance(size, int) or size * access.bytes >= LONG
        if along is None or along[0] != 1 or not (follows or long) or (buffer, here) in asked:
            continue
        asked.add((buffer, here))
        e = Emitter(Builder.before_op(next(iter(leaf.e.builder.block))), leaf.e.shape, leaf.e.symbols, leaf.e.variables, leaf.e.ranges)
        ahead = substitute(here, {"t1": 0}) + NEAR // access.bytes
        for n in range(0, width, max(1, LINE // access.bytes)):
            e.prefetch(buffer, ahead + n, each=True, once=True)
    return len(asked)


def named_by(op: Operation, extract: Operation) -> int | None:
    """The operand of the structured `op` whose elements are the rows that `extract` reads, as they are or cast; None if something is computed,
    or if it reads the one element of a scalar."""
    if len(extract.operands) == 1:
        return None
    row: Value = extract.operands[1]
    while row.defining_op is not None and row.defining_op.name == "arith.cast":
        row = row.defining_op.operands[0]
    return next((i for i, arg in enumerate(op.body.args) if arg is row and op["maps"][i] is not None), None)


def ask_for_named_rows(e: Emitter, op: Operation, extract: Operation, buffers: Mapping[Value, Value], positions: Mapping[str, Dim],
                       cache: int) -> None:
    """Asks for the part of a row of a table of more than `cache` bytes that `extract` will read AHEAD steps later, if the rows are named by what lies
    side by side along the innermost loop. `positions` are those of the dimensions of the structured `op`."""
    named, last, table = named_by(op, extract), extract.operands[-1].defining_op, op.operands[extract.operands[0].index]  # type: ignore[attr-defined]
    t = table.type
    assert isinstance(t, TensorType)
    small = isinstance(t.numel, int) and t.numel * t.dtype.bytes <= cache
    if small or named is None or t.rank != 2 or last is None or last.name != "tensor.index":
        return
    numbers = op.operands[named]
    assert isinstance(numbers.type, TensorType)
    at = simplify(sum((substitute(x, positions) * s for x, s in zip(op["maps"][named], numbers.type.layout, strict=True)), 0), e.bounds())
    loop = max((s for s in free_symbols(at) if s in e.variables), key=lambda s: int(s[1:]), default=None)
    along = None if loop is None or "t1" in free_symbols(at) else split_linear(at, loop)
    if along is None or along[0] != 1 or numbers.type.strides is not None:
        return
    number = e.load(buffers[numbers], minimum(at + AHEAD, numbers.type.numel - 1))
    start = e.fresh(number, None, None) * t.layout[0] + substitute(positions[f"d{last['dim']}"], {"t1": 0})
    for n in range(0, e.shape[1], max(1, LINE // t.dtype.bytes)):
        e.prefetch(buffers[table], start + n, each=True)


def ask_beyond(leaves: Mapping[int, Leaf], reads: Sequence[tuple[Access, Value, set[int]]], row: str, width: int, size: Dim) -> int:
    """The same in the one loop of a pipeline of rows (`row_pipeline.py`): for what its first stage to read an operand will read soon. `leaves` is by
    stage, `row` the dimension of which each stage has another point, `size` the elements of a row."""
    asked: set[tuple[Value, Dim]] = set()
    for access, buffer, stages in reads:
        leaf = leaves[min(s for s in stages if s in leaves)]
        here = simplify(substitute(access.offset, leaf.at), leaf.e.bounds())
        along, down = split_linear(here, "t1"), split_linear(access.offset, row)
        if along is None or along[0] != 1 or down is None or down[0] == 0 or (buffer, here) in asked:
            continue
        asked.add((buffer, here))
        ahead = substitute(here, {"t1": 0}) + (BEYOND // access.bytes if down[0] == size else down[0])
        for n in range(0, width, max(1, LINE // access.bytes)):
            leaf.e.prefetch(buffer, ahead + n)
    return len(asked)
