"""Contractions (matmul, convolution) with their elementwise epilogue as kernels.

Dimensions are sorted by who reads them: batch (both operands), M (the left one), N (the right one), K (summed). M and N are walked as one
linear index each, so any number of dimensions in any layout is a GEMM. One program computes
  on a CPU:  one column panel of NR columns, for a block of rows, an MR x NR register tile at a time: K rank-1 updates each;
  on a GPU:  a BM x BN tile, K in steps of BK by tile.dot.
The right operand should be contiguous along N; `passes/pack.py` sees to that on CPUs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from ...ir import BufferType, Dim, Operation, Target, TensorType, TileType, Value, element_type, sym
from ...ir.dialects.tensor import fill_of, parallel_dims
from ...ir.expr import ceildiv, free_symbols, minimum, product, substitute
from ...ir.ranges import delinearize, simplify
from ...ir.types import index
from ..structured import PARTIAL
from .bodies import evaluate_body
from .emit import Emitter, Pair, fill_masks
from .partial import Block, Program, fold
from .roles import EXCHANGED, exchanged, roles_of, stride_along
from .rows import Rows, copy_turned, make_rows

__all__ = ["COLUMNS", "GROUPS", "K_BLOCK", "MATRIX", "ROWS", "Contraction", "as_tile", "emit_contraction", "offset_of", "rows_in_block", "with_shape"]


MATRIX = (32, 32, 32)
"""Rows (or half as many), columns and depth of the products that are made on a matrix unit."""
GROUPS = {"pairs": 2, "matrices": 2, "words": 2, "bytes": 4, "signed bytes": 4}
"""Forms of a packed right operand: how many elements of a column lie side by side."""
DEPTHS = {**GROUPS, "matrices": MATRIX[2]}
"""Elements along K that one `tile.dot` takes."""
UNROLL = 4
"""Copies of the innermost loop."""
ROWS, COLUMNS = 240, 256
"""Most rows of the left operand that a program works through, and about how many columns where that does not leave threads idle."""
K_BLOCK = 1024
"""Most steps of K between two visits to a tile's sums in memory: more gain nothing, as one visit then costs under one percent."""
PART = 256
"""Most steps of K that are summed by themselves: the error of a long sum grows with its length, that of sums of sums hardly."""
MATRIX_PART = 1024
"""The same on a matrix unit, which adds two products at a time, and whose sums go through memory to be added: a tenth of its time for 256."""
TURNED = 64
"""Columns of a program, and steps of K, from which on a left operand that lies with its rows side by side is copied first."""
PROGRAMS = 8
"""Programs that a launch should have at least, to share out among threads."""
EVEN, LEAST_TILES = 16, 3
"""Programs from which on two threads divide a launch evenly whether they are odd or not (of five, one has three), and the tiles of rows that a
program has at least if it is made smaller for that."""
Limits = tuple[int, int, int]
"""Rows, steps of K and columns of a program on a CPU, as they were measured to be best; 0 for the model's."""


