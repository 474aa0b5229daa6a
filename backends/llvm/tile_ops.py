"""Tile and arith ops that need no control flow, one function each: `LOWERINGS[op.name](k, op)` puts the op's value into
`k.env`.

Elementwise ops run chunk by chunk with broadcasting; a chunk that several rows share is computed once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llvmlite import ir

from ...ir.core import Operation
from ...ir.expr import Dim, as_int, free_symbols, maximum, substitute, sym
from ...ir.ranges import split_linear
from ...ir.types import DTYPES, BufferType, DType, ScalarType, TileType, element_type
from . import arith
from .access import AccessChunk, Accessor, broadcast_row, emit_load, emit_store, full_mask, row_coordinates
from .amx import AmxTile, emit_amx_dot, enter, leave
from .convert import emit_cast
from .dot import GroupTile, emit_dot, round_to_bf16, takes_groups
from .intrinsics import call
from .masks import LaneChunk
from .shapes import emit_reduce, emit_reshape, emit_transpose
from .sort import sort_rows
from .symbolic import position
from .values import I32, Tile, chunk_type, concat, constant, memory_type, register_type, slice_chunk, splat, with_widths

if TYPE_CHECKING:
    from .kernel import KernelEmitter

__all__ = ["LOWERINGS", "elementwise"]

INDEX = DTYPES["index"]
SIDE_BY_SIDE = frozenset({"exp", "exp2", "expm1", "sigmoid", "tanh", "sinh", "cosh", "log", "log2", "log10", "log1p", "erf"})
"""Long chains of dependent operations, without a branch: one chunk's do not fill the processor, so those of several are woven into each other."""
CHUNKS = 4


def elementwise(k: KernelEmitter, op: Operation) -> None:
    name = op.name.partition(".")[2]
    operands = [k.value(v) for v in op.operands]
    source = element_type(op.operands[-1].type)
    target = element_type(op.result.type)

    def apply(*xs: ir.Value) -> ir.Value:
        if name == "cast":
            if k.rounds_bf16 and (source.name, target.name) == ("f32", "bf16") and xs[0].type == chunk_type(ir.FloatType(), 16):
                return round_to_bf16(k.b, xs[0])
            return emit_cast(k.b, xs[0], source.name, target.name)
        if name == "select":
            return k.b.select(*xs)
        return arith.emit(k.b, k.features, name, source, *xs, fast=bool(op.attributes.get("_approximate")))

    t = op.result.type
    if isinstance(t, ScalarType):
        if op.result not in k.resolver.exprs:
            k.env[op.result] = apply(*operands)
        return
    assert isinstance(t, TileType)
    widths = k.layout(op.result)
    shape: tuple[int, ...] = t.shape  # type: ignore[assignment]
    operands = [with_widths(k.b, x, widths) if isinstance(x, Tile) and x.shape[-1] == shape[-1] else x for x in operands]
    memo: dict[tuple[int, ...], ir.Value] = {}
    splats: dict[tuple[int, int], ir.Value] = {}

    def chunk(x: Any, at: tuple[int, ...], c: int) -> ir.Value:
        if isinstance(x, Tile):
            row = x.rows[broadcast_row(at, x.shape)]
            if x.shape[-1] == shape[-1]:
                return row[c]
            x = row[0]
        key = (id(x), widths[c])
        if key not in splats:
            splats[key] = splat(k.b, x, widths[c])
        return splats[key]

    together = CHUNKS if name in SIDE_BY_SIDE and source.bits <= 32 else 1
    rows = []
    for at in row_coordinates(shape):
        given = [[chunk(x, at, c) for x in operands] for c in range(len(widths))]
        new = {tuple(map(id, xs)): (c, xs) for c, xs in enumerate(given) if tuple(map(id, xs)) not in memo}
        for width in dict.fromkeys(widths):
            keys = [key for key, (c, _) in new.items() if widths[c] == width]
            for n in range(0, len(keys), together):
                part = keys[n:n + together]
                part = part if width > 1 and len(part) in (2, CHUNKS) else []
                made = apply(*(concat(k.b, xs) for xs in zip(*(new[key][1] for key in part), strict=True))) if part else None
                for i, key in enumerate(part or keys[n:n + together]):
                    memo[key] = apply(*new[key][1]) if made is None else slice_chunk(k.b, made, i * width, width)
        rows.append([memo[tuple(map(id, xs))] for xs in given])
    k.env[op.result] = Tile(shape, target, widths, rows)


def constant_value(k: KernelEmitter, op: Operation) -> None:
    if op.result not in k.resolver.exprs:
        k.env[op.result] = constant(op["value"], element_type(op.result.type))


