"""Streams on CPUs: register tiles, and scratch memory that stays in the first-level cache.

One program computes a block of rows. For each block of the stream, row tile by row tile:

  scores     [rows, steps] by rank-1 updates, a register tile at a time, into scratch
  weights    row by row: the running maxima; then the pointwise members, in place of the scores, and their running sums
  products   each second contraction, read from scratch, rescaled, updated, written back

The right operand of a first contraction is packed along the stream (`passes/pack.py`), that of a second is contiguous along its columns.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...ir import BufferType, Dim, Operation, Target, TileType, Value, element_type, sym
from ...ir.dialects.tensor import fill_of
from ...ir.expr import ceildiv, floordiv, free_symbols, maximum, minimum, mod, product, substitute
from ...ir.ranges import delinearize, simplify, split_linear, upper_bound
from ...ir.types import DTYPES, index
from ..stream_access import packed, reduced_order, stream_side
from ..stream_form import Stream
from ..structured import identity_of
from .conditions import alive_panels, deciding
from .emit import COMBINE_OPS, Emitter
from .stream import Scope, StreamLowering, offset_in, with_shape

__all__ = ["CpuStream"]


class CpuStream(StreamLowering):
    """See the module docstring. `tile` is the register tile."""

    row_tiles = 4

    def __init__(self, s: Stream, outputs: Sequence[Value], e: Emitter, buffers: dict[Value, Value], tile: tuple[int, int], relaxed: bool = True):
        super().__init__(s, outputs, e, buffers, tile, relaxed)
        # Long blocks visit the second contractions' sums less often; panels at their ends that a row tile does not need are left out.
        self.panels = 4 if len(s.firsts) > 1 else 16
        self.conditions = deciding(s)

    def emit(self, target: Target) -> list[Dim]:
        s, e, (mr, nr) = self.s, self.e, self.tile
        for k, f in enumerate(s.batch):
            pid = e.builder.op("tile.program_id", type=index, axis=k)
            self.batch_at[f] = e.fresh(pid, 0, s.sizes[f] - 1)
        self.rows, self.steps = mr * self.row_tiles, nr * self.panels
        if isinstance(s.row_count, int):
            self.rows = min(self.rows, -(-s.row_count // mr) * mr)
        blocks = ceildiv(s.row_count, self.rows)
        p = e.fresh(e.builder.op("tile.program_id", type=index, axis=len(s.batch)), 0, blocks - 1)
        self.start = p * self.rows
        self.columns = product(s.columns)
        self.running = [*s.reductions, *s.seconds]
        self.state = {op: self._scratch(element_type(op.result.type), self._padded_columns() if op in s.seconds else 1) for op in self.running}
        self.alphas = {op.result: self._scratch(element_type(op.result.type), 1) for op in s.reductions if op.result in s.shifts.values()}
        self.scores = {op: self._scratch(element_type(op.result.type), self.steps) for op in s.firsts}
        self.weights = {op: self.scores[s.streamed(op).defining_op] if s.streamed(op).defining_op in s.firsts else  # type: ignore[index]
                        self._scratch(element_type(s.streamed(op).type), self.steps) for op in s.seconds}
        if self.conditions:
            self.slots = e.builder.op("tile.alloca", type=BufferType((2,), DTYPES["i64"]))
        self._for_row_tiles(e, self._initialise)
        whole = Emitter(e.builder, (self.rows, nr), e.symbols, e.variables, e.ranges, e.coarse)
        saved, self.tile, self.e = (self.tile, self.e), (self.rows, nr), whole
        ranges = self.ranges(self.start + sym("t0"), self.steps)
        self.tile, self.e = saved
        for start, stop, masked in ranges:
            def block(inner: Emitter, j: Dim, _: list[Value], masked: bool = masked, stop: Dim = stop) -> list[Value]:
                self._for_row_tiles(inner, lambda ee, r: self._block(ee, r, j, stop, masked))
                return []
            e.loop(floordiv(start, self.steps), ceildiv(stop, self.steps), 1, [], block)
        self._for_row_tiles(e, self._finish)
        return [*(s.sizes[f] for f in s.batch), blocks]

    # -- scratch memory and loops -----------------------------------------------------------------------------------------

    def _padded_columns(self) -> int:
        nr = self.tile[1]
        return -(-int(self.columns) // nr) * nr  # type: ignore[arg-type]

    def _scratch(self, dtype: object, width: int) -> Value:
        return self.e.builder.op("tile.alloca", type=BufferType((self.rows, width), dtype))  # type: ignore[arg-type]

    def _for_row_tiles(self, e: Emitter, body) -> None:  # type: ignore[no-untyped-def]
        """body(emitter, r) for the first row r of each row tile of the block."""
        mr = self.tile[0]
        left = minimum(self.rows, self.s.row_count - self.start)

        def step(inner: Emitter, r: Dim, _: list[Value]) -> list[Value]:
            body(with_shape(inner, self.tile), r * mr)
            return []

        e.loop(0, ceildiv(left, mr), 1, [], step)

    def _row(self, r: Dim) -> Dim:
        """The linear row of a lane; lanes past the last row stand on it."""
        m = self.start + r + sym("t0")
        exact = isinstance(self.s.row_count, int) and self.s.row_count % self.tile[0] == 0
        return m if exact else minimum(m, self.s.row_count - 1)

    def _place(self, r: Dim, width: int, at: Dim) -> Dim:
        return (r + sym("t0")) * width + at

    def _width(self, op: Operation) -> int:
        return self._padded_columns() if op in self.s.seconds else 1

    def _panels(self, e: Emitter, body) -> None:  # type: ignore[no-untyped-def]
        """body(emitter, q) for each panel of columns."""
        def step(inner: Emitter, q: Dim, _: list[Value]) -> list[Value]:
            body(with_shape(inner, self.tile), q * self.tile[1])
            return []

        e.loop(0, self._padded_columns() // self.tile[1], 1, [], step)

    # -- the parts of the program -----------------------------------------------------------------------------------------

    def _initialise(self, e: Emitter, r: Dim) -> None:
        for op in self.running:
            if op in self.s.seconds:
                def clear(inner: Emitter, n: Dim, op: Operation = op) -> None:
                    inner.store(self.state[op], self.neutral(inner, op, self.tile), self._place(r, self._width(op), n + sym("t1")))
                self._panels(e, clear)
            else:
                e.store(self.state[op], self.neutral(e, op, (self.tile[0], 1)), self._place(r, 1, 0))

    def _block(self, e: Emitter, r: Dim, j: Dim, stop: Dim, masked: bool) -> None:
        """One row tile against block j of the stream."""
        base = j * self.steps
        left = minimum(self.steps, stop - base) if masked else self.steps
        nr = self.tile[1]
        low, high = self._reach(e, r) if masked else (0, None)
        if high is not None:
            left = minimum(left, maximum(0, high - base))
        if low != 0:
            low = maximum(0, floordiv(low - base, nr))
        if not self.conditions:
            self._steps(e, r, base, low, left, masked)
            return
        first, end = self._needed(e, r, base, low, left)

        def some(inner: Emitter, _: Dim, __: list[Value]) -> list[Value]:
            self._steps(with_shape(inner, self.tile), r, base, first, minimum(left, end * nr), masked)
            return []

        e.loop(0, minimum(1, maximum(0, end - first)), 1, [], some)

    def _reach(self, e: Emitter, r: Dim) -> tuple[Dim, Dim | None]:
        """(first, end) of the steps outside of which positions mask all rows of a tile: 0 and None where nothing is known."""
        s, known = self.s, e.bounds()
        first: Dim = 0
        end: Dim | None = None
        at = self.frame_at(self.start + r + sym("t0"), 0)
        for _, gap in s.alive.pairs if len(s.stream) == 1 else ():
            linear = split_linear(gap, s.stream[0])
            most = upper_bound(simplify(substitute(linear[1], at), known), {"t0": (0, self.tile[0] - 1)}) if linear is not None else None
            if linear is None or most is None or linear[0] not in (1, -1):
                continue
            if linear[0] == -1:  # alive where t < rest
                end = most if end is None else minimum(end, most)
            else:  # alive where t > -rest
                first = maximum(first, 1 - most)
        return first, end

    def _needed(self, e: Emitter, r: Dim, base: Dim, low: Dim, left: Dim) -> tuple[Dim, Dim]:
        """The panels of a block, first and end, that the data of the masks leave to a row tile."""
        m, nr, length = self._row(r), self.tile[1], self.s.length

        def place(q: Dim) -> tuple[dict[str, Dim], list[tuple[Dim, Dim]]]:
            t = base + q * nr + sym("t1")
            return self.frame_at(m, t), [(t, length)]

        return alive_panels(self, e, self.conditions, low, ceildiv(left, nr), place, self.slots)

    def _steps(self, e: Emitter, r: Dim, base: Dim, first: Dim, left: Dim, masked: bool) -> None:
        """One row tile against the steps of the block that starts at `base`, from panel `first` to step `left`."""
        s, (mr, nr) = self.s, self.tile
        m = self._row(r)

        def score(inner: Emitter, q: Dim, _: list[Value]) -> list[Value]:
            ee = with_shape(inner, self.tile)
            self._ask_ahead(ee, r, base + q * nr)
            for op in s.firsts:
                with ee.builder.at(op.location):
                    ee.store(self.scores[op], self._first(ee, op, m, base + q * nr), self._place(r, self.steps, q * nr + sym("t1")))
            return []

        e.loop(first, ceildiv(left, nr), 1, [], score)
        if s.reductions or any(s.streamed(op).defining_op not in s.firsts for op in s.seconds):
            def one(inner: Emitter, k: Dim, _: list[Value]) -> list[Value]:
                self._weigh(inner, r + k, base, first, left, masked)
                return []
            e.loop(0, mr, 1, [], one)
        alpha: dict[Value, Value] = {v: e.load(scratch, self._place(r, 1, 0)) for v, scratch in self.alphas.items()}
        for op in s.seconds:
            with e.builder.at(op.location):
                self._second(e, op, r, base, first, left, alpha)

    def _ask_ahead(self, e: Emitter, r: Dim, t: Dim) -> None:
        """Asks for what the members read at every point of a tile (a mask, a bias), while its scores are computed: rows far apart, of which a
        block is too short a piece for the processor to see it coming."""
        s, bounds = self.s, e.bounds()
        frame = {f: sym(f) for f in s.sizes}
        asked: set[tuple[Value, Dim]] = set()
        for op in (*s.full, *s.reductions):
            along = [sym(f) for f in s.stream] if op in s.reductions else []
            for v, m in zip(op.operands, op["maps"], strict=True):
                if m is None or s.kind_of(v) or fill_of(op, list(op.operands).index(v)) is not None:
                    continue
                place = {f"d{j}": substitute(x, frame) for j, x in enumerate((*s.position[op], *along))}
                offset = offset_in(v, m, place, bounds)
                walk = split_linear(offset, s.stream[-1])
                if not free_symbols(offset) & set(s.rows) or walk is None or walk[0] != 1 or (v, offset) in asked:
                    continue
                asked.add((v, offset))
                for k in range(self.tile[0]):
                    at = self.frame_at(minimum(self.start + r + k, s.row_count - 1), t)
                    e.prefetch(self.buffers[v], simplify(substitute(offset, at), bounds))

    def _weigh(self, e: Emitter, row: Dim, base: Dim, first: Dim, left: Dim, masked: bool) -> None:
        """The pointwise members of one row of a block, and its reductions, along the row: a few vectors at a time, for those of a whole tile
        would not fit the registers beside what an exponential needs."""
        s, nr, b = self.s, self.tile[1], e.builder
        if not masked and not self.conditions and self.steps % (2 * nr) == 0:
            nr *= 2  # whole blocks: more vectors at a time, for an exponential is one long chain
        known = {} if masked else dict(s.alive.known)
        m = self.start + row
        if not (isinstance(s.row_count, int) and s.row_count % self.tile[0] == 0):
            m = minimum(m, s.row_count - 1)
        tops = [op for op in s.reductions if op.result in s.shifts.values()]
        others = [op for op in s.reductions if op not in tops]
        line = with_shape(e, (1, nr))
        before = {op: e.load(self.state[op], row) for op in s.reductions}

        def scope(x: Emitter, q: Dim) -> Scope:
            t = base + q * nr + sym("t1")
            here = Scope(x, self.frame_at(m, t), [(t, s.length)], known=known)
            self.without_scales(here)
            for op in s.firsts:
                here.values[op.result] = x.load(self.scores[op], row * self.steps + q * nr + sym("t1"))
            return here

        def reduced(ops: Sequence[Operation], totals: Sequence[Value]) -> list[Value]:
            return [b.arith(COMBINE_OPS[op["combine"][0]], first, b.op(
                "tile.reduce", total, type=TileType((1, 1), element_type(total.type)), axis=1, kind=op["combine"][0]))
                for op, total, first in zip(ops, totals, firsts, strict=True)]

        def largest(x: Emitter, q: Dim, carried: list[Value]) -> list[Value]:
            here = scope(x, q)
            return [self._combined(here, op, acc, masked) for op, acc in zip(tops, carried, strict=True)]

        tiles = ceildiv(left, nr)
        rows: dict[Value, Value] = {}
        alpha: dict[Value, Value] = {}
        if tops:
            firsts = [before[op] for op in tops]
            made = line.loop(first, tiles, 1, [self.neutral(line, op, (1, nr)) for op in tops], largest)
            for op, top in zip(tops, reduced(tops, made), strict=True):
                with b.at(op.location):
                    rows[op.result] = self.safe(e, top)
                    alpha[op.result] = self.exp(e, b.arith("sub", before[op], rows[op.result]))
                    e.store(self.alphas[op.result], alpha[op.result], row)
                    e.store(self.state[op], top, row)

        def weigh(x: Emitter, q: Dim, carried: list[Value]) -> list[Value]:
            here = scope(x, q)
            here.values |= rows
            out = [self._combined(here, op, acc, masked) for op, acc in zip(others, carried, strict=True)]
            for op in s.seconds:
                streamed = s.streamed(op)
                if streamed.defining_op not in s.firsts:
                    x.store(self.weights[op], self.value(here, streamed), row * self.steps + q * nr + sym("t1"))
            return out

        if others or any(s.streamed(op).defining_op not in s.firsts for op in s.seconds):
            firsts = []
            for op in others:
                shift = s.shifts[op]
                firsts.append(before[op] if shift is None else b.arith("mul", before[op], alpha[shift]))
            made = line.loop(first, tiles, 1, [self.neutral(line, op, (1, nr)) for op in others], weigh)
            for op, total in zip(others, reduced(others, made), strict=True):
                e.store(self.state[op], total, row)

    def _combined(self, scope: Scope, op: Operation, acc: Value, masked: bool) -> Value:
        """acc [1, steps of a register tile] combined with this one's contribution to a reduction."""
        s, e = self.s, scope.e
        b, kind = e.builder, op["combine"][0]
        with b.at(op.location):
            x, = self.body(scope, op, [sym(f) for f in s.stream])
            if not isinstance(x.type, TileType) or x.type.shape != e.shape:
                x = e.broadcast(x, e.shape)
            lanes = e.mask_value([p for p in scope.active if "t1" in free_symbols(p[0])]) if masked else None
            if lanes is not None:
                x = b.arith("select", lanes, x, identity_of(kind, element_type(x.type)))
            return b.arith(COMBINE_OPS[kind], acc, x)

    def _first(self, e: Emitter, op: Operation, m: Dim, t: Dim) -> Value:
        """A register tile of scores: rank-1 updates over the whole width."""
        s, (mr, nr) = self.s, self.tile
        right = stream_side(s, op)
        sizes = op["dims"][len(s.position[op]):]
        acc = TileType((mr, nr), element_type(op.result.type))
        zero = e.broadcast(e.builder.constant(0, acc.dtype), acc.shape)  # type: ignore[arg-type]

        def update(inner: Emitter, k: Dim, carried: list[Value]) -> list[Value]:
            at = delinearize(k, sizes)
            rows, steps = self.frame_at(m, 0), self.frame_at(0, t + sym("t1"))
            mask = [] if packed(op, right) else [(t + sym("t1"), s.length)]
            a = self.read(inner, op, 1 - right, rows, at, [], cast=True)
            b = self.read(inner, op, right, steps, at, mask, cast=True)
            return [self._rank1(inner, a, b, carried[0])]

        return with_shape(e, self.tile).loop(0, product(sizes), 1, [zero], update, unroll=4)[0]

    def _rank1(self, e: Emitter, a: Value, b: Value, acc: Value) -> Value:
        mr, nr = self.tile
        left = a if isinstance(a.type, TileType) and a.type.shape == (mr, 1) else e.broadcast(a, (mr, 1))
        right = b if isinstance(b.type, TileType) and b.type.shape == (1, nr) else e.broadcast(b, (1, nr))
        return e.builder.op("tile.dot", left, right, acc, type=acc.type)

    def _second(self, e: Emitter, op: Operation, r: Dim, base: Dim, first: Dim, left: Dim, alpha: dict[Value, Value]) -> None:
        """acc = acc * alpha + weights @ other, a panel of columns at a time."""
        s, nr = self.s, self.tile[1]
        which = next(k for k, v in enumerate(op.operands) if v is s.streamed(op))
        order = reduced_order(s, op, which)
        width = self._width(op)
        ragged = not packed(op, 1 - which) and mod(self.columns, nr) != 0
        shift = s.shifts[op]

        def panel(inner: Emitter, n: Dim) -> None:
            b = inner.builder
            home = self._place(r, width, n + sym("t1"))
            acc = inner.load(self.state[op], home)
            if shift is not None:
                acc = b.arith("mul", acc, alpha[shift])

            def update(deeper: Emitter, t: Dim, carried: list[Value]) -> list[Value]:
                column = n + sym("t1")
                at = self.frame_at(0, base + t) | self.column_at(column)
                weight = self._casts(deeper, op, which, deeper.load(self.weights[op], self._place(r, self.steps, t)))
                other = self.read(deeper, op, 1 - which, at, [at[f] for f in order], [(column, self.columns)] if ragged else [], cast=True)
                return [self._rank1(deeper, weight, other, carried[0])]

            total = inner.loop(first * nr, left, 1, [acc], update, unroll=4)[0]
            inner.store(self.state[op], total, home)

        self._panels(e, panel)

    def _finish(self, e: Emitter, r: Dim) -> None:
        s = self.s
        m = self.start + r + sym("t0")
        inside = (m, s.row_count)
        rows = Scope(e, self.frame_at(self._row(r), 0), [inside])
        for op in s.reductions:
            rows.values[op.result] = e.load(self.state[op], self._place(r, 1, 0))
            rows.values[op.result] = self.scaled(rows, op, rows.values[op.result])
        wide: Sequence[Value] = [v for v in self.outputs if s.kind_of(v) in ("second", "tail")]
        for out in self.outputs:
            if out not in wide:
                self.store(rows, out, self.value(rows, out))
        for op in s.seconds:
            for w, *_ in s.scales[op]:
                self.value(rows, w)

        def panel(inner: Emitter, n: Dim) -> None:
            column = n + sym("t1")
            here = Scope(inner, self.frame_at(self._row(r), 0) | self.column_at(column), [inside, (column, self.columns)], dict(rows.values))
            for op in s.seconds:
                acc = inner.load(self.state[op], self._place(r, self._width(op), column))
                here.values[op.result] = self.scaled(here, op, acc)
            for out in wide:
                self.store(here, out, self.value(here, out))

        self._panels(e, panel)