def rows_in_block(m: Dim, mr: int, most: int) -> int:
    """Rows per program: a multiple of `mr` that is at most `most`, equal blocks where m is known."""
    most = max(mr, most // mr * mr)
    if not isinstance(m, int) or m <= 0:
        return most
    return min(most, -(-m // (-(-m // most) * mr)) * mr)


def shared_rows(m: Dim, rows: int, mr: int, others: Dim) -> int:
    """`rows` per program, or as few less as it takes for an even division between two threads, where `others` are the programs along other axes."""
    if not isinstance(m, int) or not isinstance(others, int):
        return rows
    tiles, blocks = -(-m // mr), -(-m // rows)
    for n in range(blocks, max(1, tiles // LEAST_TILES) + 1):
        fewer = rows if n == blocks else -(-tiles // n) * mr
        programs = others * -(-m // fewer)
        if programs % 2 == 0 or programs >= EVEN:
            return fewer
    return rows


def emit_contraction(products: list[Operation], epilogue: list[Operation], outputs: list[Value], target: Target, e: Emitter,
                     buffers: dict[Value, Value], tile: tuple[int, int, int], limits: Limits = (0, 0, 0),
                     prologue: Sequence[Operation] = ()) -> list[Dim]:
    """Writes the body of a CPU kernel; returns the grid. Products beside the first are its siblings (`passes/siblings.py`); `prologue` is what
    makes operands: the rows of the left one (`passes/prologue.py`), or vectors of a right one (`passes/unpack.py`)."""
    first, *others = (Contraction(p, epilogue, outputs, e, buffers, tile, limits) for p in products)
    for c in (first, *others):
        c.unpacking = next((x for x in prologue if x is c.op.operands[c.roles.right].defining_op), None)
    rows = next((x for x in prologue if x is first.op.operands[first.roles.left].defining_op), None)
    return first.cpu(target, others, rows)


class Contraction:
    """What both targets share: where operands are read, and how the result is finished and stored."""

    def __init__(self, op: Operation, epilogue: list[Operation], outputs: list[Value], e: Emitter, buffers: dict[Value, Value],
                 tile: tuple[int, int, int], limits: Limits = (0, 0, 0), *, turned: bool = False):
        found = roles_of(op)
        assert found is not None
        right = found.right
        found = replace(found, k=tuple(sorted(found.k, key=lambda d: -stride_along(op, right, d))))
        if turned:
            found = exchanged(found)
        self.op, self.epilogue, self.outputs, self.e, self.buffers, self.roles = op, epilogue, outputs, e, buffers, found
        self.partial = [x for x in epilogue if PARTIAL in x.attributes]
        self.kept: Block | None = None  # for partial reductions of columns
        for kind, size in (x[PARTIAL] for x in self.partial):  # what a part is, the op that merges the parts knows
            limits = (size, *limits[1:]) if kind == "rows" else (*limits[:2], size)
        self.tile, self.limits = tile, limits
        dims = op["dims"]
        self.m_sizes, self.n_sizes = [dims[d] for d in found.m], [dims[d] for d in found.n]
        self.k_sizes = [dims[d] for d in found.k]
        self.m, self.n = product(self.m_sizes), product(self.n_sizes)
        self.acc_type = TileType((tile[0], tile[1]), element_type(op.result.type))
        self.block: Rows | None = None
        self.unpacking: Operation | None = None
        self.depth = DEPTHS.get(op.attributes.get("_packed"), 1)  # type: ignore[arg-type]
        if self.depth > 1:  # elements of the last K dimension in one step
            self.k_sizes[-1] = self.k_sizes[-1] // self.depth

    # -- positions ----------------------------------------------------------------------------------------------------

    def positions(self, batch: list[Dim], m: Dim, n: Dim, k: list[Dim], e: Emitter) -> dict[str, Dim]:
        bounds = e.bounds()
        at: dict[str, Dim] = {}
        for dims, values in ((self.roles.batch, batch), (self.roles.m, delinearize(m, self.m_sizes)), (self.roles.n, self._column(n)),
                             (self.roles.k, k)):
            for d, value in zip(dims, values, strict=True):
                at[f"d{d}"] = simplify(value, bounds)
        return at

    @property
    def taps(self) -> int:
        """Panels that follow each other in a weight's gradient with packed windows: the taps of the same channels. Else 1."""
        whole = "_windows" in self.op.attributes and self.n_sizes[-1] % self.tile[1] == 0
        return prod(self.n_sizes[:-1]) if whole else 1  # type: ignore[arg-type]

    def _column(self, n: Dim) -> list[Dim]:
        """Positions of the dimensions of N at column n. A panel of channels is met at all taps before the next one: its windows are the same
        memory, and so is what is stored."""
        if self.taps == 1:
            return list(delinearize(n, self.n_sizes))
        panel, lane = n // self.tile[1], n % self.tile[1]
        return [*delinearize(panel % self.taps, self.n_sizes[:-1]), panel // self.taps * self.tile[1] + lane]

    def read(self, e: Emitter, i: int, at: dict[str, Dim], mask: list[Pair], cast: bool = True) -> Value:
        """Operand i at a position, cast as the body says (unless `cast` is off)."""
        v, m = self.op.operands[i], self.op["maps"][i]
        fill = fill_of(self.op, i)
        bounds = e.bounds()
        pairs, low = fill_masks(m, v.type.shape, at, bounds) if fill is not None else ([], [])  # type: ignore[attr-defined]
        offset = offset_of(v, m, at, bounds)
        value = e.load(self.buffers[v], offset, [*pairs, *e.needed(mask)], low, 0 if fill is None else fill)
        return self.convert(e, i, value) if cast else value

    def convert(self, e: Emitter, i: int, value: Value) -> Value:
        """Operand i cast as the body says."""
        x = next(iter(self.op.body.args[i].uses))[0]
        while x.name == "arith.cast":
            value = e.arith(x, [value])
            x = next(iter(x.result.uses))[0]
        return value

    # -- epilogue -----------------------------------------------------------------------------------------------------

    def finish(self, e: Emitter, acc: Value, batch: list[Dim], m: Dim, n: Dim, mask: list[Pair],
               siblings: Mapping[Operation, Value] | None = None, program: Program | None = None) -> None:
        """Applies the elementwise members to the accumulator (and those of contractions of the same space), stores the outputs, and folds
        the tile into the partial reductions of its `program`."""
        bounds = e.bounds()
        frame = self._frame(e, batch, m, n)
        sums = {self.op: acc, **(siblings or {})}
        values: dict[Value, Value] = {op.result: v for op, v in sums.items()}
        loads: dict[Any, Value] = {}
        place = self._places(sums)
        for op in (x for x in self.epilogue if x not in self.partial):
            at = {f"d{j}": frame[f] for j, f in enumerate(place[op])}
            with e.builder.at(op.location):
                self._member(e, op, at, values, loads, mask, bounds)
        for out in self.outputs:
            maker = out.defining_op
            assert maker is not None and isinstance(out.type, TensorType)
            if maker in self.partial:
                continue
            index_of = [frame[f] for f in place[maker]]
            offset: Dim = 0
            for x, stride in zip(index_of, out.type.layout, strict=True):
                offset = offset + x * stride
            e.store(self.buffers[out], values[out], simplify(offset, bounds), e.needed(mask))
        if program is not None and self.kept is not None:
            self.kept.keep(e, values, program.place)
        of_rows = [op for op in self.partial if op[PARTIAL][0] == "rows"]
        if of_rows:
            assert program is not None
            where = {op: [frame[f] for f in dims] for op, dims in place.items()}
            fold(e, of_rows, where, program, lambda op, at: self._member(e, op, at, values, loads, mask, bounds), values, self.buffers)

    def _frame(self, e: Emitter, batch: list[Dim], m: Dim, n: Dim) -> list[Dim]:
        """Positions of the parallel dimensions."""
        base = self.positions(batch, m, n, [0] * len(self.k_sizes), e)
        return [base[f"d{d}"] for d in range(len(parallel_dims(self.op)))]

    def _places(self, products: Iterable[Operation]) -> dict[Operation, list[int]]:
        """The contraction's dimension for each dimension of the products and of the elementwise members."""
        count = len(parallel_dims(self.op))
        place = {op: list(range(count)) for op in products}
        for op in (x for x in self.epilogue if x not in self.partial):
            dims: list[Any] = [None] * len(op["dims"])
            for v, mp in zip(op.operands, op["maps"], strict=True):
                if v.defining_op in place and mp is not None:
                    for x, f in zip(mp, place[v.defining_op], strict=True):  # type: ignore[index]
                        if isinstance(x, int):
                            continue
                        dims[int(str(x)[1:])] = f
            for j, f in enumerate(dims):
                if f is None:
                    used = {x for x in dims if x is not None}
                    dims[j] = next(f for f in range(count) if f not in used and self.op["dims"][f] == op["dims"][j])
            place[op] = dims
        return place

    def _member(self, e: Emitter, op: Operation, at: dict[str, Dim], values: dict[Value, Value], loads: dict[Any, Value], mask: list[Pair],
                bounds: Any) -> None:
        def operand(i: int) -> Value:
            v, mp, fill = op.operands[i], op["maps"][i], fill_of(op, i)
            if v in values:
                return values[v]
            pairs, low = fill_masks(mp, v.type.shape, at, bounds) if fill is not None else ([], [])  # type: ignore[attr-defined]
            offset = offset_of(v, mp, at, bounds)
            key = (v, offset, repr(fill))
            if key not in loads:
                active = [p for p in mask if free_symbols(p[0]) & {"t0", "t1"} & free_symbols(offset)]
                loads[key] = e.load(self.buffers[v], offset, [*pairs, *e.needed(active)], low, 0 if fill is None else fill)
            return loads[key]

        for r, value in zip(op.results, evaluate_body(e, op, at, operand, self.buffers, mask), strict=True):
            shape = self.acc_type.shape
            if not isinstance(value.type, TileType) or value.type.shape != shape:
                value = e.broadcast(value, shape)  # type: ignore[arg-type]
            values[r] = value

    # -- the two kernels ----------------------------------------------------------------------------------------------

    def _batch(self, e: Emitter, axis: int) -> list[Dim]:
        out = []
        for k, d in enumerate(self.roles.batch):
            pid = e.builder.op("tile.program_id", type=index, axis=axis + k)
            out.append(e.fresh(pid, 0, self.op["dims"][d] - 1))
        return out

    def _zero(self, e: Emitter) -> Value:
        return e.broadcast(e.builder.constant(0, self.acc_type.dtype), self.acc_type.shape)  # type: ignore[arg-type]

    def _k_loops(self, e: Emitter, acc: Value, step: Any, ks: list[Dim], within: tuple[Dim, Dim] | None) -> Value:
        """Nested loops over the K dimensions after `ks`, the first over the range `within`; `step(emitter, positions, acc)` adds one slice."""
        rest = self.k_sizes[len(ks):]
        if not rest:
            return step(e, ks, acc)
        lower, upper = within if within is not None else (0, rest[0])

        def body(inner: Emitter, i: Dim, carried: list[Value]) -> list[Value]:
            return [self._k_loops(inner, carried[0], step, [*ks, i], None)]

        steps = upper - lower
        unroll = steps if isinstance(steps, int) and steps <= 2 * UNROLL else UNROLL  # a short window is written out: no loop around few steps
        if self.op.attributes.get("_packed") == "words":
            unroll = 1  # LLVM sums the products of several steps first, and runs out of registers
        return e.loop(lower, upper, 1, [acc], body, unroll=unroll if len(rest) == 1 else 1)[0]

    def _blocking(self, target: Target) -> tuple[int, tuple[int, int] | None]:
        """(rows per program, (d, length)): K is cut into blocks of `length` steps along dimension d of K, all of the dimensions after it, and
        one step of those before.

        A block of rows of the left operand lies in three quarters of the second-level cache while the right operand passes by, panel after
        panel. No cut (None) where K is short or unknown: then every tile runs over all of it, with its sums in registers; nor where so few
        rows fit the cache whole that the right operand is a stream.
        """
        mr, step_bytes = self.tile[0], self.depth * element_type(self.op.operands[self.roles.left].type).bytes
        budget = target.l2 * 3 // 4 // step_bytes
        if not all(isinstance(s, int) for s in self.k_sizes):
            return rows_in_block(self.m, mr, self.limits[0] or min(ROWS, budget // max(1, K_BLOCK // self.depth))), None
        sizes: list[int] = [int(s) for s in self.k_sizes]  # type: ignore[arg-type]
        most, total = max(128, (self.limits[1] or K_BLOCK) // self.depth), prod(sizes)
        few = rows_in_block(self.m, mr, ROWS)
        if total <= most * 3 // 2 or (not self.limits[1] and few <= 2 * mr and few * total <= budget):
            return rows_in_block(self.m, mr, self.limits[0] or min(ROWS, budget // max(1, total))), None
        d = next(d for d in range(len(sizes)) if prod(sizes[d + 1:]) <= most)
        inner = prod(sizes[d + 1:])
        blocks = -(-sizes[d] // max(1, most // inner))
        length = -(-sizes[d] // blocks)
        length = length if d < len(sizes) - 1 else -(-length // UNROLL) * UNROLL
        sums = (self.limits[2] or COLUMNS) * self.acc_type.dtype.bytes // step_bytes  # of a row, counted in steps of K
        return rows_in_block(self.m, mr, self.limits[0] or min(ROWS, budget // (length * inner + sums))), (d, length)

    def cpu(self, target: Target, siblings: Sequence[Contraction] = (), prologue: Operation | None = None) -> list[Dim]:
        e, (mr, nr, _) = self.e, self.tile
        batch = self._batch(e, 0)
        nb = len(batch)
        rows, cut = self._blocking(target)
        blocks, panels = ceildiv(self.m, rows), ceildiv(self.n, nr)
        together = max(1, (self.limits[2] or COLUMNS) // nr)
        programs = blocks * panels * product(self.op["dims"][d] for d in self.roles.batch)
        if isinstance(programs, int) and not self.limits[2]:
            together = max(1, min(together, programs // PROGRAMS))
        if isinstance(panels, int):
            together = -(-panels // -(-panels // together))
            if self.taps > 1 and not self.limits[2]:
                together = together // self.taps * self.taps or next(t for t in range(together, 0, -1) if self.taps % t == 0)
        columns = ceildiv(panels, together)
        if not self.limits[0]:
            rows = shared_rows(self.m, rows, mr, product([columns, *(self.op["dims"][d] for d in self.roles.batch)]))
            blocks = ceildiv(self.m, rows)
        # Rows change fastest: the panels of a program stay in the outer caches for the next one, and come from memory once.
        p_column = e.fresh(e.builder.op("tile.program_id", type=index, axis=nb), 0, columns - 1)
        p_block = e.fresh(e.builder.op("tile.program_id", type=index, axis=nb + 1), 0, blocks - 1)
        start = p_block * rows
        upper = minimum(self.m, start + rows)
        if isinstance(self.m, int) and self.m <= rows:
            start, upper = 0, self.m
        first_panel = p_column * together
        products = [self, *siblings]
        if prologue is not None:
            self.block = make_rows(e, prologue, self.buffers, self.m_sizes, start, upper, rows, target.lanes(32))
        elif not siblings and self._is_turned(rows, together * nr, target):
            def slice_of_rows(x: Emitter, m: Dim, k: Dim, mask: list[Pair]) -> Value:
                return self.read(x, self.roles.left, self.positions(batch, m, 0, delinearize(k, self.k_sizes), x), mask, cast=False)
            dtype, steps = element_type(self.op.operands[self.roles.left].type), prod(self.k_sizes)  # type: ignore[arg-type]
            self.block = copy_turned(e, slice_of_rows, dtype, start, upper, rows, steps, mr, target.lanes(dtype.bits))
        sums = {c: e.builder.op("tile.alloca", type=BufferType((rows, together * nr), self.acc_type.dtype)) for c in products if cut is not None}

        def at(inner: Emitter, i: Dim, panel: Dim) -> tuple[Dim, Dim, Dim, Dim]:
            """Rows (twice: as they are, and within bounds for reading), columns, and the place in `sums`."""
            m, n = i + sym("t0"), panel * nr + sym("t1")
            safe_m = m if isinstance(self.m, int) and self.m % mr == 0 else minimum(m, self.m - 1)
            return m, safe_m, n, (i - start + sym("t0")) * (together * nr) + (panel - first_panel) * nr + sym("t1")

        of_columns = [op for op in self.partial if op[PARTIAL][0] == "columns"]
        if of_columns:
            made = [r for op in (*(c.op for c in products), *self.epilogue) if op not in self.partial for r in op.results]
            self.kept = Block(e, of_columns, made, rows, together * nr)

        def program(i: Dim, panel: Dim) -> Program:
            """Where the tile of row i and this panel lies in what the program makes."""
            m, _, n, place = at(e, i, panel)
            return Program(p_block, (m, upper), (n, self.n), (start, i), self.tile[:2], place)

        whole_tiles = isinstance(self.m, int) and self.m % mr == 0 and rows % mr == 0  # no tile passes the last row
        by_number = whole_tiles and self.block is None and self._within_lines(mr)

        def tiles(inner: Emitter, body: Any) -> None:
            def panel_loop(deeper: Emitter, q: Dim, _: list[Value]) -> list[Value]:
                if by_number:
                    deeper.loop(p_block * (rows // mr), minimum(self.m // mr, (p_block + 1) * (rows // mr)), 1, [],
                                lambda x, t, _: [body(x, t * mr, q), []][1])
                else:
                    deeper.loop(start, upper, mr, [], lambda x, i, _: [body(x, i, q), []][1])
                return []
            if together == 1:
                panel_loop(inner, p_column, [])
            else:
                inner.loop(first_panel, minimum(panels, first_panel + together), 1, [], panel_loop)

        def multiply(c: Contraction, inner: Emitter, i: Dim, panel: Dim, ks: list[Dim], within: tuple[Dim, Dim], acc: Value, steps: Dim) -> Value:
            """acc + products over the range `within` of K, of `steps` steps or fewer."""
            safe_m, n = at(inner, i, panel)[1:3]
            row = safe_m if c.block is None else i

            def step(ke: Emitter, at_k: list[Dim], a: Value) -> Value:
                c._prefetch(ke, batch, panel, at_k, len(ks), within[0], steps, i - start, rows)
                c._prefetch_rows(ke, batch, i + mr, at_k)
                return c._rank1(ke, batch, row, n, at_k, a)
            return self._k_loops(inner, acc, step, ks, within)

        def in_parts(c: Contraction, inner: Emitter, i: Dim, panel: Dim, ks: list[Dim], within: tuple[Dim, Dim], most: Dim) -> Value:
            """The products over a range of K, of at most `most` steps, summed in parts where the range is long and the only one left."""
            steps = (MATRIX_PART if self.depth == MATRIX[2] else PART) // self.depth
            exact = not self.acc_type.dtype.is_float
            if not exact and isinstance(most, int) and most > steps:  # parts of one length, none much shorter than others
                steps = -(-most // (-(-most // steps) * UNROLL)) * UNROLL
            if exact or len(ks) + 1 < len(self.k_sizes) or (isinstance(most, int) and most <= steps):
                return multiply(c, inner, i, panel, ks, within, self._zero(inner), most)

            def part(x: Emitter, k: Dim, carried: list[Value]) -> list[Value]:
                return [x.builder.arith("add", carried[0], multiply(c, x, i, panel, ks, (k, minimum(within[1], k + steps)), self._zero(x), steps))]
            return inner.loop(*within, steps, [self._zero(inner)], part)[0]

        def leave(inner: Emitter, i: Dim, panel: Dim, sums: Iterable[Value]) -> None:
            """Finishes a tile: as it is, or turned to lie as the result does."""
            if self.op.attributes.get(EXCHANGED):
                acc, = sums
                assert not self.partial
                m, n = i + sym("t1"), panel * nr + sym("t0")
                self.finish(inner, inner.builder.op("tile.transpose", acc, type=self.acc_type), batch, m, n, [(m, upper), (n, self.n)])
                return
            m, _, n, _ = at(inner, i, panel)
            acc, *others = sums
            mask = [*([] if whole_tiles else [(m, upper)]), (n, self.n)]
            self.finish(inner, acc, batch, m, n, mask, {c.op: x for c, x in zip(siblings, others, strict=True)},
                        program(i, panel))

        def whole(inner: Emitter, i: Dim, panel: Dim) -> None:
            leave(inner, i, panel, [in_parts(c, inner, i, panel, [], (0, self.k_sizes[0]), self.k_sizes[0]) for c in products])

        def k_nest(inner: Emitter, ks: list[Dim]) -> None:
            assert cut is not None
            d, length = cut
            size = self.k_sizes[len(ks)]
            if len(ks) < d:
                def deeper(x: Emitter, i: Dim, _: list[Value]) -> list[Value]:
                    k_nest(x, [*ks, i])
                    return []
                inner.loop(0, size, 1, [], deeper)
                return

            def block(x: Emitter, k: Dim, _: list[Value]) -> list[Value]:
                def one(y: Emitter, i: Dim, panel: Dim) -> None:
                    place = simplify(at(y, i, panel)[3], y.bounds())
                    for c in products:
                        part = in_parts(c, y, i, panel, ks, (k, minimum(size, k + length)), length)
                        before = y.load(sums[c], place, [(0, sum(ks, k))])  # zeros in the first block
                        y.store(sums[c], y.builder.arith("add", before, part), place)
                tiles(x, one)
                return []
            inner.loop(0, size, length, [], block)

        def last_step(inner: Emitter, i: Dim, panel: Dim) -> None:
            place = simplify(at(inner, i, panel)[3], inner.bounds())
            leave(inner, i, panel, [inner.load(sums[c], place) for c in products])

        if cut is None:
            tiles(e, whole)
        else:
            k_nest(e, [])
            tiles(e, last_step)
        if self.kept is not None:
            place = self._places(c.op for c in products)

            def where(x: Emitter, m: Dim, n: Dim) -> dict[Operation, list[Dim]]:
                frame = self._frame(x, batch, m, n)
                return {op: [frame[f] for f in dims] for op, dims in place.items()}
            self.kept.reduce(e, start, upper, first_panel * nr, p_column, nr * (2 - together % 2), where, self.buffers)
        return [*(self.op["dims"][d] for d in self.roles.batch), columns, blocks]

    def _within_lines(self, mr: int) -> bool:
        """A tile lies along the last of several dimensions of M: a loop over numbers of tiles shows that its rows are a constant apart."""
        last = self.m_sizes[-1] if self.m_sizes else 1
        return last != self.m and isinstance(last, int) and last % mr == 0

    def _is_turned(self, rows: int, columns: int, target: Target) -> bool:
        """The left operand lies with its rows side by side, and a program reads it often enough to copy its part first."""
        op, i = self.op, self.roles.left
        of_rows = [d for d in self.roles.m if op["dims"][d] != 1]
        if len(of_rows) != 1 or stride_along(op, i, of_rows[0]) != 1 or fill_of(op, i) is not None or self.depth > 1 or rows <= self.tile[0]:
            return False
        steps = prod(self.k_sizes) if all(isinstance(s, int) for s in self.k_sizes) else 0
        size = rows * steps * element_type(op.operands[i].type).bytes
        return columns >= TURNED and steps >= TURNED and size <= target.l2 * 3 // 4

    def _prefetch(self, e: Emitter, batch: list[Dim], panel: Dim, ks: list[Dim], d: int, first: Dim, length: Dim, row: Dim,
                  rows: int) -> None:
        """Asks for the panel after this one, a share in each row tile of a block and each of its steps of K (`length` from `first` on along
        dimension d, all of those after it)."""
        inside = [length, *self.k_sizes[d + 1:]]
        if not self.op.attributes.get("_packed") or not isinstance(self.k_sizes[d], int) or rows <= self.tile[0] or self.unpacking is not None:
            return  # a stream: the processor sees by itself what comes next
        if "_columns" in self.op.attributes:
            return  # the next panel is another tap's: most of it was just read
        (mr, nr, _), right, bounds = self.tile, self.roles.right, e.bounds()
        v = self.op.operands[right]
        step: Dim = ks[d] - first
        for k, size in zip(ks[d + 1:], inside[1:], strict=True):
            step = step * size + k
        line = 64 // element_type(v.type).bytes
        width = nr * self.depth
        per_step = -(-width // -(-rows // mr))  # elements to ask for per step of K
        start = [*ks[:d], first, *[0] * (len(ks) - d - 1)]
        base = offset_of(v, self.op["maps"][right], self.positions(batch, 0, (panel + 1) * nr, self._elements(start), e), bounds)
        ahead = simplify(base + row * (per_step * product(inside) // mr) + step * per_step, bounds)
        for n in range(min(8, -(-per_step * UNROLL // line))):
            e.prefetch(self.buffers[v], ahead + n * line)

    def _prefetch_rows(self, e: Emitter, batch: list[Dim], row: Dim, ks: list[Dim]) -> None:
        """Asks for the tile of rows that begins at `row`, a line in each step of K, where they lie in one piece: those of an exchanged product are
        the larger operand, and come from memory."""
        op, i = self.op, self.roles.left
        if not op.attributes.get(EXCHANGED) or self.block is not None or stride_along(op, i, self.roles.m[-1]) != self.k_sizes[-1]:
            return
        line = 64 // element_type(op.operands[i].type).bytes
        base = offset_of(op.operands[i], op["maps"][i], self.positions(batch, row, 0, [0] * len(ks), e), e.bounds())
        for n in range(UNROLL * self.tile[0] // line):
            e.prefetch(self.buffers[op.operands[i]], simplify(base + (ks[-1] + n) * line, e.bounds()))

    def _rank1(self, e: Emitter, batch: list[Dim], m: Dim, n: Dim, ks: list[Dim], acc: Value) -> Value:
        if self.depth > 1:
            return self._deep_products(e, batch, m, n, ks, acc)
        at = self.positions(batch, m, n, ks, e)
        i = self.roles.left
        left = self.read(e, i, at, []) if self.block is None else self.convert(e, i, self.block.read(e, m, self._number_of(ks)))
        packed = bool(self.op.attributes.get("_packed"))  # zero-padded to whole panels: reading past N is in bounds
        right = self.read(e, self.roles.right, at, [] if packed else [(n, self.n)]) if self.unpacking is None else self._unpacked(
            e, self.unpacking, at)
        left, right = as_tile(e, left, (self.tile[0], 1)), as_tile(e, right, (1, self.tile[1]))
        return e.builder.op("tile.dot", left, right, acc, type=self.acc_type)

    def _number_of(self, ks: list[Dim]) -> Dim:
        """The number of a step of K."""
        step: Dim = 0
        for k, size in zip(ks, self.k_sizes, strict=True):
            step = step * size + k
        return step

    def _unpacked(self, e: Emitter, maker: Operation, at: dict[str, Dim]) -> Value:
        """What `maker` makes of the right operand, at a position."""
        right, bounds = self.roles.right, e.bounds()
        place = {f"d{j}": simplify(substitute(x, at), bounds) for j, x in enumerate(self.op["maps"][right])}

        def operand(i: int) -> Value:
            v = maker.operands[i]
            return e.load(self.buffers[v], offset_of(v, maker["maps"][i], place, bounds))
        value, = evaluate_body(e, maker, place, operand, self.buffers, [])
        return self.convert(e, right, value)

    def _deep_products(self, e: Emitter, batch: list[Dim], m: Dim, n: Dim, ks: list[Dim], acc: Value) -> Value:
        """Several elements along K in one product; the packed right operand has those of a column (or each two) side by side."""
        mr, nr, _ = self.tile
        left_e, right_e = with_shape(e, (mr, self.depth)), with_shape(e, (self.depth, nr))
        left = self.read(left_e, self.roles.left, self.positions(batch, m, 0, self._elements(ks, sym("t1")), left_e), [], cast=False)
        right = self.read(right_e, self.roles.right, self.positions(batch, 0, n, self._elements(ks, sym("t0")), right_e), [], cast=False)
        left, right = as_tile(e, left, (mr, self.depth)), as_tile(e, right, (self.depth, nr))
        return e.builder.op("tile.dot", left, right, acc, type=self.acc_type)

    def _elements(self, ks: list[Dim], within: Dim = 0) -> list[Dim]:
        """Positions along K of steps of K."""
        return [*ks[:-1], ks[-1] * self.depth + within] if self.depth > 1 else ks


def offset_of(v: Value, m: tuple[Dim, ...], at: dict[str, Dim], bounds: Any) -> Dim:
    assert isinstance(v.type, TensorType)
    total: Dim = 0
    for x, stride in zip(m, v.type.layout, strict=True):
        total = total + substitute(x, at) * stride
    return simplify(total, bounds)


def as_tile(e: Emitter, value: Value, shape: tuple[int, int]) -> Value:
    if isinstance(value.type, TileType) and value.type.shape == shape:
        return value
    return e.broadcast(value, shape)


def with_shape(e: Emitter, shape: tuple[int, int]) -> Emitter:
    return Emitter(e.builder, shape, e.symbols, e.variables, e.ranges, e.coarse)