def full_tile(k: KernelEmitter, op: Operation) -> None:
    t = op.result.type
    assert isinstance(t, TileType)
    shape: tuple[int, ...] = t.shape  # type: ignore[assignment]
    widths = k.layout(op.result)
    x = k.tile(op.operands[0])
    if x.shape[-1] == shape[-1]:
        rows = with_widths(k.b, x, widths).rows
    else:
        rows = []
        for row in x.rows:
            splats = {w: splat(k.b, row[0], w) for w in dict.fromkeys(widths)}
            rows.append([splats[w] for w in widths])
    sizes = x.shape if len(x.shape) == len(shape) else (1,) * len(shape)
    k.env[op.result] = Tile(shape, t.dtype, widths, [list(rows[broadcast_row(at, sizes)]) for at in row_coordinates(shape)])


def mask_tile(k: KernelEmitter, op: Operation) -> None:
    """An i1 tile of where the pairs hold; constant where that is proved."""
    access = k.resolver.accesses[op]
    scalar = not isinstance(op.result.type, TileType)
    widths = (1,) if scalar else k.layout(op.result)
    rows = [[_mask_chunk(k, c) for c in row] for row in Accessor(k, op, widths).rows()]
    k.env[op.result] = rows[0][0] if scalar else Tile(access.shape, DTYPES["i1"], widths, rows)


def _mask_chunk(k: KernelEmitter, c: AccessChunk) -> ir.Value:
    return full_mask(k.b, *c.lanes.mask(c.gaps), c.lanes.width)


def index_value(k: KernelEmitter, op: Operation) -> None:
    """A scalar index stays symbolic; a tile is a base plus a constant vector where the expression is linear."""
    t, dtype = op.result.type, element_type(op.result.type)
    e = k.instantiate(k.resolver.exprs[op.result])
    if isinstance(t, ScalarType):
        if dtype.name not in ("i64", "index"):
            k.env[op.result] = emit_cast(k.b, k.scalars.emit(e), "i64", dtype.name)
        return
    assert isinstance(t, TileType)
    shape: tuple[int, ...] = t.shape  # type: ignore[assignment]
    widths = k.layout(op.result)
    last = position(len(shape) - 1)
    held = {s: k.tile(k.resolver.values[s]) for s in free_symbols(e) if s[:2] == "%g"}
    wide = {s: with_widths(k.b, x, widths) for s, x in held.items() if x.shape[-1] > 1}
    rows = []
    for at in row_coordinates(shape):
        env: dict[str, Dim] = {position(d): n for d, n in enumerate(at)}
        env |= {s: sym(f"{s}@{broadcast_row(at, x.shape)}") for s, x in held.items() if s not in wide}
        here = substitute(e, env)
        row, start = [], 0
        for c, w in enumerate(widths):
            vectors = {s: _index_vector(k, x, broadcast_row(at, x.shape), c) for s, x in wide.items()}
            row.append(_index_chunk(k, LaneChunk(k.scalars, last, start, w, shape[-1], vectors), here, dtype))
            start += w
        rows.append(row)
    k.env[op.result] = Tile(shape, dtype, widths, rows)


def _index_vector(k: KernelEmitter, x: Tile, row: int, c: int) -> Callable[[], ir.Value]:
    return lambda: k.widen_index(x.rows[row][c], x.dtype)


def _index_chunk(k: KernelEmitter, lanes: LaneChunk, e: Dim, dtype: DType) -> ir.Value:
    b = k.b
    low, high = k.facts.inside(lanes.position, 0, lanes.size - 1).range_of(e)
    narrow = low is not None and high is not None and low >= -(1 << 31) and high < 1 << 31
    work = DTYPES["i32"] if narrow or (dtype.is_integer and dtype.bits <= 32) else INDEX  # i32 wraps alike
    type_ = register_type(work)

    def fit(v: ir.Value) -> ir.Value:
        have = v.type.element.width if isinstance(v.type, ir.VectorType) else v.type.width
        to = chunk_type(type_, lanes.width)
        if have == type_.width:
            return v
        return b.trunc(v, to) if have > type_.width else b.sext(v, to)

    if lanes.width == 1 and not lanes.vectors:
        value = k.scalars.emit(lanes.at(e, 0))
        value = b.trunc(value, type_) if type_ == I32 else value
    else:
        shared, vector = lanes.index(e)
        base = k.scalars.emit(shared)
        base = b.trunc(base, type_) if type_ == I32 else base
        value = b.add(fit(vector), splat(b, base, lanes.width))
    return emit_cast(b, value, work.name, dtype.name)


def private_buffer(k: KernelEmitter, op: Operation) -> None:
    t = op.result.type
    assert isinstance(t, BufferType)
    span = sum((n - 1) * s for n, s in zip(t.shape, t.layout)) + 1
    k.env[op.result] = k.scratch.private(op, maximum(1, span * t.dtype.bytes))


