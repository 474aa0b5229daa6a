"""Scatters and scans as kernels: computations whose points depend on each other's order.

Scatter: the result holds a copy of `init` when the kernel starts (`updates`; where nobody else wants `init` it is made there and nothing is copied),
or, where the two lie in different order, the kernel copies it first. Then points are visited in row-major order. Result dimensions that the body
indexes by a plain iteration position of their own (the feature dimension of an embedding gradient, say) carry no collisions: they are split over
programs and vectors, each program updating its own slice. The other points run in order inside the program.
On GPUs, where eager promises no order either, all points run in parallel instead, and combine atomically.
Scan: one program per row, the running value carried through a loop along the last dimension; on GPUs, a tile at a time.
"""

from __future__ import annotations

from typing import Any

from ...ir import Dim, DType, Operation, Target, TensorType, TileType, Value, element_type, sym
from ...ir.dialects.tensor import fill_of
from ...ir.expr import ceildiv, free_symbols, substitute
from ...ir.ranges import simplify
from ...ir.types import index
from ..structured import body_ops
from .emit import COMBINE_OPS, Emitter, Pair, emit_extract, fill_masks, identity_of
from .gpu_tiles import padded

__all__ = ["body_values", "dot_of", "emit_parallel_scatter", "emit_scan", "emit_scatter", "own_dims", "scatters_in_parallel", "starts_as_copy"]

_ATOMIC = {"add": ("f32", "f64", "i32", "i64"), "max": ("i32", "i64"), "min": ("i32", "i64")}
"""What GPUs combine atomically."""
PROGRAMS = 8
"""Programs that a dimension is cut into at least, where it is cut into wide ones."""
_TILE = 1024
"""Points per program of a parallel scatter."""


def body_values(e: Emitter, op: Operation, buffers: dict[Value, Value], at: dict[str, Dim], active: list[Pair], lead: int = 0) -> list[Value]:
    """The yielded values of the op's body at a position."""
    local: dict[Value, Value] = {}
    bounds = e.bounds()
    with e.builder.at(op.location):
        for i, (v, m, arg) in enumerate(zip(op.operands[lead:], op["maps"], op.body.args, strict=True)):
            if m is None:
                continue
            assert isinstance(v.type, TensorType)
            offset: Dim = 0
            for x, stride in zip(m, v.type.layout, strict=True):
                offset = offset + substitute(x, at) * stride
            fill = fill_of(op, i)
            pairs, low = fill_masks(m, v.type.shape, at, bounds) if fill is not None else ([], [])
            offset = simplify(offset, bounds)
            moving = {"t0", "t1"} & free_symbols(offset).union(*(free_symbols(x) for x, _ in pairs))
            mask = [*pairs, *(p for p in e.needed(active) if free_symbols(p[0]) & moving)]  # what all lanes read alike stays one element
            local[arg] = e.load(buffers[v], offset, mask, low, 0 if fill is None else fill)
        for inner in body_ops(op):
            if inner.name == "tensor.index":
                local[inner.result] = e.index_value(at[f"d{inner['dim']}"])
            elif inner.name == "tensor.sym":
                local[inner.result] = e.index_value(inner["expr"])
            elif inner.name == "tensor.extract":
                source = op.operands[lead + inner.operands[0].index]  # type: ignore[attr-defined]
                local[inner.result] = emit_extract(e, buffers[source], source, [local[v] for v in inner.operands[1:]], inner["check"], active)
            elif inner.name == "tensor.require":
                local[inner.result] = e.require(inner, [local[v] for v in inner.operands], active)
            else:
                local[inner.result] = e.arith(inner, [local[v] for v in inner.operands])
    return [local[v] for v in op.body.terminator.operands]


def own_dims(op: Operation) -> dict[int, int]:
    """Result dimension -> iteration dimension, where the body's index is that plain position, from 0 to the whole size."""
    result = op.result.type
    assert isinstance(result, TensorType)
    own: dict[int, int] = {}
    for j, v in enumerate(op.body.terminator.operands[1:]):
        d = v.defining_op
        if d is not None and d.name == "tensor.index" and op["dims"][d["dim"]] == result.shape[j] and d["dim"] not in own.values():
            own[j] = d["dim"]
    return own


