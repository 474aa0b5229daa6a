"""Products of bf16 tiles on AMX, the matrix unit of some x86 processors.

A `tile.dot` of left operand (M x 32) and right operand (32 x N) in bf16 onto f32, M and N multiples of 16, becomes M/16 x N/16 `tdpbf16ps`, when both
operands are loads that it alone uses: the left one with rows of contiguous elements, the right one with the two elements of a column and
of two neighbouring rows side by side (`passes/pack.py` makes it so). The unit reads the operands from memory itself. The accumulator stays
in its registers through the loops that carry it, as LLVM's `x86_amx` values; everything else sees an ordinary tile, by way of the stack.
Like the other bf16 instructions of x86 it takes subnormal numbers as zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llvmlite import ir

from ...ir.core import Operation, Value
from ...ir.expr import Dim, substitute
from ...ir.types import TileType
from .intrinsics import call
from .symbolic import Access, position
from .values import I64, PTR, Tile, chunk_type, split_widths

if TYPE_CHECKING:
    from .kernel import KernelEmitter

__all__ = ["DEPTH", "AmxTile", "carried_in_tiles", "emit_amx_dot", "enter", "leave", "matrix_dots"]

SIDE, DEPTH = 16, 32
"""Rows and columns of a tile of f32; steps of K that one instruction sums."""
I16 = ir.IntType(16)
ROWS, ROW_BYTES = I16(SIDE), I16(64)


class AmxType(ir.Type):
    """LLVM's x86_amx: a tile register."""

    def _to_string(self) -> str:
        return "x86_amx"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AmxType)

    def __hash__(self) -> int:
        return hash(AmxType)


AMX = AmxType()


class AmxTile(Tile):
    """An f32 tile in tile registers: `rows[i][j]` is the register of rows 16i.. and columns 16j.. ."""

    def with_values(self, values: Sequence[ir.Value]) -> AmxTile:
        n = self.shape[1] // SIDE
        return AmxTile(self.shape, self.dtype, self.widths, [list(values[i:i + n]) for i in range(0, len(values), n)])


def _step(access: Access, row: int, column: int) -> Dim:
    """The distance of an element from the first one of a tile."""
    at = [substitute(access.offset, {position(0): i, position(1): j}) for i, j in ((0, 0), (row, column))]
    return at[1] - at[0]


def matrix_dots(k: KernelEmitter) -> set[Operation]:
    """The products of the kernel that AMX computes."""
    if not {"amx-bf16", "amx-tile"} <= k.features:
        return set()
    return {op for op in k.kernel.walk() if op.name == "tile.dot" and _suits(k, op)}


