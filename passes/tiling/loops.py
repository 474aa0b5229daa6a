"""Pointwise and reduction groups as kernels.

The frame's dimensions become: a *vector* dimension (t1 of the tile, along which most accesses are contiguous), optionally a *row* dimension (t0, on
GPUs), grid axes (the other outer dimensions) and scalar loops (the other inner ones). Three shapes of kernel fall out of where
the vector dimension lies:
  no inner dimensions       pointwise: each program covers a run of the vector dimension
  vector is an inner one    row reduction: loops over the row, one per stage, then a reduction across the tile
  vector is an outer one    column reduction: a tile of columns is accumulated over the inner loops, or many of them (`columns.py`)
Reductions that depend on earlier ones are stages: one loop each, recomputing what is cheap; an expensive value that a later stage needs again is kept
(`keeping.py`). When a row fits one tile there are no loops and nothing is recomputed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ...ir import Builder, Dim, IRError, Operation, TensorType, TileType, Value, element_type, sym
from ...ir.dialects.tensor import fill_of
from ...ir.expr import ceildiv, free_symbols, minimum, product, substitute
from ...ir.ranges import simplify, split_linear
from ...ir.types import DTYPES, index
from ..structured import body_ops
from .columns import emit_columns, sums_columns
from .emit import COMBINE_OPS, Emitter, Pair, emit_extract, fill_masks, identity_of
from .extremes import better_of, initial_extreme, place_of
from .frame import Access, Frame, is_expensive, make_moments, make_online
from .gpu_loop_tiles import rows_aligned
from .keeping import Home, choose_homes
from .moments import add_shifted, initial_shifted, mean_about, spread_about, spread_of_shifted, sum_of_shifted, total_about
from .online import Lanes
from .prefetch import Leaf, ask_ahead, ask_for_named_rows, ask_soon, named_by
from .row_pipeline import emit_row_pipeline, loop_stages
from .tile_choice import TileChoice

__all__ = ["emit_loops"]

I64 = DTYPES["i64"]
PART = 256
"""Most additions in one chain of a sum on a CPU, as in products (`contraction.py`)."""


@dataclass
class Scope:
    """One iteration point: where the emitter stands, the position of each frame dimension, active-lane masks, and values made here."""

    e: Emitter
    at: dict[str, Dim]
    active: dict[str, Pair]
    values: dict[Value, Value] = field(default_factory=dict)
    loads: dict[Any, Value] = field(default_factory=dict)
    alpha: dict[Operation, Value] = field(default_factory=dict)  # of a running maximum: what earlier terms are multiplied by
    sums: dict[Operation, tuple[Value, Value, Value]] = field(default_factory=dict)  # of a sum: before and after, and what was added


class Lowering:
    def __init__(self, frame: Frame, tile: TileChoice, e: Emitter, buffers: dict[Value, Value], gpu: bool, private_bytes: int,
                 cache: int | None = None, near: bool = False):
        self.private_bytes, self.cache, self.near = private_bytes, cache, near
        self.bytes_of = {x.value: x.weight * x.bytes if isinstance(x.weight, int) else 0 for x in frame.accesses}  # of operands; 0: not known
        self.frame, self.tile, self.e, self.buffers, self.gpu = frame, tile, e, buffers, gpu
        self.made: dict[Value, Operation] = {r: op for op in frame.members for r in op.results}
        self.stores = {x.value: x.offset for x in frame.accesses if x.is_store}
        self.homes: dict[Value, Home] = {}       # of values that are kept between stages
        self.kept: set[Value] = set()            # those already written there
        self.outer_values: dict[Value, Value] = {}
        self.now = 0                             # the stage that is written
        self.leaves: dict[int, Leaf] = {}        # the innermost loop of each stage
        self.loaded: dict[Value, set[int]] = {}  # in which stages' loops an operand is read
        self.about: dict[Operation, Value] = {}  # of a sum with a second moment, on a CPU: what its terms are counted from, and their sum
        self.apart: dict[Operation, Value] = {}
        self.bounds = frame.bounds(e.symbols)
        # Reductions over dimensions of size 1 have accumulators too, though the frame has no inner dimension.
        self.staged = bool(frame.inner) or any(op["reductions"] for op in frame.members)
        self.by_columns = sums_columns(self)

    # -- the loop nest ------------------------------------------------------------------------------------------------

    def grid(self) -> list[tuple[str, Dim, int]]:
        """(frame dimension, programs, elements per program) of each grid axis, slowest first."""
        axes = []
        t = self.tile
        # On GPUs programs of successive numbers run together: along contiguous memory they share its pages.
        for f in sorted(self.frame.outer, key=lambda f: f == t.vector) if self.gpu else self._as_read():
            if f == t.vector:
                per = t.shape[1] if self.staged and not self.by_columns else t.chunk
                axes.append((f, ceildiv(self.frame.sizes[f], per), per))
            elif f == t.row or t.rows > 1 and f == self.frame.outer[-1]:
                per = t.shape[0] if f == t.row else t.rows
                axes.append((f, ceildiv(self.frame.sizes[f], per), per))
            else:
                axes.append((f, self.frame.sizes[f], 1))
        return axes

    def _as_read(self) -> list[str]:
        """The outer dimensions in the order in which the largest operand lies in memory, if nothing is summed: short runs are read one behind the
        other and written apart (heads that move past positions), which costs less than the other way round. Transposing tiles go along the lines that
        they read, so that neighbours use the same pages."""
        outer = self.frame.outer
        if self.tile.row is not None and not self.staged:
            return sorted(outer, key=lambda f: f == self.tile.row)
        reads = [(x.weight * x.bytes, x.offset) for x in self.frame.accesses if not x.is_store and isinstance(x.weight, int)]
        if self.staged or not reads:
            return outer
        walked = [split_linear(max(reads, key=lambda x: x[0])[1], f) for f in outer]
        strides = {f: s[0] for f, s in zip(outer, walked, strict=True) if s is not None and isinstance(s[0], int) and s[0] > 0}
        return sorted(outer, key=lambda f: -strides[f]) if len(strides) == len(outer) else outer

    def emit(self) -> list[Dim]:
        axes = self.grid()
        top = Scope(self.e, {}, {})
        for k, (f, programs, per) in enumerate(axes):
            pid = self.e.builder.op("tile.program_id", type=index, axis=k)
            p = self.e.fresh(pid, 0, programs - 1)
            t = "t1" if f == self.tile.vector else "t0" if f == self.tile.row else None
            start = simplify(p * per, {})
            top.at[f] = start if t is None else start + sym(t)
            if t is not None:
                top.active[f] = (top.at[f], self.frame.sizes[f])
        vector = self.tile.vector
        if self.by_columns:
            emit_columns(self, top)
        elif self.tile.rows > 1:
            self.homes = choose_homes(self.frame, self.buffers, self.e, self.inner_order(), self.private_bytes, self.frame.outer[-1],
                                      self.tile.side)
            emit_row_pipeline(self, top)
        elif self.staged:
            self._stages(top)
        elif vector is not None and self.tile.chunk > self.tile.shape[1]:
            self._pointwise_loop(top, vector)
        else:
            self.stage(top, self.frame.members)
        return [programs for _, programs, _ in axes]

    def scope(self, e: Emitter, at: dict[str, Dim], active: dict[str, Pair]) -> Scope:
        """Another point, with nothing computed yet."""
        return Scope(e, at, active)

    def _pointwise_loop(self, top: Scope, vector: str) -> None:
        size, (_, width) = self.frame.sizes[vector], self.tile.shape
        start = top.at[vector] - sym("t1")
        upper = minimum(size, start + self.tile.chunk)
        if isinstance(size, int) and size <= self.tile.chunk:
            start, upper = 0, size
        elif isinstance(size, int) and size % self.tile.chunk == 0:
            upper = start + self.tile.chunk

        def body(inner: Emitter, i: Dim, _: list[Value]) -> list[Value]:
            scope = Scope(inner, {**top.at, vector: i + sym("t1")}, {**top.active, vector: (i + sym("t1"), upper)})
            self.stage(scope, self.frame.members)
            return []

        self.e.loop(start, upper, width, [], body)

    def inner_order(self) -> list[str]:
        """Inner dimensions, outermost loop first; the tiled one last."""
        names = [f for f in self.frame.sizes if f in self.frame.inner]
        tiled = [f for f in (self.tile.row, self.tile.vector) if f in names]
        return [f for f in names if f not in tiled] + list(tiled)  # type: ignore[misc]

    def _extent(self, f: str) -> int:
        return self.tile.shape[1] if f == self.tile.vector else self.tile.shape[0] if f == self.tile.row else 1

    def is_persistent(self) -> bool:
        """The inner space fits one tile: no loops, every value stays in registers."""
        return all(isinstance(self.frame.sizes[f], int) and self.frame.sizes[f] <= self._extent(f) for f in self.frame.inner)  # type: ignore[operator]

    def rows(self, top: Scope) -> Scope:
        """Whole rows that fit one tile: computes and stores all; the point at which the rows' elements are known."""
        return self._stages(top)

    def summand(self, scope: Scope, op: Operation, k: int) -> Value:
        """What a point adds to result `k` of a reduction."""
        key = op.body.terminator.operands[k]
        if ("body", op) not in scope.loads:
            for out, made in zip(op.body.terminator.operands, self._body(scope, op), strict=True):
                scope.loads[("yield", op, out)] = made
            scope.loads[("body", op)] = made
        return scope.loads[("yield", op, key)]

    def _stages(self, top: Scope) -> Scope:
        last = max(self.frame.stage.values())
        persistent = self.is_persistent()
        if not persistent and not self.frame.online:
            inner = self.tile.vector is None or self.tile.vector in self.frame.inner
            self.homes = choose_homes(self.frame, self.buffers, self.e, self.inner_order(), self.private_bytes if inner else 0)
        shared = Scope(top.e, dict(top.at), dict(top.active))
        for f in self.frame.inner:
            t = "t1" if f == self.tile.vector else "t0" if f == self.tile.row else None
            shared.at[f] = sym(t) if t else 0
            if t:
                shared.active[f] = (sym(t), self.frame.sizes[f])
        for s in range(last + 1):
            members = [op for op in self.frame.members if self.frame.stage[op] == s]
            self.outer_members(top, [op for op in members if not op["reductions"] and not self.frame.is_full(op)])
            work = [op for op in members if op["reductions"] or self.frame.is_full(op)]
            roots = [op for op in work if op["reductions"] or any(r in self.stores or r in self.homes for r in op.results)]
            if not roots:
                continue
            reductions = [op for op in roots if op["reductions"]]
            keys = [(op, k) for op in reductions for k in range(len(op.results))]
            inits = [v for op, k in keys for v in self.initial(op, k, shared)]
            self.now = s
            if persistent:
                carried = self.stage(shared, roots, keys, inits)
            else:
                carried = self._nest(top, self.inner_order(), roots, keys, inits)
            self.finish(top, keys, carried)
        if len(self.leaves) > 1:
            self._ask_ahead(top)
        return shared

    def _ask_ahead(self, top: Scope) -> None:
        """On a CPU, rows of up to the caches' part that a program may fill are asked for while the program before is in its later stages."""
        inner = product(self.frame.sizes[f] for f in self.frame.inner)
        axes = self.grid()
        if self.gpu or self.tile.vector not in self.frame.inner or not axes or not isinstance(inner, int):
            return
        reads = self.reads()
        (program,) = free_symbols(top.at[axes[-1][0]])
        if sum(inner * x.bytes for x, _, _ in reads) <= self.private_bytes:
            ask_ahead(self.leaves, reads, program, self.tile.shape[1])

    def reads(self) -> list[tuple[Access, Value, set[int]]]:
        """What has been read so far: the access, its buffer, and in which stages' loops."""
        return [(x, self.buffers[x.value], self.loaded[x.value]) for x in self.frame.accesses if not x.is_store and x.value in self.loaded]

    def _nest(self, scope: Scope, loops: list[str], roots: list[Operation], keys: list[Any], inits: list[Value]) -> list[Value]:
        if not loops:
            leaf = self.leaves[self.now] = Leaf(scope.e, scope.at)
            carried = self.stage(scope, roots, keys, inits)
            if self.near and self.tile.vector in self.frame.inner and len(loop_stages(self.frame)) == 1:
                ask_soon(leaf, [(x, b) for x, b, _ in self.reads() if self._is_streamed(x.value)], self.tile.shape[1], self._before(),
                         self.frame.sizes[self.tile.vector])
            return carried
        f, rest = loops[0], loops[1:]
        size, step = self.frame.sizes[f], self._extent(f)
        t = "t1" if f == self.tile.vector else "t0" if f == self.tile.row else None

        def body(inner: Emitter, i: Dim, carried: list[Value]) -> list[Value]:
            at = i + sym(t) if t else i
            active = {**scope.active, f: (at, size)} if t else scope.active
            return self._nest(Scope(inner, {**scope.at, f: at}, active), rest, roots, keys, carried)

        unroll = self._unrolled(f, rest) if self.gpu else 4 if t is None and not rest and self.tile.vector not in self.frame.inner else 1
        return self.spanned(scope.e, size, step, keys, inits, body, unroll)

    def _before(self) -> str | None:
        """The dimension that is walked by one whenever a row is done: a loop around, or the fastest axis of the grid."""
        around = self.inner_order()[:-1]
        return around[-1] if around else next((f for f, _, _ in reversed(self.grid())), None)

    def spanned(self, e: Emitter, size: Dim, step: int, keys: list[Any], inits: list[Value], body: Any, unroll: int = 1) -> list[Value]:
        """A loop over an inner dimension, in parts where sums would become too long (`_span`)."""
        span = self._span(size, step, keys)
        if not span:
            return e.loop(0, size, step, inits, body, unroll=unroll)
        plain = [op["combine"][k] == "sum" for op, k in keys]

        def part(inner: Emitter, i: Dim, carried: list[Value]) -> list[Value]:
            zeros = [self._zero(inner, *key) if is_sum else c for key, c, is_sum in zip(keys, carried, plain, strict=True)]
            end = simplify(i + span, {})
            made = inner.loop(i, end if isinstance(size, int) and size % span == 0 else minimum(size, end), step, zeros, body, unroll=unroll)
            return [inner.builder.arith("add", c, m) if is_sum else m for c, m, is_sum in zip(carried, made, plain, strict=True)]

        return e.loop(0, size, span, inits, part)

    def _unrolled(self, f: str, rest: list[str]) -> int:
        """Of the steps that are to be under way, those of this loop: as many as it has, unless loops within it have them already."""
        left = self.tile.unroll
        for inner in [*reversed(rest), f]:
            size, step = self.frame.sizes[inner], self._extent(inner)
            mine = left if not isinstance(size, int) else min(left, 1 << ((max(1, -(-size // step))).bit_length() - 1))
            left //= mine
        return mine

    def _span(self, size: Dim, step: int, keys: list[Any]) -> int:
        """Elements after which sums begin anew and are added to what is there: the error grows with the longest chain of additions. 0: never.
        Sums that other accumulators are made from step by step stay whole, and so do those of GPUs, whose threads share a chain."""
        if self.gpu or isinstance(size, int) and size < 2 * PART * step:
            return 0
        followed = {*self.frame.online, *self.frame.online.values()}
        kinds = [op["combine"][k] for op, k in keys]
        floats = any(kind == "sum" and element_type(op.results[k].type).is_float for (op, k), kind in zip(keys, kinds, strict=True))
        if not floats or any(op in followed for op, _ in keys) or any(kind in ("argmax", "argmin") for kind in kinds):
            return 0
        steps, ragged = divmod(size, step) if isinstance(size, int) else (0, True)
        return step * (PART if ragged else next((n for n in range(PART, PART // 4, -1) if steps % n == 0), PART))

    def _zero(self, e: Emitter, op: Operation, k: int) -> Value:
        dtype = element_type(op.body.terminator.operands[k].type)
        return e.broadcast(e.builder.constant(identity_of("sum", dtype), dtype), self.tile.shape)

    # -- one iteration ------------------------------------------------------------------------------------------------

    def stage(self, scope: Scope, roots: Sequence[Operation], keys: Sequence[Any] = (), carried: Sequence[Value] = ()) -> list[Value]:
        """Computes the roots at one point: stores what leaves the kernel, and returns the updated accumulators."""
        pending: list[tuple[Value, Value]] = []
        for op in roots:
            if op["reductions"]:
                continue
            for r in op.results:
                if r in self.stores or (r in self.homes and r not in self.kept):
                    pending.append((r, self.value(scope, r)))
        out: list[Value] = []
        slot = 0
        for op, k in keys:
            n = self._slots(op, k)
            out.extend(self._combine(scope, op, k, list(carried[slot:slot + n])))
            slot += n
        for made, value in pending:
            home = self.homes.get(made)
            if made in self.stores:
                self.store(scope, self.buffers[made], self.stores[made], value)
            if home is not None and made not in self.kept:
                if home.private or made not in self.stores:
                    self.store(scope, home.buffer, home.offset, value)
                self.kept.add(made)
        return out

    def _slots(self, op: Operation, k: int) -> int:
        """Accumulators of a reduction: an extreme has its position too, a second moment what `moments.py` says."""
        if op in self.frame.moments and self.gpu:
            return 4
        if self._shifted_by(op) is not None:
            return 0
        return 2 if op["combine"][k] in ("argmax", "argmin") else 1

    def _shifted_by(self, total: Operation) -> Operation | None:
        """On a GPU: the sum of squares about a mean from whose accumulators the sum follows."""
        return next((op for op, of in self.frame.moments.items() if of is total), None) if self.gpu else None

    def value(self, scope: Scope, v: Value) -> Value:
        """The tile of an internal value at the scope's point, computed at most once per scope."""
        if v in scope.values:
            return scope.values[v]
        if v in self.outer_values:
            return self.outer_values[v]
        op = self.made[v]
        if v in self.kept:
            home = self.homes[v]
            offset = self._at(scope, home.offset)
            value = scope.e.load(home.buffer, offset, scope.e.needed(self._active(scope, offset)))
            scope.values[v] = value
            return value
        for r, out in zip(op.results, self._body(scope, op), strict=True):
            scope.values[r] = out
        return scope.values[v]

    def _at(self, scope: Scope, e: Dim) -> Dim:
        return simplify(substitute(e, scope.at), scope.e.bounds())

    def _active(self, scope: Scope, offset: Dim) -> list[Pair]:
        """Lane masks for the tile dimensions that `offset` moves along."""
        return [pair for pair in scope.active.values() if {"t0", "t1"} & free_symbols(pair[0]) & free_symbols(offset)]

    def _body(self, scope: Scope, op: Operation) -> list[Value]:
        """Evaluates a member's body at the scope's point."""
        e = scope.e
        positions = {f"d{j}": self._at(scope, p) for j, p in enumerate(self.frame.position[op])}
        local: dict[Value, Value] = {}
        with e.builder.at(op.location):
            for i, (v, m, arg) in enumerate(zip(op.operands, op["maps"], op.body.args, strict=True)):
                if m is None:
                    continue
                local[arg] = self.value(scope, v) if v in self.made else self._load(scope, v, m, positions, fill_of(op, i))
            for inner in body_ops(op):
                local[inner.result] = self._inner(scope, op, inner, local, positions)
        return [local[v] for v in op.body.terminator.operands]

    def _inner(self, scope: Scope, op: Operation, inner: Operation, local: dict[Value, Value], positions: dict[str, Dim]) -> Value:
        e = scope.e
        if inner.name == "tensor.index":
            return e.index_value(positions[f"d{inner['dim']}"])
        if inner.name == "tensor.sym":
            return e.index_value(inner["expr"])
        if inner.name == "tensor.extract":
            source = op.operands[inner.operands[0].index]  # type: ignore[attr-defined]
            if self.tile.gathered:
                numbers = named_by(op, inner)
                if numbers is not None and op.operands[numbers] not in self.made:
                    ask_for_named_rows(e, op, inner, self.buffers, positions, 4 * self.private_bytes)
            return emit_extract(e, self.buffers[source], source, [local[v] for v in inner.operands[1:]], inner["check"],
                                list(scope.active.values()))
        if inner.name == "tensor.require":
            return e.require(inner, [local[v] for v in inner.operands], list(scope.active.values()))
        return e.arith(inner, [local[v] for v in inner.operands])

    def _load(self, scope: Scope, v: Value, m: tuple[Dim, ...], positions: dict[str, Dim], fill: Any) -> Value:
        assert isinstance(v.type, TensorType)
        e = scope.e
        bounds = e.bounds()
        offset: Dim = 0
        for expr, stride in zip(m, v.type.layout, strict=True):
            offset = offset + substitute(expr, positions) * stride
        offset = simplify(offset, bounds)
        self.loaded.setdefault(v, set()).add(self.now)
        key = (v, offset, repr(fill), m if fill is not None else None)
        if key in scope.loads:
            return scope.loads[key]
        pairs, low = fill_masks(m, v.type.shape, positions, bounds) if fill is not None else ([], [])
        moving = free_symbols(offset).union(*(free_symbols(x) for x, _ in pairs))
        mask = [*pairs, *e.needed(self._active(scope, offset) if fill is None else [
            p for p in scope.active.values() if free_symbols(p[0]) & {"t0", "t1"} & moving])]
        value = e.load(self.buffers[v], offset, mask, low, 0 if fill is None else fill, streamed=self._is_streamed(v))
        scope.loads[key] = value
        return value

    def _is_streamed(self, v: Value) -> bool:
        """This stage is the first to read the operand, from memory, and does so little with it that memory bounds it."""
        if self.cache is None or self.by_columns or sum(self.bytes_of.values()) <= self.cache or self.bytes_of.get(v, 0) <= self.private_bytes:
            return False
        here = [op for op in self.frame.members if self.frame.stage[op] == self.now and (op["reductions"] or self.frame.is_full(op))]
        first = min(self.frame.stage[op] for op in self.frame.members if v in op.operands)
        return first == self.now and not any(is_expensive(op) for op in here)

    def store(self, scope: Scope, buffer: Value, place: Dim, value: Value) -> None:
        offset = self._at(scope, place)
        mask = [p for p in scope.active.values() if free_symbols(p[0]) & {"t0", "t1"} & free_symbols(offset)]
        scope.e.store(buffer, value, offset, scope.e.needed(mask))

    # -- reductions ---------------------------------------------------------------------------------------------------

    def initial(self, op: Operation, k: int, start: Scope | None = None) -> list[Value]:
        """Accumulators before the first step, which is that at `start` (on GPUs)."""
        e, kind = self.e, op["combine"][k]
        dtype = element_type(op.body.terminator.operands[k].type)
        if op in self.frame.online or op in self.frame.online.values():
            return [self._online_lanes().initial(e, kind, dtype)]
        if self._shifted_by(op) is not None:
            return []
        if op in self.frame.moments and self.gpu:
            assert start is not None
            first = self.summand(Scope(start.e, dict(start.at), dict(start.active)), self.frame.moments[op], 0)
            return initial_shifted(e, first, self._ragged(), self.tile.shape, self._inner_shape())
        if kind in ("argmax", "argmin"):
            return initial_extreme(e, kind, dtype, self.tile.shape)
        return [e.broadcast(e.builder.constant(identity_of(kind, dtype), dtype), self.tile.shape)]

    def _combine(self, scope: Scope, op: Operation, k: int, acc: list[Value]) -> list[Value]:
        """One step of a reduction: lanes outside the inner space contribute the neutral element."""
        e, b = scope.e, scope.e.builder
        if op in self.frame.moments and not self.gpu:  # its total came before
            _, _, d = scope.sums[self.frame.moments[op]]
            return [b.arith("add", acc[0], b.arith("mul", d, d))]
        value = self.summand(scope, op, k)
        if op in self.about:
            value = b.arith("sub", value, self.about[op])
        kind = op["combine"][k]
        dtype = element_type(op.body.terminator.operands[k].type)
        mask = e.mask_value([p for f, p in scope.active.items() if f in self.frame.inner])
        if kind in ("argmax", "argmin"):
            return better_of(b, value, self._place(scope, op), acc, mask, kind)
        if op in self.frame.moments:
            _, _, x = scope.sums[self.frame.moments[op]]
            return add_shifted(e, x, acc, mask)
        if mask is not None:
            value = b.arith("select", mask, value, identity_of(kind, dtype))
        if op in self.frame.online or op in self.frame.online.values():
            return [self._combine_online(scope, op, value, acc[0])]
        if self._shifted_by(op) is not None:
            scope.sums[op] = value, value, value
            return []
        made = b.arith(COMBINE_OPS[kind], acc[0], value)
        made = made if made.type == acc[0].type else e.broadcast(made, self.tile.shape)
        scope.sums[op] = acc[0], made, value
        return [made]

    def _place(self, scope: Scope, op: Operation) -> Value:
        """The number of the element that the op's body is at, among those that it reduces."""
        where: Dim = 0
        for d in range(len(op["dims"]) - op["reductions"], len(op["dims"])):
            where = where * op["dims"][d] + self._at(scope, self.frame.position[op][d])
        return scope.e.index_value(simplify(where, scope.e.bounds()))

    def _ragged(self) -> bool:
        """The last tile of an inner dimension is not full."""
        return any(self._extent(f) > 1 and not (isinstance(s := self.frame.sizes[f], int) and s % self._extent(f) == 0) for f in self.frame.inner)

    def _inner_shape(self) -> tuple[int, int]:
        """The tile along the inner dimensions alone: what their masks have."""
        rows, columns = self.tile.shape
        return (rows if self.tile.row in self.frame.inner else 1, columns if self.tile.vector in self.frame.inner else 1)

    def _combine_online(self, scope: Scope, op: Operation, value: Value, acc: Value) -> Value:
        """A running maximum, or a running sum that is rescaled when the maximum moves (`online.py`)."""
        if op in self.frame.online:
            return self._online_lanes().sum(scope.e, value, acc, scope.alpha[self.frame.online[op]])
        new, scope.values[op.result], scope.alpha[op] = self._online_lanes().maximum(scope.e, value, acc)
        return new

    def _online_lanes(self) -> Lanes:
        axes = self._inner_axes()
        along = [x for x in self.frame.accesses if self.tile.vector in free_symbols(x.offset)]
        if not self.gpu or self.tile.vector is None or not along:
            return Lanes(self.tile.shape, tuple(axes))
        return Lanes.of(self.tile.shape, axes, min(x.bytes for x in along), rows_aligned(self.frame, self.tile.vector))

    def _inner_axes(self) -> list[int]:
        return [a for a, f in ((0, self.tile.row), (1, self.tile.vector)) if f in self.frame.inner]

    def finish(self, top: Scope, keys: Sequence[Any], carried: Sequence[Value]) -> None:
        """Reduces accumulators across the tile and stores those that leave the kernel."""
        e, b = self.e, self.e.builder
        axes = self._inner_axes()
        slot = 0
        places: dict[Operation, int] = {}
        for op, k in keys:
            places.setdefault(op, slot)
            slot += self._slots(op, k)
        slot = 0
        for op, k in keys:
            kind = op["combine"][k]
            r = op.results[k]
            if kind in ("argmax", "argmin"):
                value = place_of(b, carried[slot:slot + 2], kind, axes, self._reduce)
                slot += 2
            else:
                value = self._whole(op, kind, axes, carried, slot, places)
                slot += self._slots(op, k)
                value = self._about(op, value)
            self.outer_values[r] = value
            if r in self.stores:
                with b.at(op.location):
                    here = Scope(e, top.at, {f: p for f, p in top.active.items() if f not in self.frame.inner})
                    self.store(here, self.buffers[r], self.stores[r], value)

    def _whole(self, op: Operation, kind: str, axes: Sequence[int], carried: Sequence[Value], slot: int, places: dict[Operation, int]) -> Value:
        """A reduction's result, from the accumulators of all lanes."""
        if op in self.frame.online:
            maximum = self.frame.online[op]
            return self._online_lanes().whole_sum(self.e, carried[slot], carried[places[maximum]], self.outer_values[maximum.result])
        if op in self.frame.online.values():
            return self._online_lanes().whole(self.e, carried[slot])
        value = self._lanes(op, carried, slot, places)
        for axis in axes:
            value = self._reduce(value, axis, kind)
        return value

    def _lanes(self, op: Operation, carried: Sequence[Value], slot: int, places: dict[Operation, int]) -> Value:
        """What each lane adds to a reduction; `places`: the first accumulator of every op."""
        squares = self._shifted_by(op)
        if squares is not None:
            return sum_of_shifted(self.e, carried[places[squares]:places[squares] + 4])
        total = self.frame.moments.get(op)
        if total is None or not self.gpu:
            return carried[slot]
        return spread_of_shifted(self.e, carried[slot:slot + 4], self.outer_values[total.result], self._count())

    def _count(self) -> Dim:
        return product(self.frame.sizes[f] for f in self.frame.inner)

    def _about(self, op: Operation, value: Value) -> Value:
        """On a CPU: a reduction from what the lanes have added up about one number of the row."""
        if op in self.about:
            self.apart[op] = value
            return total_about(self.e, value, self.about[op], self._count())
        total = self.frame.moments.get(op)
        return value if total is None or self.gpu else spread_about(self.e, value, self.apart[total], self._count())

    def _mean(self, op: Operation) -> list[Value]:
        """Of a row whose sum is counted from a number of its own; [] for what is none."""
        total = self.frame.means.get(op)
        return [] if total not in self.about else [mean_about(self.e, self.apart[total], self.about[total], self._count())]

    def _reduce(self, value: Value, axis: int, kind: str, b: Builder | None = None) -> Value:
        t = value.type
        assert isinstance(t, TileType)
        if t.shape[axis] == 1:
            return value
        shape = tuple(1 if i == axis else s for i, s in enumerate(t.shape))
        return (b or self.e.builder).op("tile.reduce", value, type=TileType(shape, t.dtype), axis=axis, kind=kind)  # type: ignore[arg-type]

    # -- members computed once per outer point -----------------------------------------------------

    def outer_members(self, top: Scope, members: list[Operation]) -> None:
        scope = Scope(self.e, top.at, {f: p for f, p in top.active.items() if f not in self.frame.inner})
        for op in members:
            for r, value in zip(op.results, self._mean(op) or self._body(scope, op), strict=True):
                self.outer_values[r] = value
                if r in self.stores:
                    self.store(scope, self.buffers[r], self.stores[r], value)


def emit_loops(frame: Frame, tile: TileChoice, e: Emitter, buffers: dict[Value, Value], *, gpu: bool = False, private_bytes: int = 0,
               cache: int | None = None, near: bool = False) -> list[Dim]:
    """Writes the body of the kernel; returns the grid. A program keeps up to `private_bytes` between its stages in memory of its own; what moves more
    than `cache` bytes has its large operands from memory, where lines are asked for shortly before their use if `near`. On a GPU a pass over memory
    costs more than computing a value twice."""
    if len(frame.sizes) == 0 and frame.inner:
        raise IRError("a frame without dimensions cannot have inner ones")
    lowering = Lowering(frame, tile, e, buffers, gpu, private_bytes, cache, near)
    if tile.rows > 1 or gpu and not lowering.is_persistent():
        make_moments(frame)
    if gpu and not lowering.is_persistent():
        make_online(frame)
    return lowering.emit()
