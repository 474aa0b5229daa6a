"""Streams (see `passes/stream.py`) as kernels: what both targets share, and the GPU's form.

One program computes a block of rows: it walks the stream in steps; a step makes one tile of the middle space, folds it into the running reductions,
rescales what depends on a reduction that moved, and adds its product to the running second contractions. Steps that are masked throughout
are outside the loops; steps that are masked nowhere run in a loop of their own without the mask.

    running maximum   m' = max(m, max(x))        x: the tile of scores
    running sum       l' = l * exp(m - m') + sum(exp(x - m'))
    second            a' = a * exp(m - m') + exp(x - m') @ v

Where m' is -inf (nothing but masked scores so far) 0 stands for it, so that exp(-inf - m') is 0 and not NaN. What leaves the kernel is
the true maximum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ...ir import Dim, DType, Operation, Target, TensorType, TileType, Value, element_type, sym
from ...ir.dialects.tensor import fill_of
from ...ir.expr import Max, arguments, as_int, ceildiv, floordiv, free_symbols, maximum, minimum, product, substitute
from ...ir.ranges import delinearize, known_less, lower_bound, simplify, split_linear, upper_bound
from ...ir.types import DTYPES, index
from ..block_ranges import BLOCK, worth_ranges
from ..score_bound import bound_of
from ..stream import Stream
from ..stream_access import reduced_order, stream_side
from ..structured import body_ops, identity_of
from .emit import COMBINE_OPS, Emitter, Pair, emit_extract, fill_masks
from .frame import is_expensive
from .gpu_tiles import GpuTile, padded
from .stream_tiles import other_tiles, spread_rows, tile_of_several
from .turned import turned

F32 = DTYPES["f32"]
LOG2_E = 1.4426950408889634

_COARSE = {"arith.exp": "exp", "arith.tanh": "tanh", "arith.div": "div", "arith.log": "log"}
"""Methods that compute an op in the cheap way that suits 16-bit inputs."""

__all__ = ["GpuStream", "Scope", "StreamLowering", "offset_in", "stream_tile", "stream_tiles", "suits_warp_groups", "with_shape"]


def stream_tile(s: Stream, target: Target) -> GpuTile:
    """Rows and steps (the columns) of one tile of the middle space."""
    width = max(padded(product(s.columns)), *(padded(_width(op)) for op in s.firsts))
    narrow = all(_narrow(s, op) is not None for op in (*s.firsts, *s.seconds))
    if len(s.firsts) > 1:
        widest = max(element_type(v.type).bytes for op in (*s.firsts, *s.seconds) for v in op.operands if not s.kind_of(v))
        t = tile_of_several(target, width, 2 if narrow else widest, len(s.firsts), len(s.seconds))
        rows, steps = (n if not isinstance(size, int) else min(n, padded(size)) for n, size in ((t.rows, s.row_count), (t.columns, s.length)))
        return GpuTile(rows, steps, 0, t.warps, t.stages)
    if suits_warp_groups(s, target):
        # Where data leave few steps, and these end anywhere, half as long ones compute less that is masked (measured: 366 -> 282 us).
        return GpuTile(128, BLOCK if worth_ranges(s) else 128, 0, 8, 2)
    if narrow and isinstance(s.row_count, int) and s.row_count <= 16:  # bound by memory: three tiles under way, small ones for a smooth start
        return GpuTile(16, 64 if width <= 128 else 32, 0, 4, 3)
    kept = len(s.firsts) + len(s.seconds)  # tiles that stay in registers or shared memory
    heavy = any(is_expensive(op) for op in s.reductions + s.firsts) or len(s.full) > 2 or kept > 3
    rows = 128 if narrow and not heavy else 64
    steps = (64 if heavy else 128) if narrow and width <= 128 else 32
    rows, steps = (n if not isinstance(size, int) else min(n, padded(size)) for n, size in ((rows, s.row_count), (steps, s.length)))
    batch = product(s.sizes[f] for f in s.batch)
    if narrow and isinstance(s.row_count, int) and isinstance(batch, int) and not worth_ranges(s):  # ranges are those of blocks of rows
        rows = spread_rows(target, rows, s.row_count, batch)
    return GpuTile(rows, steps, 0, 8 if rows * width >= 128 * 128 else 4, 3 if narrow else 2)


def stream_tiles(s: Stream, target: Target) -> list[GpuTile]:
    """The tile that is modelled, and what is worth measuring beside it (`mode="max-autotune"`): shorter and longer steps, fewer and more rows."""
    first = stream_tile(s, target)
    width = max(padded(product(s.columns)), *(padded(_width(op)) for op in s.firsts))
    element = max(element_type(v.type).bytes for op in (*s.firsts, *s.seconds) for v in op.operands if not s.kind_of(v))
    return [first, *(t for t in other_tiles(target, first, width, element, s.row_count, s.length) if t != first)]


def suits_warp_groups(s: Stream, target: Target) -> bool:
    """Hopper's schedule of `backends/triton/warp_groups.py` fits, and there are programs enough for its large tiles."""
    if target.capability != 90 or len(s.firsts) != 1 or len(s.seconds) != 1 or any(_narrow(s, op) is None for op in (*s.firsts, *s.seconds)):
        return False
    sizes = [s.sizes[f] for f in s.batch]
    if not all(isinstance(n, int) for n in (*sizes, s.row_count, s.length)) or as_int(s.row_count) % 128 or as_int(s.length) % 128:
        return False
    programs = as_int(product(sizes)) * (as_int(s.row_count) // 128)
    return _width(s.firsts[0]) in (64, 128) and product(s.columns) in (64, 128) and 4 * programs >= 3 * max(1, target.multiprocessors)


def _width(op: Operation) -> int:
    """Elements of the dimension that a first contraction sums over."""
    return int(product(op["dims"][len(op["dims"]) - op["reductions"]:]))  # type: ignore[arg-type]


@dataclass
class Scope:
    """Where values are computed: the position of each frame dimension, lane masks, and what is known or made already."""

    e: Emitter
    at: dict[str, Dim]
    active: list[Pair]
    values: dict[Value, Value] = field(default_factory=dict)
    loads: dict[Any, Value] = field(default_factory=dict)
    known: dict[Value, bool] = field(default_factory=dict)
    units: set[Value] = field(default_factory=set)  # constants 1 that stand for row values


class StreamLowering:
    """Evaluation of members at a point, for either target."""

    def __init__(self, s: Stream, outputs: Sequence[Value], e: Emitter, buffers: dict[Value, Value], tile: tuple[int, int],
                 relaxed: bool = True, limits: Sequence[Value] = ()):
        """`relaxed`: a value rounded to 16 bits and widened again keeps its precision. `limits`: buffers of what `block_ranges` found."""
        self.relaxed, self.limits = relaxed, limits
        self.s, self.outputs, self.e, self.buffers, self.tile = s, outputs, e, buffers, tile
        self.batch_at: dict[str, Dim] = {}
        self.fixed: dict[Value, float] = {}  # maxima for which a bound stands
        self.row_values: dict[tuple[Value, Dim], Value] = {}
        # Inputs of 16 bits know the scores no better than exp2 knows its result: the cheap form will do.
        self.coarse = all(_narrow(s, op) is not None for op in s.firsts)

    # -- positions ------------------------------------------------------------------------------------------------------

    def frame_at(self, m: Dim, t: Dim) -> dict[str, Dim]:
        """Positions over the frame of linear row m and linear step t."""
        s = self.s
        bounds = self.e.bounds()
        at = dict(self.batch_at)
        for names, linear in ((s.rows, m), (s.stream, t)):
            for f, x in zip(names, delinearize(linear, [s.sizes[f] for f in names]), strict=True):
                at[f] = simplify(x, bounds)
        return at

    def column_at(self, n: Dim) -> dict[str, Dim]:
        return {f"n{k}": x for k, x in enumerate(delinearize(n, self.s.columns))}

    def read(self, e: Emitter, op: Operation, i: int, at: dict[str, Dim], reduced: Sequence[Dim], mask: Sequence[Pair], *, cast: bool) -> Value:
        """Operand i of a contraction at a frame position, cast as the body says (unless `cast` is off)."""
        v, m = op.operands[i], op["maps"][i]
        bounds = e.bounds()
        place = {f"d{j}": simplify(substitute(x, at), bounds) for j, x in enumerate(self.s.position[op])}
        place |= {f"d{len(self.s.position[op]) + k}": x for k, x in enumerate(reduced)}
        fill = fill_of(op, i)
        pairs, low = fill_masks(m, v.type.shape, place, bounds) if fill is not None else ([], [])  # type: ignore[attr-defined]
        value = e.load(self.buffers[v], offset_in(v, m, place, bounds), [*pairs, *e.needed(mask)], low, 0 if fill is None else fill)
        return self._casts(e, op, i, value) if cast else value

    def _casts(self, e: Emitter, op: Operation, i: int, value: Value) -> Value:
        x = next(iter(op.body.args[i].uses))[0]
        while x.name == "arith.cast":
            value = e.arith(x, [value])
            x = next(iter(x.result.uses))[0]
        return value

    # -- members --------------------------------------------------------------------------------------------------------

    def value(self, scope: Scope, v: Value) -> Value:
        """An internal value at the scope's point."""
        if v not in scope.values:
            op = v.defining_op
            assert op is not None
            with scope.e.builder.at(op.location):
                for r, made in zip(op.results, self.body(scope, op), strict=True):
                    scope.values[r] = made
        return scope.values[v]

    def body(self, scope: Scope, op: Operation, reduced: Sequence[Dim] = ()) -> list[Value]:
        """The yields of a member's body at the scope's point."""
        bounds = scope.e.bounds()
        place = [simplify(substitute(x, scope.at), bounds) for x in (*self.s.position[op], *reduced)]
        at = {f"d{j}": x for j, x in enumerate(place)}
        local: dict[Value, Value] = {}
        for i, (v, m, arg) in enumerate(zip(op.operands, op["maps"], op.body.args, strict=True)):
            if m is not None:
                local[arg] = self.value(scope, v) if v in scope.values or self.s.kind_of(v) else self.load(scope, op, i, at)
        for inner in body_ops(op):
            local[inner.result] = self._inner(scope, op, inner, local, at)
        return [local[v] for v in op.body.terminator.operands]

    def _inner(self, scope: Scope, op: Operation, inner: Operation, local: dict[Value, Value], at: dict[str, Dim]) -> Value:
        e = scope.e
        if inner.name == "tensor.index":
            return e.index_value(at[f"d{inner['dim']}"])
        if inner.name == "tensor.sym":
            return e.index_value(inner["expr"])
        if inner.name == "tensor.extract":
            source = op.operands[inner.operands[0].index]  # type: ignore[attr-defined]
            return emit_extract(e, self.buffers[source], source, [local[v] for v in inner.operands[1:]], inner["check"], scope.active)
        if inner.name == "tensor.require":
            return e.require(inner, [local[v] for v in inner.operands], scope.active)
        if inner.name == "arith.select" and inner.operands[0] in scope.known:
            return local[inner.operands[1 if scope.known[inner.operands[0]] else 2]]
        if inner.name in ("arith.mul", "arith.div") and local[inner.operands[1]] in scope.units:
            return local[inner.operands[0]]
        if inner.name == "arith.mul" and local[inner.operands[0]] in scope.units:
            return local[inner.operands[1]]
        if inner.name == "arith.cast" and self.relaxed and _undoes_rounding(inner, local[inner.operands[0]]):
            return local[inner.operands[0]].defining_op.operands[0]  # type: ignore[union-attr]
        if self.coarse and inner.name in _COARSE:
            return getattr(self, _COARSE[inner.name])(e, *(local[v] for v in inner.operands))
        return e.arith(inner, [local[v] for v in inner.operands])

    def load(self, scope: Scope, op: Operation, i: int, at: dict[str, Dim]) -> Value:
        v, m, e = op.operands[i], op["maps"][i], scope.e
        bounds = e.bounds()
        fill = fill_of(op, i)
        offset = offset_in(v, m, at, bounds)
        key = (v, offset, repr(fill), m if fill is not None else None)
        if key not in scope.loads:
            pairs, low = fill_masks(m, v.type.shape, at, bounds) if fill is not None else ([], [])  # type: ignore[attr-defined]
            moving = free_symbols(offset).union(*(free_symbols(x) for p in pairs for x in p), *map(free_symbols, low)) & {"t0", "t1"}
            active = [p for p in scope.active if free_symbols(p[0]) & {"t0", "t1"} & moving]
            scope.loads[key] = e.load(self.buffers[v], offset, [*pairs, *e.needed(active)], low, 0 if fill is None else fill)
        return scope.loads[key]

    def store(self, scope: Scope, out: Value, value: Value) -> None:
        assert isinstance(out.type, TensorType) and out.defining_op is not None
        bounds = scope.e.bounds()
        offset: Dim = 0
        for x, stride in zip(self.s.position[out.defining_op], out.type.layout, strict=True):
            offset = offset + substitute(x, scope.at) * stride
        offset = simplify(offset, bounds)
        moving = free_symbols(offset) & {"t0", "t1"}
        scope.e.store(self.buffers[out], value, offset, scope.e.needed([p for p in scope.active if free_symbols(p[0]) & {"t0", "t1"} & moving]))

    # -- running values ---------------------------------------------------------------------------------------------------

    def neutral(self, e: Emitter, op: Operation, shape: tuple[int, int]) -> Value:
        dtype = element_type(op.result.type) if op in self.s.seconds else element_type(op.body.terminator.operands[0].type)
        kind = "sum" if op in self.s.seconds else op["combine"][0]
        return e.broadcast(e.builder.constant(identity_of(kind, dtype), dtype), shape)

    def exp(self, e: Emitter, x: Value) -> Value:
        """exp(x), as the hardware's exp2 where that is good enough; c * s - m becomes one fused multiply-add."""
        b = e.builder
        if not self.coarse or element_type(x.type).name != "f32":
            return b.arith("exp", x)
        made = x.defining_op
        terms = list(made.operands) if made is not None and made.name == "arith.sub" else [x]
        scaled = [b.arith("mul", s, LOG2_E * c) for s, c in map(_without_factor, terms)]
        power = scaled[0] if len(scaled) == 1 else b.arith("sub", *scaled)
        return b.op("arith.exp2", power, type=power.type, _approximate=True)

    def rescale(self, e: Emitter, before: Value, after: Value) -> Value:
        """exp(before - after), exactly 1 where the maximum stands: the difference comes first."""
        b = e.builder
        gap = b.arith("sub", before, after)
        if not self.coarse or element_type(gap.type).name != "f32":
            return b.arith("exp", gap)
        power = b.arith("mul", gap, LOG2_E)
        return b.op("arith.exp2", power, type=power.type, _approximate=True)

    def tanh(self, e: Emitter, x: Value) -> Value:
        """By the hardware: within 2^-11 of tanh, relatively, which is what inputs of 16 bits leave of it."""
        return e.builder.op("arith.tanh", x, type=x.type, **({"_approximate": True} if element_type(x.type).name == "f32" else {}))

    def log(self, e: Emitter, x: Value) -> Value:
        """By the hardware. The library's is a function that is called: beside it, the Hopper schedule keeps its accumulators in memory, four times
        slower."""
        return e.builder.op("arith.log", x, type=x.type, **({"_approximate": True} if element_type(x.type).name == "f32" else {}))

    def div(self, e: Emitter, x: Value, y: Value) -> Value:
        """By a constant: a multiplication, 1 ulp away."""
        by = y.defining_op
        if by is not None and by.name == "arith.constant" and by["value"] and element_type(x.type).name == "f32":
            scaled, factor = _without_factor(x)
            return e.builder.arith("mul", scaled, factor / by["value"])
        return e.builder.arith("div", x, y)

    def safe(self, e: Emitter, m: Value) -> Value:
        b = e.builder
        return b.arith("select", b.arith("eq", m, float("-inf")), 0, m)

    def scaled(self, scope: Scope, op: Operation, value: Value) -> Value:
        """A finished sum times the row values that were left out of its terms."""
        b, m = scope.e.builder, self.s.shifts[op]
        if m is not None and m not in self.fixed and op not in self.s.guarded:  # nothing but exp(-inf + inf)
            value = b.arith("select", b.arith("eq", self.value(scope, m), float("-inf")), float("nan"), value)
        for w, kind, guarded in self.s.scales[op]:
            by = b.cast(self.value(scope, w), element_type(value.type))
            if kind == "div" and self.coarse and m is not None:  # one division a row
                kind, by = "mul", b.arith("div", 1.0, by)
            made = b.arith(kind, value, by)
            value = b.arith("select", b.arith("eq", value, 0), value, made) if guarded else made
        return value

    def without_scales(self, scope: Scope) -> None:
        """Inside the loop, row values that only scale count as 1."""
        for rows in self.s.scales.values():
            for w, *_ in rows:
                scope.values[w] = scope.e.builder.constant(1, element_type(w.type))
                scope.units.add(scope.values[w])

    def ranges(self, m: Dim, step: int) -> list[tuple[Dim, Dim, bool]]:
        """(from, to, masked) for the loops over the stream, for rows m (which moves with t0): dead steps are left out."""
        s, bounds, known = self.s, {"t0": (0, self.tile[0] - 1)}, self.e.bounds()
        first: Dim = 0
        full_from: Dim = 0
        end, full_to = s.length, floordiv(s.length, step) * step
        f = s.stream[0]
        if self.limits:
            first, end, full_from, low = self.block_limits(step)
            known = self.e.bounds()
            full_to = _least(full_to, low, known)
        elif len(s.stream) > 1 or not s.alive.pairs:
            return [r for r in ((0, full_to, False), (full_to, end, True)) if r[0] != r[1]]
        # rows past the last compute what nobody stores: they may widen the range, never past the ends
        at = self.frame_at(m, 0)
        for _, gap in s.alive.pairs:
            linear = split_linear(gap, f)
            if linear is None or linear[0] not in (1, -1):
                return [(first, self.some_step(first, end, step), True)] if self.limits else [(0, end, True)]
            rest = simplify(substitute(linear[1], at), known)
            most, least = upper_bound(rest, bounds), lower_bound(rest, bounds)
            if most is None or least is None:
                return [(first, self.some_step(first, end, step), True)] if self.limits else [(0, end, True)]
            if linear[0] == -1:      # alive where t < rest
                end, full_to = _least(end, most, known), _least(full_to, floordiv(least, step) * step, known)
            else:                    # alive where t > -rest
                first, full_from = maximum(first, floordiv(1 - most, step) * step), maximum(full_from, ceildiv(1 - least, step) * step)
        end, full_to, first = (simplify(x, known) for x in (end, full_to, first))
        if self.limits:
            end = self.some_step(first, end, step)
        if first == 0 and full_from == 0:
            full_to = full_to if known_less(-1, full_to, known) else maximum(0, full_to)
            return [(0, full_to, False), (full_to, end, True)]
        parts: list[tuple[Dim, Dim, bool]] = [(first, _least(full_from, end, known), True), (full_from, full_to, False)]
        return parts if full_to == end else [*parts, (_most(full_from, full_to, known), end, True)]

    def some_step(self, first: Dim, end: Dim, step: int) -> Dim:
        """Where data say which steps are needed: the end, one step after `first` at least if the target wants every program to have one."""
        return end

    def block_limits(self, step: int) -> tuple[Dim, Dim, Dim, Dim]:
        """First and last steps (multiples of `step`, or the end) that any of a program's rows needs, and those between which none needs the mask."""
        raise NotImplementedError


def _least(a: Dim, b: Dim, bounds: Any) -> Dim:
    """min(a, b), decided where the bounds allow it."""
    return b if known_less(b, a + 1, bounds) else a if known_less(a, b + 1, bounds) else minimum(a, b)


def _most(a: Dim, b: Dim, bounds: Any) -> Dim:
    """max(a, b), without `a` where the bounds say that it is never larger."""
    return b if all(known_less(x, b + 1, bounds) for x in arguments(a, Max)) else maximum(a, b)


def offset_in(v: Value, m: tuple[Dim, ...], at: dict[str, Dim], bounds: Any) -> Dim:
    assert isinstance(v.type, TensorType)
    total: Dim = 0
    for x, stride in zip(m, v.type.layout, strict=True):
        total = total + substitute(x, at) * stride
    return simplify(total, bounds)


def _undoes_rounding(cast: Operation, value: Value) -> bool:
    """The cast widens to f32 what was rounded from f32."""
    made = value.defining_op
    return made is not None and made.name == "arith.cast" and element_type(cast.result.type).name == "f32" and (
        element_type(made.operands[0].type).name == "f32" and element_type(value.type).name in ("bf16", "f16"))


def _without_factor(x: Value) -> tuple[Value, float]:
    """x = (value, constant) with value * constant == x, up to a rounding."""
    made = x.defining_op
    if made is not None and made.name == "arith.mul":
        c = _constant(made.operands[1])
        if c is not None:
            return made.operands[0], c
    return x, 1.0


def _constant(v: Value) -> float | None:
    """The number of a scalar constant, also through a cast."""
    made = v.defining_op
    while made is not None and made.name == "arith.cast":
        made = made.operands[0].defining_op
    return float(made["value"]) if made is not None and made.name == "arith.constant" else None


class GpuStream(StreamLowering):
    """Whole tiles: [rows, steps] of the middle space and [rows, columns] of each second, all in registers."""

    def emit(self) -> list[Dim]:
        s, e, (bm, bt) = self.s, self.e, self.tile
        for k, f in enumerate(s.batch):
            pid = e.builder.op("tile.program_id", type=index, axis=k)
            self.batch_at[f] = e.fresh(pid, 0, s.sizes[f] - 1)
        blocks = ceildiv(s.row_count, bm)
        p = e.fresh(e.builder.op("tile.program_id", type=index, axis=len(s.batch)), 0, blocks - 1)
        # The last rows see the most of a causal stream: they start first.
        self.m0 = (blocks - 1 - p if s.alive.pairs else p) * bm
        self.m = self.m0 + sym("t0")
        self.row_masks = [(self.m, s.row_count)] if s.rows else []
        self.columns = padded(product(s.columns))
        self.kept = {op: self._left(op) for op in s.firsts}
        bounds = {op: bound_of(s, op) for op in s.reductions if self.coarse and op.result in s.shifts.values()}
        self.fixed = {op.result: bound for op, bound in bounds.items() if bound is not None}
        running = [op for op in (*s.reductions, *s.seconds) if op.results[0] not in self.fixed]
        carried = [self.neutral(e, op, (bm, self.columns if op in s.seconds else 1)) for op in running]
        for start, stop, masked in self._in_order(self.ranges(self.m, bt)):
            def step(inner: Emitter, i: Dim, now: list[Value], masked: bool = masked) -> list[Value]:
                return self._step(inner, i, dict(zip(running, now, strict=True)), masked)
            anywhere = masked or not (s.alive.pairs or self.limits)
            carried = e.loop(start, stop, bt, carried, step, part="any" if anywhere else "some")
        self._finish(dict(zip(running, carried, strict=True)))
        return [*(s.sizes[f] for f in s.batch), blocks]

    def load(self, scope: Scope, op: Operation, i: int, at: dict[str, Dim]) -> Value:
        """A row's own value is read once, before the loops."""
        v, m, e = op.operands[i], op["maps"][i], scope.e
        offset = offset_in(v, m, at, e.bounds())
        if fill_of(op, i) is not None or free_symbols(offset) - {"t0", *self.e.variables}:
            return super().load(scope, op, i, at)
        if (v, offset) not in self.row_values:
            outer = with_shape(self.e, e.shape)
            active = [p for p in scope.active if "t0" in free_symbols(p[0]) & free_symbols(offset)]
            self.row_values[v, offset] = outer.load(self.buffers[v], offset, outer.needed(active))
        return self.row_values[v, offset]

    def div(self, e: Emitter, x: Value, y: Value) -> Value:
        """By a row's value: one division a row, and multiplications."""
        wide, narrow = x.type, y.type
        if isinstance(wide, TileType) and isinstance(narrow, TileType) and wide.shape[1] != narrow.shape[1] == 1 and wide.dtype.name == "f32":
            # Infinite for a y below 2.9e-39: a softmax's sum is at least 1, as one of its terms is.
            return e.builder.arith("mul", x, e.builder.arith("div", 1.0, y))
        return super().div(e, x, y)

    def some_step(self, first: Dim, end: Dim, step: int) -> Dim:
        return maximum(end, first + step) if as_int(self.s.length) % step == 0 else end

    def _in_order(self, ranges: list[tuple[Dim, Dim, bool]]) -> list[tuple[Dim, Dim, bool]]:
        """Last steps first where every program has them and masks them: Hopper's schedule has one body for a first step, which may be any."""
        low, high, masked = ranges[-1]
        return ranges[::-1] if masked and len(ranges) > 1 and known_less(low, high, self.e.bounds()) else ranges

    def block_limits(self, step: int) -> tuple[Dim, Dim, Dim, Dim]:
        s, e = self.s, self.e
        rows = as_int(ceildiv(s.row_count, BLOCK))
        numbers = [simplify(minimum(floordiv(self.m0, BLOCK) + k, rows - 1), e.bounds()) for k in range(max(1, self.tile[0] // BLOCK))]
        found = []
        for buffer, combine in zip(self.limits, ("min", "max", "max", "min"), strict=True):
            shape, layout = buffer.type.shape, buffer.type.layout  # type: ignore[attr-defined]
            at = sum((self.batch_at[f] * d for f, n, d in zip(s.batch, shape, layout, strict=False) if n != 1), 0)
            value = e.load(buffer, at + numbers[0] * layout[-1])
            for n in numbers[1:]:
                value = e.builder.arith(combine, value, e.load(buffer, at + n * layout[-1]))
            most = ceildiv(s.length, BLOCK)  # said once more, so that positions are known to fit 32 bits
            found.append(e.named(minimum(maximum(e.fresh(value, None, None), 0), most), most) * BLOCK)
        first, end, full_first, full_end = found
        if as_int(s.length) % step == 0:
            first = minimum(first, as_int(s.length) - step)
        if BLOCK % step == 0:
            return first, minimum(end, s.length), full_first, full_end
        down, up = (lambda x: floordiv(x, step) * step), (lambda x: ceildiv(x, step) * step)
        return down(first), minimum(end, s.length), up(full_first), down(full_end)

    def _left(self, op: Operation) -> Value:
        """The rows' operand of a first contraction, read once: [rows, width]."""
        bm, width = self.tile[0], _width(op)
        e = with_shape(self.e, (bm, padded(width)))
        k = sym("t1")
        value = self.read(e, op, 1 - stream_side(self.s, op), self.frame_at(self.m, 0), delinearize(k, op["dims"][len(self.s.position[op]):]),
                          [*self.row_masks, (k, width)], cast=_narrow(self.s, op) is None)
        return _as_tile(e, value, e.shape)

    def _first(self, e: Emitter, op: Operation, i: Dim) -> Value:
        """One tile of the middle space."""
        (bm, bt), width = self.tile, _width(op)
        right_e = with_shape(e, (padded(width), bt))
        k, t = sym("t0"), i + sym("t1")
        right = self.read(right_e, op, stream_side(self.s, op), self.frame_at(0, t), delinearize(k, op["dims"][len(self.s.position[op]):]),
                          [(k, width), (t, self.s.length)], cast=_narrow(self.s, op) is None)
        self.read_now.append(right)
        acc = TileType((bm, bt), element_type(op.result.type))
        zero = e.broadcast(e.builder.constant(0, acc.dtype), (bm, bt))
        return e.builder.op("tile.dot", self.kept[op], _as_tile(right_e, right, right_e.shape), zero, type=acc)

    def _step(self, inner: Emitter, i: Dim, now: dict[Operation, Value], masked: bool) -> list[Value]:
        s, (bm, bt) = self.s, self.tile
        if isinstance(s.length, int) and s.length % bt == 0:  # steps start at multiples of bt
            inner.ranges[str(i)] = (inner.ranges[str(i)][0], s.length - bt)
        e = with_shape(inner, (bm, bt))
        b, t = e.builder, i + sym("t1")
        known = dict(s.alive.known) | (s.alive.known_by_data if self.limits else {})
        scope = Scope(e, self.frame_at(self.m, t), [*self.row_masks, (t, s.length)], known={} if masked else known)
        self.without_scales(scope)
        self.read_now: list[Value] = []
        self._fix(scope)
        for op in s.firsts:
            with b.at(op.location):
                scope.values[op.result] = self._first(e, op, i)
        lanes = e.mask_value([(t, s.length)]) if masked else None
        alpha: dict[Value, Value] = {}
        out: dict[Operation, Value] = {}
        for op in now:
            if op in s.seconds:
                continue
            kind, shift = op["combine"][0], s.shifts[op]
            with b.at(op.location):
                x, = self.body(scope, op, [sym(f) for f in s.stream])
                x = _as_tile(e, x, (bm, bt))
                inner_x, factor = _without_factor(x) if kind == "max" and lanes is None else (x, 1.0)
                if factor <= 0:
                    inner_x, factor = x, 1.0
                if lanes is not None:
                    x = b.arith("select", lanes, x, identity_of(kind, element_type(x.type)))
                part = b.op("tile.reduce", inner_x if factor != 1.0 else x, type=TileType((bm, 1), element_type(x.type)), axis=1, kind=kind)
                if factor != 1.0:  # rounding is monotonic: the maximum of products is the product of the maximum
                    part = b.arith("mul", part, factor)
                before = now[op] if shift not in alpha else b.arith("mul", now[op], alpha[shift])
                out[op] = b.arith(COMBINE_OPS[kind], before, part)
                if op.result in s.shifts.values():
                    scope.values[op.result] = self.safe(e, out[op])
                    alpha[op.result] = self.rescale(e, now[op], scope.values[op.result])
        for op in self._soonest_first():
            with b.at(op.location):
                out[op] = self._second(scope, op, i, now[op], alpha, lanes)
        return [out[op] for op in now]

    def _soonest_first(self) -> list[Operation]:
        """The second contractions by how much is computed for their weights: what is done with early leaves its registers to what comes late."""
        s = self.s
        needs: dict[Operation, set[Operation]] = {}
        for op in [*s.firsts, *s.full]:  # in program order
            made = {v.defining_op for v in op.operands if v.defining_op in needs}
            needs[op] = {op, *(x for m in made for x in needs[m])}  # type: ignore[index]
        return sorted(s.seconds, key=lambda op: len(needs[s.streamed(op).defining_op]))  # type: ignore[index]

    def _fix(self, scope: Scope) -> None:
        """Maxima that a bound stands for."""
        for m, bound in self.fixed.items():
            scope.values[m] = scope.e.builder.constant(bound, element_type(m.type))

    def _second(self, scope: Scope, op: Operation, i: Dim, acc: Value, alpha: dict[Value, Value], lanes: Value | None) -> Value:
        s, e, b, bt = self.s, scope.e, scope.e.builder, self.tile[1]
        streamed = s.streamed(op)
        which = next(k for k, v in enumerate(op.operands) if v is streamed)
        weight = _as_tile(e, self.value(scope, streamed), self.tile)
        if lanes is not None:
            weight = b.arith("select", lanes, weight, 0)
        narrow = _narrow(s, op)
        weight = self._casts(e, op, which, weight) if narrow is None else b.cast(weight, narrow)
        other_e = with_shape(e, (bt, self.columns))
        t, n = i + sym("t0"), sym("t1")
        at = self.frame_at(0, t) | self.column_at(n)
        reduced = [at[f] for f in reduced_order(s, op, which)]
        other = self.read(other_e, op, 1 - which, at, reduced, [(t, s.length), (n, product(s.columns))], cast=_narrow(s, op) is None)
        other = turned(b, other, self.read_now)
        shift = s.shifts[op]
        if shift in alpha:
            acc = b.arith("mul", acc, b.cast(alpha[shift], element_type(acc.type)))
        return b.op("tile.dot", weight, _as_tile(other_e, other, other_e.shape), acc, type=acc.type)

    def _finish(self, carried: dict[Operation, Value]) -> None:
        s, bm = self.s, self.tile[0]
        e = with_shape(self.e, (bm, self.columns))
        n = sym("t1")
        scope = Scope(e, self.frame_at(self.m, 0) | self.column_at(n), [*self.row_masks, (n, product(s.columns))])
        self._fix(scope)
        for op in s.reductions:
            if op.result in self.fixed:
                continue
            scope.values[op.result] = carried[op]
            scope.values[op.result] = self.scaled(scope, op, carried[op])
        for op in s.seconds:
            with e.builder.at(op.location):
                scope.values[op.result] = self.scaled(scope, op, carried[op])
        for out in self.outputs:
            with e.builder.at(out.defining_op.location):  # type: ignore[union-attr]
                value = self.value(scope, out)
                if not s.rows and isinstance(value.type, TileType) and value.type.shape[0] > 1:  # all rows of the tile are the one row
                    value = e.builder.op("tile.reduce", value, type=TileType((1, value.type.shape[1]), value.type.dtype), axis=0, kind="max")
                self.store(scope, out, value)


def _narrow(s: Stream, op: Operation) -> DType | None:
    """The 16-bit float type that all operands from outside have, if products are summed in f32: they are exact there, no cast is needed first.
    A streamed operand is rounded to it, as it would be in memory."""
    types = {element_type(v.type) for v in op.operands if not s.kind_of(v)}
    narrow = types.pop() if len(types) == 1 else None
    if narrow is not None and narrow.name == "f16" and s.scales.get(op) and s.shifts[op] is None:
        return None  # without its scale, a term may be too large for 16 bits
    return narrow if narrow is not None and narrow.name in ("bf16", "f16") and element_type(op.result.type).name == "f32" else None


def _as_tile(e: Emitter, value: Value, shape: tuple[int, int]) -> Value:
    return value if isinstance(value.type, TileType) and value.type.shape == shape else e.broadcast(value, shape)


def with_shape(e: Emitter, shape: tuple[int, int]) -> Emitter:
    return Emitter(e.builder, shape, e.symbols, e.variables, e.ranges, e.coarse)