def _suits(k: KernelEmitter, dot: Operation) -> bool:
    x, y, acc = (v.type for v in dot.operands)
    assert isinstance(x, TileType) and isinstance(y, TileType) and isinstance(acc, TileType)
    if x.dtype.name != "bf16" or y.dtype.name != "bf16" or acc.dtype.name != "f32" or x.shape[1] != DEPTH:
        return False
    if any(n % SIDE for n in acc.shape):  # type: ignore[operator]
        return False
    for i, v in enumerate(dot.operands[:2]):
        op = v.defining_op
        if op is None or op.name != "tile.load" or k.resolver.accesses[op].pairs or list(v.uses) != [(dot, i)]:
            return False
    left, right = (k.resolver.accesses[v.defining_op] for v in dot.operands[:2])  # type: ignore[index]
    line = _step(left, 1, 0)
    if _step(left, 0, 1) != 1 or any(_step(left, i, DEPTH - 1) - line * i != DEPTH - 1 for i in range(1, acc.shape[0])):  # type: ignore[arg-type]
        return False
    pair = _step(right, 2, 0)
    return _step(right, 1, 0) == 1 and _step(right, 0, 1) == 2 and all(
        _step(right, i, j) - pair * (i // 2) - i % 2 - 2 * j == 0 for i in (1, 2, 3, DEPTH - 2, DEPTH - 1) for j in (0, acc.shape[1] - 1))  # type: ignore[operator]


def _addresses(k: KernelEmitter, load: Operation, rows: int, columns: int, count: tuple[int, int]) -> tuple[list[list[ir.Value]], ir.Value]:
    """Pointers to the blocks of an operand, `rows` x `columns` elements apart, and the distance of their lines in bytes."""
    access = k.resolver.accesses[load]
    base = k.env[load.operands[0]]

    def at(i: int, j: int) -> ir.Value:
        offset = substitute(access.offset, {position(0): i, position(1): j})
        return k.scalars.address(base, I16, k.instantiate(k.facts.simplify(offset)))
    line = _step(access, 2 if rows == 0 else 1, 0)
    return [[at(i * rows, j * columns) for j in range(count[1])] for i in range(count[0])], k.scalars.emit(k.instantiate(line) * 2)


def emit_amx_dot(k: KernelEmitter, dot: Operation, acc: AmxTile) -> AmxTile:
    """acc + left @ right."""
    b = k.b
    m, n = (int(s) // SIDE for s in acc.shape)
    left, right = (v.defining_op for v in dot.operands[:2])
    assert left is not None and right is not None
    a_at, a_line = _addresses(k, left, SIDE, 0, (m, 1))
    b_at, b_line = _addresses(k, right, 0, SIDE, (1, n))

    def load(pointer: ir.Value, line: ir.Value) -> ir.Value:
        return call(b, "llvm.x86.tileloadd64.internal", AMX, [ROWS, ROW_BYTES, pointer, line])
    xs, ys = [load(row[0], a_line) for row in a_at], [load(p, b_line) for p in b_at[0]]
    return AmxTile(acc.shape, acc.dtype, acc.widths, [
        [call(b, "llvm.x86.tdpbf16ps.internal", AMX, [ROWS, ROW_BYTES, ROW_BYTES, acc.rows[i][j], x, y]) for j, y in enumerate(ys)]
        for i, x in enumerate(xs)])


def zero_tiles(k: KernelEmitter, like: Tile) -> AmxTile:
    """Zeros in tile registers."""
    m, n = (int(s) // SIDE for s in like.shape)
    return AmxTile(like.shape, like.dtype, like.widths,
                   [[call(k.b, "llvm.x86.tilezero.internal", AMX, [ROWS, ROW_BYTES]) for _ in range(n)] for _ in range(m)])


def enter(k: KernelEmitter, v: Value, held: Tile) -> AmxTile:
    """What `held` holds of the value `v`, in tile registers."""
    if isinstance(held, AmxTile):
        return held
    op = v.defining_op
    source = op.operands[0].defining_op if op is not None and op.name == "tile.full" else None
    if source is not None and source.name == "arith.constant" and source["value"] == 0:
        return zero_tiles(k, held)
    return from_ordinary(k, held)


def leave(k: KernelEmitter, v: Value, held: AmxTile) -> Tile:
    """The result `v` of a loop, in vectors unless the loop around it goes on in tile registers."""
    users = list(v.users)
    if len(users) == 1 and users[0].name == "tile.yield":
        around = users[0].parent_op
        if around is not None and around.name == "tile.for" and carried_in_tiles(around, k.matrix_dots)[users[0].operands.index(v)]:
            return held
    return ordinary(k, held)


def from_ordinary(k: KernelEmitter, tile: Tile) -> AmxTile:
    """A tile of vectors in tile registers."""
    slot, line = _slot(k, tile), tile.shape[1] * 4
    for i, row in enumerate(tile.rows):
        start = 0
        for value, width in zip(row, tile.widths):
            k.b.store(value, k.b.gep(slot, [I64(i * line + start * 4)], source_etype=ir.IntType(8)), align=4)
            start += width
    return AmxTile(tile.shape, tile.dtype, tile.widths, [
        [call(k.b, "llvm.x86.tileloadd64.internal", AMX, [ROWS, ROW_BYTES, p, I64(line)]) for p in row] for row in _blocks(k, slot, tile)])


def ordinary(k: KernelEmitter, tile: AmxTile) -> Tile:
    """The tile in vectors."""
    slot, line = _slot(k, tile), tile.shape[1] * 4
    for row, pointers in zip(tile.rows, _blocks(k, slot, tile)):
        for value, p in zip(row, pointers):
            call(k.b, "llvm.x86.tilestored64.internal", ir.VoidType(), [ROWS, ROW_BYTES, p, I64(line), value])
    widths = split_widths(tile.shape[1], k.lanes)
    rows = []
    for i in range(tile.shape[0]):
        starts = [sum(widths[:c]) for c in range(len(widths))]
        rows.append([k.b.load(k.b.gep(slot, [I64(i * line + s * 4)], source_etype=ir.IntType(8)), typ=chunk_type(ir.FloatType(), w), align=4)
                     for s, w in zip(starts, widths)])
    return Tile(tile.shape, tile.dtype, widths, rows)


def _slot(k: KernelEmitter, tile: Tile) -> ir.Value:
    slot = k.scratch.private(("amx", tile.shape), tile.shape[0] * tile.shape[1] * 4)
    assert slot.type == PTR
    return slot


def _blocks(k: KernelEmitter, slot: ir.Value, tile: Tile) -> list[list[ir.Value]]:
    m, n = (int(s) // SIDE for s in tile.shape)
    line = tile.shape[1] * 4
    return [[k.b.gep(slot, [I64(i * SIDE * line + j * SIDE * 4)], source_etype=ir.IntType(8)) for j in range(n)] for i in range(m)]


def carried_in_tiles(loop: Operation, dots: set[Operation]) -> list[bool]:
    """For each value that the loop carries: whether it is the accumulator of such products, and nothing else in the loop sees it."""
    result = []
    for i, (v, arg) in enumerate(zip(loop.body.terminator.operands, loop.body.args[1:])):
        result.append(_accumulates(v, arg, dots) and all(_is_link(u, arg, dots) for u in arg.users) and len(loop.results) > i)
    return result


def _accumulates(v: Value, arg: Value, dots: set[Operation]) -> bool:
    op = v.defining_op
    if op is None:
        return False
    if op.name == "tile.for":
        inner = list(op.results).index(v)  # type: ignore[arg-type]
        return op.operands[op["indices"] + inner] is arg and carried_in_tiles(op, dots)[inner] and len(v.uses) == 1
    return op in dots and op.operands[2] is arg and len(v.uses) == 1


def _is_link(user: Operation, arg: Value, dots: set[Operation]) -> bool:
    return user in dots or user.name == "tile.for"