def emit_scatter(op: Operation, e: Emitter, buffers: dict[Value, Value], out: Value, lanes: int, there: bool) -> list[Dim]:
    """Writes the kernel into `e`; returns the grid. `out` is the buffer of the result; `there`: it holds `init` already."""
    result, init = op.result.type, op.operands[0]
    assert isinstance(result, TensorType) and isinstance(init.type, TensorType)
    init_layout = init.type.layout
    own = own_dims(op)
    vector = next((j for j in sorted(own, reverse=True) if result.layout[j] == 1), None)
    lanes = _columns(lanes, result.shape[vector]) if vector is not None else lanes
    e = Emitter(e.builder, (1, lanes), e.symbols, e.variables, e.ranges, e.coarse)
    grid: list[Dim] = []
    fixed: dict[int, Dim] = {}
    active: list[Pair] = []
    for j in sorted(own):
        width = lanes if j == vector else 1
        programs = ceildiv(result.shape[j], width)
        p = e.fresh(e.builder.op("tile.program_id", type=index, axis=len(grid)), 0, programs - 1)
        fixed[j] = p * width + sym("t1") if j == vector else p
        if j == vector:
            active.append((fixed[j], result.shape[j]))
        grid.append(programs)

    def copy(inner: Emitter, todo: list[int], at: dict[int, Dim]) -> None:
        if todo:
            def body(deeper: Emitter, i: Dim, _: list[Value]) -> list[Value]:
                copy(deeper, todo[1:], {**at, todo[0]: i})
                return []
            inner.loop(0, result.shape[todo[0]], 1, [], body)
            return
        index_of = [at[j] for j in range(result.rank)]
        value = inner.load(buffers[init], dot_of(index_of, init_layout, inner), inner.needed(active))
        inner.store(out, value, dot_of(index_of, result.layout, inner), inner.needed(active))

    if not there:
        copy(e, [j for j in range(result.rank) if j not in fixed], dict(fixed))
    position = {own[j]: fixed[j] for j in own}

    def visit(inner: Emitter, todo: list[int], at: dict[int, Dim]) -> None:
        if todo:
            def body(deeper: Emitter, i: Dim, _: list[Value]) -> list[Value]:
                visit(deeper, todo[1:], {**at, todo[0]: i})
                return []
            inner.loop(0, op["dims"][todo[0]], 1, [], body)
            return
        _update(op, inner, buffers, out, {f"d{d}": x for d, x in at.items()}, own, fixed, active)

    visit(e, [d for d in range(len(op["dims"])) if d not in position], dict(position))
    return grid


def _columns(lanes: int, size: Dim) -> int:
    """How many columns a program takes that walks along others: some lines, so that each visit uses all of them, but not so many that few programs
    are left to share."""
    return next((lanes * n for n in (8, 4, 2) if isinstance(size, int) and size >= PROGRAMS * lanes * n), lanes)


def starts_as_copy(op: Operation) -> bool:
    """A scatter's result may start as a plain copy of `init`."""
    init, result = op.operands[0].type, op.result.type
    assert isinstance(result, TensorType) and isinstance(init, TensorType)
    return init.layout == result.layout and result.strides is None


def scatters_in_parallel(op: Operation, target: Target) -> bool:
    """The points may run in any order on this target, and its result may start as a copy of the bytes of `init`."""
    init, result = op.operands[0].type, op.result.type
    assert isinstance(result, TensorType) and isinstance(init, TensorType)
    if not target.is_gpu or "deterministic" in target.features or init.layout != result.layout:
        return False
    return op["combine"] == "set" or result.dtype.name in _ATOMIC.get(op["combine"], ())


