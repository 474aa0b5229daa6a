"""Asking for the next program's rows while this one computes.

A kernel that passes over a row several times (a norm, a softmax) waits for memory in its first pass alone and leaves memory idle in the others,
whose loops find the row in the caches. So the last loop that reads an operand (or, if only the first does, the last of all) asks, line by line,
for what the next program will read first.

Rows of a table that data names are foreseen by nobody, but their numbers lie ahead in memory: `ask_for_rows` reads the one that will be wanted some
rows later, in this bag or the next, and asks for that row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...ir import Builder, Dim, Operation, TensorType, Value
from ...ir.expr import minimum, substitute, sym
from ...ir.ranges import simplify, split_linear
from .emit import Emitter
from .frame import Access

__all__ = ["Leaf", "ask_ahead", "ask_beyond", "ask_for_rows", "named_by"]

LINE = 64
AHEAD = 16
"""Rows between the one that is asked for and the one that is read."""
BEYOND = 2048
"""Bytes before what a pipeline of rows reads first: hardware does not look past a page, and a row is one or two."""


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


def named_by(op: Operation, extract: Operation) -> int | None:
    """The operand of the structured `op` whose elements are the rows that `extract` reads, as they are or cast; None if something is computed."""
    row: Value = extract.operands[1]
    while row.defining_op is not None and row.defining_op.name == "arith.cast":
        row = row.defining_op.operands[0]
    return next((i for i, arg in enumerate(op.body.args) if arg is row and op["maps"][i] is not None), None)


def ask_for_rows(e: Emitter, table: Value, source: Value, numbers: Value, count: Dim, at: Dim, column: Dim, width: int) -> None:
    """Asks for `width` elements from `column` on of the row of `table`, a buffer of the tensor `source`, whose number lies AHEAD behind `at` in
    the buffer `numbers` of `count` elements."""
    assert isinstance(source.type, TensorType)
    stride, number = source.type.layout[0], e.load(numbers, minimum(at + AHEAD, count - 1))
    start = e.fresh(number, None, None) * stride + substitute(column, {"t1": 0})
    for n in range(0, width, max(1, LINE // source.type.dtype.bytes)):
        e.prefetch(table, start + n, each=True)


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