def _reads_groups(k: KernelEmitter, op: Operation) -> bool:
    """Rows that lie element by element beside each other in memory, for products that take several steps of K at once."""
    t, access = op.result.type, k.resolver.accesses[op]
    if not isinstance(t, TileType) or t.rank != 2 or access.pairs or t.shape[1] % k.lanes:  # type: ignore[operator]
        return False
    across, down = (split_linear(access.offset, position(d)) for d in (1, 0))
    if across is None or across[0] != t.shape[0] or down is None or down[0] != 1:
        return False
    return all(u.name == "tile.dot" and u.operands[1] is op.result and op.result not in (u.operands[0], u.operands[2])
               and takes_groups(k.features, element_type(u.operands[0].type), t.dtype, element_type(u.result.type), as_int(t.shape[0]))
               for u in op.result.users)


def _load_groups(k: KernelEmitter, op: Operation) -> GroupTile:
    t = op.result.type
    assert isinstance(t, TileType)
    access = Accessor(k, op, k.layout(op.result))
    width, depth = k.lanes, as_int(t.shape[0])
    at = [substitute(access.offset, {position(0): 0, position(1): n}) for n in range(0, as_int(t.shape[1]), width)]
    lane = ir.IntType(depth * t.dtype.bits)
    vectors = [k.b.load(access.address(offset), align=t.dtype.bytes, typ=chunk_type(lane, width)) for offset in at]
    return GroupTile(t.shape, t.dtype, (width,) * len(vectors), [vectors])  # type: ignore[arg-type]


def load(k: KernelEmitter, op: Operation) -> None:
    if any(u in k.matrix_dots for u in op.result.users):
        return  # the product reads it
    if _reads_groups(k, op):
        k.env[op.result] = _load_groups(k, op)
        return
    k.env[op.result] = emit_load(k, op)


def prefetch(k: KernelEmitter, op: Operation) -> None:
    """A prefetch to all cache levels, or past the outer ones of what is read once; in unrolled code for the first copy alone unless they ask for
    each, and none in code for edges."""
    if k.cold or k.copy and not op["each"]:
        return
    buffer = op.operands[0]
    at = k.instantiate(k.facts.simplify(k.resolver.accesses[op].offset))
    address = k.scalars.address(k.env[buffer], memory_type(element_type(buffer.type)), at)
    call(k.b, "llvm.prefetch.p0", ir.VoidType(), [address, I32(0), I32(0 if op["once"] else 3), I32(1)])  # to read, locality, data


def dot(k: KernelEmitter, op: Operation) -> None:
    if op in k.matrix_dots:
        held = k.value(op.operands[2])
        made = emit_amx_dot(k, op, enter(k, op.operands[2], held))
        k.env[op.result] = made if isinstance(held, AmxTile) else leave(k, op.result, made)
        return
    x, y, acc = (k.value(v) for v in op.operands)
    acc = with_widths(k.b, acc, k.layout(op.result))
    k.env[op.result] = emit_dot(k.b, k.features, x, y, acc)


def reduce(k: KernelEmitter, op: Operation) -> None:
    x = k.value(op.operands[0])
    k.env[op.result] = emit_reduce(k.b, k.features, x, op["axis"], op["kind"], k.layout(op.result))


def reshape(k: KernelEmitter, op: Operation) -> None:
    t = op.result.type
    assert isinstance(t, TileType)
    k.env[op.result] = emit_reshape(k.b, k.tile(op.operands[0]), t.shape, k.layout(op.result))  # type: ignore[arg-type]


def transpose(k: KernelEmitter, op: Operation) -> None:
    k.env[op.result] = emit_transpose(k.b, k.value(op.operands[0]), k.layout(op.result))


def require(k: KernelEmitter, op: Operation) -> None:
    """The value as it is; the condition is tested chunk by chunk."""
    for row in k.tile(op.operands[0]).rows:
        for chunk in row:
            k.report(op, chunk)
    k.env[op.result] = k.value(op.operands[1])


def symbolic(k: KernelEmitter, op: Operation) -> None:
    """Nothing to do: the value is an expression."""


LOWERINGS: dict[str, Callable[[KernelEmitter, Operation], None]] = {
    "arith.constant": constant_value, "tile.program_id": symbolic, "tile.load": load, "tile.store": emit_store,
    "tile.index": index_value,
    "tile.mask": mask_tile, "tile.full": full_tile, "tile.reduce": reduce, "tile.reshape": reshape, "tile.transpose": transpose,
    "tile.dot": dot, "tile.require": require, "tile.prefetch": prefetch, "tile.alloca": private_buffer,
    "tile.sort": sort_rows,
}