def emit_parallel_scatter(op: Operation, e: Emitter, buffers: dict[Value, Value], out: Value) -> list[Dim]:
    """Writes the kernel into `e`; returns the grid. The buffer `out` of the result holds `init`."""
    dims, own = op["dims"], own_dims(op)
    result = op.result.type
    assert isinstance(result, TensorType)
    vector = next((d for j, d in own.items() if result.layout[j] == 1), len(dims) - 1)
    columns = min(_TILE, padded(dims[vector], 1)) if dims and isinstance(dims[vector], int) else 256
    others = [d for d in range(len(dims)) if d != vector]
    row = max(others, key=lambda d: dims[d] if isinstance(dims[d], int) else _TILE, default=None)
    rows = 1 if row is None else min(_TILE // columns, padded(dims[row], 1) if isinstance(dims[row], int) else _TILE)
    e = Emitter(e.builder, (rows, columns), e.symbols, e.variables, e.ranges, e.coarse)
    at: dict[str, Dim] = {}
    active: list[Pair] = []
    grid: list[Dim] = []
    for d, size in enumerate(dims):
        per, within = (columns, sym("t1")) if d == vector else (rows, sym("t0")) if d == row else (1, None)
        grid.append(ceildiv(size, per))
        p = e.fresh(e.builder.op("tile.program_id", type=index, axis=d), 0, grid[-1] - 1)
        at[f"d{d}"] = p if within is None else p * per + within
        if within is not None:
            active.append((at[f"d{d}"], size))
    _update(op, e, buffers, out, at, own, {j: at[f"d{d}"] for j, d in own.items()}, active, atomic=True)
    return grid


def _update(op: Operation, e: Emitter, buffers: dict[Value, Value], out: Value, at: dict[str, Dim], own: dict[int, int],
            fixed: dict[int, Dim], active: list[Pair], *, atomic: bool = False) -> None:
    """out[index] = combine(out[index], value) at one point, perhaps atomically; a bad index is reported and skipped."""
    value, *indices = body_values(e, op, buffers, at, active, lead=1)
    result = op.result.type
    assert isinstance(result, TensorType)
    here = e.mask_value([p for p in active if free_symbols(p[0]) & {"t0", "t1"}])
    extra = [e.builder.arith("select", here, v, 0) if here is not None and isinstance(v.type, TileType) else v
             for j, v in enumerate(indices) if j not in own]
    number = {j: k for k, j in enumerate(j for j in range(result.rank) if j not in own)}
    init = op.operands[0]
    offset: Dim = 0
    first: Dim = 0
    for j, (stride, read) in enumerate(zip(result.layout, init.type.layout, strict=True)):  # type: ignore[attr-defined]
        offset = offset + (fixed[j] if j in own else sym(f"i{number[j]}")) * stride
        first = first + (0 if j in own else sym(f"i{number[j]}")) * read
    pairs = [(sym(f"i{k}"), result.shape[j]) for j, k in number.items()]
    low = [sym(f"i{k}") for k in number.values()]
    mask = [*pairs, *e.needed(active)]
    shapes = [v.type.shape for v in extra if isinstance(v.type, TileType)]
    extra_shape = tuple(max(x) for x in zip(*shapes, strict=True)) if shapes else ()
    if pairs:  # reports a bad index; the value is not used. From init: other programs may be writing this element of the result
        e.load(buffers[init], first, pairs, low, 0, extra=extra, extra_shape=extra_shape, check=True)
    kind = op["combine"]
    # In parallel every lane is a point, also where all go to one place with one value.
    shape: tuple[int, ...] = e.shape if atomic else _shape(e, [offset, *(p[0] for p in mask)], extra_shape)
    if not atomic and kind != "set":
        old = e.load(out, simplify(offset, e.bounds()), mask, low, 0, extra=extra, extra_shape=extra_shape)
        value = e.builder.arith({"add": "add", "mul": "mul", "max": "max", "min": "min"}[kind] if element_type(value.type).kind != "bool" else
                                {"add": "or", "mul": "and", "max": "or", "min": "and"}[kind], old, value)
    operands, names = e._operands([offset, *(x for p in mask for x in p)], extra)
    if shape and (not isinstance(value.type, TileType) or value.type.shape != shape):
        value = e.broadcast(value, shape)  # type: ignore[arg-type]
    attrs: dict[str, Any] = {"offset": substitute(simplify(offset, e.bounds()), names),
                             "mask": tuple((substitute(a, names), substitute(b, names)) for a, b in mask)}
    if low:
        attrs["mask_low"] = tuple(low)
    if atomic and kind != "set":
        attrs["atomic"] = kind
    e.builder.create("tile.store", [out, value, *operands], attrs)


def _shape(e: Emitter, exprs: list[Dim], extra_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of what is stored: the tile that the expressions span, with the index tiles."""
    shape = e.tile_shape(exprs)
    return tuple(max(a, b) for a, b in zip(shape or (1, 1), extra_shape, strict=True)) if extra_shape else shape


def dot_of(index_of: list[Dim], layout: tuple[Dim, ...], e: Emitter) -> Dim:
    """The offset of an element."""
    total: Dim = 0
    for i, s in zip(index_of, layout, strict=True):
        total = total + i * s
    return simplify(total, e.bounds())


def emit_scan(op: Operation, e: Emitter, buffers: dict[Value, Value], out: Value, lanes: int, *, accumulate: DType | None = None,
              by_tiles: bool = False) -> list[Dim]:
    """Writes the kernel into `e`; returns the grid. Sums and products of floats run in `accumulate` (none: in the result's type)."""
    result = op.result.type
    assert isinstance(result, TensorType)
    dims = op["dims"]
    rank = len(dims)
    vector = next((j for j in range(rank - 1) if result.layout[j] == 1 and dims[j] != 1), None)
    if not by_tiles and vector is not None:
        lanes = _columns(lanes, dims[vector])
        e = Emitter(e.builder, (1, lanes), e.symbols, e.variables, e.ranges, e.coarse)
    at: dict[str, Dim] = {}
    active: list[Pair] = []
    grid: list[Dim] = []
    for j in range(rank - 1):
        width = lanes if j == vector else 1
        programs = ceildiv(dims[j], width)
        p = e.fresh(e.builder.op("tile.program_id", type=index, axis=len(grid)), 0, programs - 1)
        at[f"d{j}"] = p * width + sym("t1") if j == vector else p
        if j == vector:
            active.append((at[f"d{j}"], dims[j]))
        grid.append(programs)
    kind = op["kind"]
    if by_tiles and vector is None and kind in ("sum", "prod", "max", "min") and result.dtype.kind != "bool":
        _scan_by_tiles(op, e, buffers, out, at)
        return grid
    dtype = accumulate if accumulate is not None and result.dtype.is_float and kind in ("sum", "prod", "logsumexp") else result.dtype
    start: Any = identity_of("max", dtype) if kind == "logsumexp" else identity_of(kind, dtype)
    shape = (1, lanes) if vector is not None else (1, 1)
    init = e.broadcast(e.builder.constant(start, dtype), shape)

    def body(inner: Emitter, i: Dim, carried: list[Value]) -> list[Value]:
        here = {**at, f"d{rank - 1}": i}
        value, = body_values(inner, op, buffers, here, active)
        b = inner.builder
        if dtype != result.dtype:
            value = b.cast(value, dtype)
        if kind == "logsumexp":
            top = b.arith("max", carried[0], value)
            gap = b.arith("neg", b.arith("abs", b.arith("sub", carried[0], value)))
            both = b.arith("add", top, b.arith("log1p", b.arith("exp", gap)))
            running = b.arith("select", b.arith("eq", carried[0], value), b.arith("select", b.arith("isinf", top), top, both), both)
        else:
            running = b.arith(COMBINE_OPS[kind], carried[0], value)
        if not isinstance(running.type, TileType) or running.type.shape != shape:
            running = inner.broadcast(running, shape)
        index_of = [here[f"d{j}"] for j in range(rank)]
        rounded = running if dtype == result.dtype else b.cast(running, result.dtype)
        inner.store(out, rounded, dot_of(index_of, result.layout, inner), inner.needed(active))
        return [running]

    e.loop(0, dims[-1], 1, [init], body)
    return grid


def _scan_by_tiles(op: Operation, e: Emitter, buffers: dict[Value, Value], out: Value, at: dict[str, Dim]) -> None:
    """One row: tiles of it are scanned at once, each from where the one before ended."""
    result, kind = op.result.type, op["kind"]
    assert isinstance(result, TensorType)
    length, last = op["dims"][-1], f"d{len(op['dims']) - 1}"
    width = min(2048, padded(length, 2)) if isinstance(length, int) else 2048
    wide = Emitter(e.builder, (1, width), e.symbols, e.variables, e.ranges, e.coarse)
    one, whole = TileType((1, 1), result.dtype), TileType((1, width), result.dtype)
    init = wide.broadcast(e.builder.constant(identity_of(kind, result.dtype), result.dtype), (1, 1))

    def body(inner: Emitter, i: Dim, carried: list[Value]) -> list[Value]:
        b = inner.builder
        here = {**at, last: i + sym("t1")}
        active = [(here[last], length)]
        value, = body_values(inner, op, buffers, here, active)
        mask = inner.mask_value(active)
        if mask is not None:
            value = b.arith("select", mask, value, identity_of(kind, result.dtype))
        if value.type != whole:
            value = inner.broadcast(value, (1, width))
        running = b.arith(COMBINE_OPS[kind], carried[0], b.op("tile.scan", value, type=whole, axis=1, kind=kind))
        inner.store(out, running, dot_of([here[f"d{j}"] for j in range(len(op["dims"]))], result.layout, inner), inner.needed(active))
        return [b.arith(COMBINE_OPS[kind], carried[0], b.op("tile.reduce", value, type=one, axis=1, kind=kind))]

    wide.loop(0, length, width, [init], body)
