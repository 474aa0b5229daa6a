"""Contractions on GPUs: one program computes a BM x BN tile of the result, K in steps of BK by tile.dot.

An operand may be of another type than the matrix units multiply (int8 or 8-bit float weights), or the result of a pointwise member
(`prologue`: unpacking, scaling), if that gives 16-bit floats: its tile is loaded as it is in memory, and becomes 16-bit floats in registers.
Where a prologue reads one element of memory for several steps of K (two 4-bit numbers to a byte), each of these is a product of its own, so
that it reads each byte once.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ...ir import Dim, DType, Operation, ScalarType, TensorType, TileType, Value, element_type, sym
from ...ir.dialects.tensor import fill_of
from ...ir.expr import as_int, ceildiv, free_symbols, mod, product, substitute
from ...ir.ranges import delinearize, lower_bound, simplify, split_linear, upper_bound
from ...ir.types import index
from ..exact import holds, matrix_unit_type
from .bodies import evaluate_body
from .contraction import Contraction, as_tile, offset_of, with_shape
from .emit import Emitter, Pair, fill_masks
from .gpu_tile_cost import row_group
from .gpu_tiles import ASKED_BYTES, ASKED_ROWS, GpuTile

__all__ = ["emit_gpu_contraction"]

MAP_TILE = 64
"""Tiles with fewer rows or columns are read without tensor maps, unless they are turned: what they cost is latency."""
INTERLEAVED = (8, 4, 2)
"""Steps of K that may lie in one element of memory."""


def emit_gpu_contraction(ops: Sequence[Operation], prologue: Sequence[Operation], epilogue: Sequence[Operation], outputs: list[Value], e: Emitter,
                         buffers: dict[Value, Value], tile: GpuTile, *, maps: bool = False, settled: Collection[Value] = ()) -> list[Dim]:
    """Writes the body of the kernel; returns the grid. `ops`: the contraction, and its siblings (see `passes/siblings.py`); `prologue`: pointwise
    members that make operands of contractions. `maps`: the target reads blocks of matrices by tensor maps. `settled`: operands that no kernel
    in front makes: each program asks for its part of a weight among them before it waits for that kernel."""
    first, *others = [_GpuContraction(op, prologue, list(epilogue), outputs, e, buffers, tile, maps) for op in ops]
    return first.emit(others, settled, 32 * tile.warps)


class _GpuContraction(Contraction):
    def __init__(self, op: Operation, prologue: Sequence[Operation], epilogue: list[Operation], outputs: list[Value], e: Emitter,
                 buffers: dict[Value, Value], chosen: GpuTile, maps: bool):
        tile = (chosen.rows, chosen.columns, chosen.step)
        super().__init__(op, epilogue, outputs, e, buffers, tile, turned=chosen.turned)
        self.turned = chosen.turned
        self.shifts: list[Dim] = [0, 0]  # of the operands that are matrices: where a batch element begins, along K
        self.makers: dict[Value, Operation] = {r: m for m in prologue for r in m.results if op in r.users}
        self.unit = matrix_unit_type(op)  # all factors become this, or what the body casts them to
        self.size = product(self.k_sizes)  # all of K is one loop: a window of 3 x 3 would leave most of a step of its own empty
        maps = maps and tile[0] >= MAP_TILE and tile[1] >= (MAP_TILE // 2 if chosen.turned else MAP_TILE)
        self.matrices = [self._matrix(i) if maps else None for i in range(2)]
        self.scale: tuple[Value, Value] | None = None  # scalars of the right operand's maker: a scale for all of a step, and what it scales
        self.parts = self._interleaved()
        if self.makers:
            self.tile = (*tile[:2], self._step(tile[2]))

    def emit(self, siblings: Sequence[_GpuContraction], settled: Collection[Value], threads: int) -> list[Dim]:
        e, (bm, bn, _) = self.e, self.tile
        batch = self._batch(e, 0)
        nb = len(batch)
        blocks_m, blocks_n = ceildiv(self.m, bm), ceildiv(self.n, bn)
        group = row_group(blocks_m, blocks_n)
        grid = [blocks_m, blocks_n] if group == 1 else [blocks_m * blocks_n]
        ids = [e.fresh(e.builder.op("tile.program_id", type=index, axis=nb + k), 0, g - 1) for k, g in enumerate(grid)]
        if group > 1:
            column = group * blocks_n
            ids = [e.named(ids[0] // column * group + ids[0] % group, blocks_m - 1), e.named(ids[0] % column // group, blocks_n - 1)]
        p_m, p_n = ids
        m, n = p_m * bm + sym("t0"), p_n * bn + sym("t1")
        products = [self, *siblings]
        parts, bk = max(p.parts for p in products), min(p.tile[2] for p in products)
        for p in products:
            p.tile = (bm, bn, bk)
            p.scale = p._common_scale(parts)

        def step(ke: Emitter, k: Dim, sums: list[Value]) -> list[Value]:
            loads: dict[Any, Value] = {}
            found = [acc if p.scale is None else p._zero(ke) for p, acc in zip(products, sums, strict=True)]
            for part in range(parts):
                found = [p._product(ke, batch, m, n, k, parts, part, acc, loads) for p, acc in zip(products, found, strict=True)]
            return [now if p.scale is None else p._scaled(ke, batch, n, k * parts, now, before, loads)
                    for p, now, before in zip(products, found, sums, strict=True)]

        for p in products:
            if p.op.operands[p.roles.left if p.turned else p.roles.right] in settled:
                p._ask_ahead(batch, p_m * bm if p.turned else p_n * bn, threads)
        zeros = [self._zero(e) for _ in products]
        if any(p.makers for p in products):  # by number of the step: then a scale does not depend on the place within one
            sums = e.loop(0, ceildiv(self.size, bk * parts), 1, zeros, lambda ke, i, carried: step(ke, i * bk, carried))
        else:
            sums = e.loop(0, self.size, bk, zeros, step)
        others = {p.op: acc for p, acc in zip(siblings, sums[1:], strict=True)}
        self.finish(e, sums[0], batch, m, n, [(m, self.m), (n, self.n)], others)
        return [*(self.op["dims"][d] for d in self.roles.batch), *grid]

    def _ask_ahead(self, batch: list[Dim], first: Dim, threads: int) -> None:
        """Asks for all of the weight that the program reads, from its column `first` on: the right operand, the left one of a transposed result."""
        e, i = self.e, self.roles.left if self.turned else self.roles.right
        bn, tokens, columns = (self.tile[0], self.n, self.m) if self.turned else (self.tile[1], self.m, self.n)
        v = self.op.operands[i]
        assert isinstance(v.type, TensorType)
        width = v.type.dtype.bytes
        if not all(isinstance(x, int) for x in (tokens, self.size, v.type.numel)) or not ASKED_ROWS[0] <= tokens <= ASKED_ROWS[1]:  # type: ignore[operator]
            return
        if v.type.numel * width > ASKED_BYTES or self.op["fills"] or v in self.makers:  # type: ignore[operator]
            return

        size = as_int(self.size)

        def place(x: Emitter, n: Dim, k: Dim) -> Dim:
            row, column = (n, 0) if self.turned else (0, n)
            return offset_of(v, self.op["maps"][i], self.positions(batch, row, column, delinearize(k, self.k_sizes), x), x.bounds())

        whole = with_shape(e, (bn, size))
        found = place(whole, first + sym("t0"), sym("t1"))
        by_k, by_n = split_linear(found, "t1"), split_linear(found, "t0")
        if by_k is not None and by_k[0] == 1 and _is_aligned(by_k[1], width, whole):
            pieces = next((c for c in (8, 4, 2, 1) if c * bn <= max(threads, bn) and size % c == 0 and size // c * width % 16 == 0), 0)
            inner, n = with_shape(e, (bn, pieces)), first + sym("t0")
            if pieces:
                length = size // pieces
                inner.prefetch(self.buffers[v], place(inner, n, sym("t1") * length), inner.needed([(n, columns)]), length * width)
        elif by_n is not None and by_n[0] == 1 and _is_aligned(by_n[1], width, whole) and isinstance(columns, int) and columns % bn == 0:
            def rows(x: Emitter, k: Dim, _: list[Value]) -> list[Value]:
                inner, at = with_shape(x, (threads, 1)), k + sym("t0")
                inner.prefetch(self.buffers[v], place(inner, first, at), inner.needed([(at, size)]), bn * width)
                return []
            e.loop(0, size, threads, [], rows)

    def _product(self, e: Emitter, batch: list[Dim], m: Dim, n: Dim, k: Dim, parts: int, part: int, acc: Value,
                 loads: dict[Any, Value]) -> Value:
        """acc + left @ right, of every `parts`-th step of K from `part` on, `bk` of them from k * parts on."""
        bm, bn, bk = self.tile
        k_col, steps = k + sym("t0"), ceildiv(self.size, parts)
        left = self._left(e, batch, m, k, parts, part, loads)
        right = self._factor(with_shape(e, (bk, bn)), self.roles.right, batch, 0, n, k_col * parts + part, [(k_col, steps), (n, self.n)], loads)
        return e.builder.op("tile.dot", as_tile(e, left, (bm, bk)), as_tile(e, right, (bk, bn)), acc, type=self.acc_type)

    def _left(self, e: Emitter, batch: list[Dim], m: Dim, k: Dim, parts: int, part: int, loads: dict[Any, Value]) -> Value:
        """The left factor at every `parts`-th step of K: its tile is read whole, as it lies in memory, and then taken apart."""
        bm, _, bk = self.tile
        at = k * parts + sym("t1")
        whole = self._factor(with_shape(e, (bm, bk * parts)), self.roles.left, batch, m, 0, at, [(m, self.m), (at, self.size)], loads)
        if parts == 1:
            return whole
        whole = as_tile(e, whole, (bm, bk * parts))
        return e.builder.op("tile.every", whole, type=TileType((bm, bk), element_type(whole.type)), first=part, of=parts)

    def _factor(self, e: Emitter, i: int, batch: list[Dim], m: Dim, n: Dim, k: Dim, mask: list[Pair],
                loads: dict[Any, Value]) -> Value:
        """A tile of operand i, in the type in which it is multiplied."""
        v = self.op.operands[i]
        key = ("factor", v, i, self.op["maps"][i], k)
        if key not in loads:
            at = self.positions(batch, m, n, delinearize(k, self.k_sizes), e)
            if v in self.makers:
                value = self._made(e, i, at, mask, loads)
            elif (matrix := self.matrices[i]) is not None:
                value = self._block(e, i, at, mask, matrix, m + n, k)
            else:
                value = self.read(e, i, at, mask, cast=self.unit is None)
            loads[key] = value if self.unit is None else _cast(e, value, self.unit)
        return loads[key]

    def _matrix(self, i: int) -> tuple[int, int, int, bool] | None:
        """(rows, columns, stride, whether the contiguous dimension is the summed one for the right operand or is not for the left one) of operand i,
        if it is a matrix that a tensor map can describe."""
        v, fills = self.op.operands[i], self.op["fills"]
        t = v.type
        assert isinstance(t, TensorType)
        own = self.m if i == self.roles.left else self.n
        sizes = (*self.op["dims"], own, self.size)
        if fills or v in self.makers or t.dtype != self.unit or not all(isinstance(n, int) for n in sizes):
            return None
        bounds = {"x": (0, own - 1), "y": (0, self.size - 1), **{f"d{d}": (0, self.op["dims"][d] - 1) for d in self.roles.batch}}
        at = self._place(sym("x"), sym("y"), bounds)
        by_k = split_linear(offset_of(v, self.op["maps"][i], at, bounds), "y")
        by_row = None if by_k is None else split_linear(by_k[1], "x")
        if by_k is None or by_row is None or 1 not in (by_k[0], by_row[0]):
            return None
        shift = by_row[1]
        last = upper_bound(shift, bounds) if by_k[0] == 1 else None  # parts of K: neighbours in a row
        if shift != 0 and (not isinstance(last, int) or lower_bound(shift, bounds) != 0):
            return None
        self.shifts[i] = shift
        stride, across = (by_row[0], own) if by_k[0] == 1 else (by_k[0], self.size)
        columns = self.size + (last or 0) if by_k[0] == 1 else own
        if not isinstance(stride, int) or stride * t.dtype.bytes % 16 or stride < as_int(columns):
            return None
        return as_int(across), as_int(columns), stride, (by_k[0] == 1) == (i == self.roles.right)

    def _place(self, x: Dim, k: Dim, bounds: Any) -> dict[str, Dim]:
        """The position where M and N, as linear indices, are both x, and K is k."""
        at: dict[str, Dim] = {f"d{d}": sym(f"d{d}") for d in self.roles.batch}
        for dims, values in ((self.roles.m, delinearize(x, self.m_sizes)), (self.roles.n, delinearize(x, self.n_sizes)),
                             (self.roles.k, delinearize(k, self.k_sizes))):
            at |= {f"d{d}": simplify(value, bounds) for d, value in zip(dims, values, strict=True)}
        return at

    def _block(self, e: Emitter, i: int, at: dict[str, Dim], mask: list[Pair], matrix: tuple[int, int, int, bool], own: Dim, k: Dim) -> Value:
        """The tile of an operand that is a matrix."""
        v, bounds = self.op.operands[i], e.bounds()
        first = [simplify(substitute(x, {"t0": 0, "t1": 0}), bounds) for x in (own, k + substitute(self.shifts[i], at))]
        contiguous_k = matrix[3] == (i == self.roles.right)
        corner = (first[0], first[1]) if contiguous_k else (first[1], first[0])
        return e.load(self.buffers[v], offset_of(v, self.op["maps"][i], at, bounds), e.needed(mask), matrix=matrix, corner=corner)

    def _made(self, e: Emitter, i: int, at: dict[str, Dim], mask: list[Pair], loads: dict[Any, Value], scale: bool = False) -> Value:
        """A tile of an operand that a member of the prologue computes (without its scale, if it has one; or only that): 0 outside of the operand."""
        v, bounds = self.op.operands[i], e.bounds()
        maker = self.makers[v]
        place = {f"d{j}": simplify(substitute(x, at), bounds) for j, x in enumerate(self.op["maps"][i])}

        def operand(j: int) -> Value:
            source, mp, fill = maker.operands[j], maker["maps"][j], fill_of(maker, j)
            pairs, low = fill_masks(mp, source.type.shape, place, bounds) if fill is not None else ([], [])  # type: ignore[attr-defined]
            offset = offset_of(source, mp, place, bounds)
            moving = {"t0", "t1"} & set().union(free_symbols(offset), *(free_symbols(x) for x, _ in pairs))
            active = [p for p in mask if free_symbols(p[0]) & moving]
            needed = [*pairs, *e.needed(active)]
            key = (source, offset, tuple(needed), tuple(low), repr(fill))
            if key not in loads:
                loads[key] = e.load(self.buffers[source], offset, needed, low, 0 if fill is None else fill)
            return loads[key]

        wanted = maker.body.terminator.operands[maker.results.index(v)]  # type: ignore[arg-type]
        if self.scale is not None and i == self.roles.right:
            wanted = self.scale[0 if scale else 1]
        value, = evaluate_body(e, maker, place, operand, self.buffers, mask, [wanted])
        if scale:
            return value
        inside = e.mask_value(mask)
        return value if inside is None else e.builder.arith("select", inside, value, 0)

    def _scaled(self, e: Emitter, batch: list[Dim], n: Dim, k: Dim, now: Value, before: Value, loads: dict[Any, Value]) -> Value:
        """before + scale * now, for the products `now` of one step."""
        inner = with_shape(e, (self.tile[2], self.tile[1]))
        at = self.positions(batch, 0, n, delinearize(k, self.k_sizes), inner)
        scale = self._made(inner, self.roles.right, at, [(n, self.n)], loads, scale=True)
        return e.builder.arith("add", before, e.builder.arith("mul", now, scale))

    def _common_scale(self, parts: int) -> tuple[Value, Value] | None:
        """(scale, numbers), if the right operand is their product and one scale per column holds for all of a step: multiplying the few sums of a
        step is less work than multiplying every number. The numbers are exact in the type of the matrix units."""
        v = self.op.operands[self.roles.right]
        if v not in self.makers or self.tile[0] > self.tile[2] or self.unit is None:
            return None
        maker = self.makers[v]
        y = maker.body.terminator.operands[maker.results.index(v)]  # type: ignore[arg-type]
        while y.defining_op is not None and y.defining_op.name == "arith.cast" and element_type(y.defining_op.operands[0].type).is_float:
            y = y.defining_op.operands[0]
        product_ = y.defining_op
        if product_ is None or product_.name != "arith.mul" or element_type(y.type).name != "f32":
            return None
        for scale, numbers in (product_.operands, product_.operands[::-1]):
            plain = self._exact_source(numbers)
            if plain is not None and self._is_common(v, scale, parts):
                return scale, plain
        return None

    def _exact_source(self, x: Value) -> Value | None:
        """What `x` was before casts that changed nothing, in a type that the matrix units' holds."""
        assert self.unit is not None
        while not holds(self.unit, element_type(x.type)):
            made = x.defining_op
            if made is None or made.name != "arith.cast" or not holds(element_type(x.type), element_type(made.operands[0].type)):
                return None
            x = made.operands[0]
        return x

    def _is_common(self, v: Value, scale: Value, parts: int) -> bool:
        """The scalar `scale` of the maker of `v` is the same at all places of a step along K."""
        stack, read = [scale], set()
        while stack:
            x = stack.pop()
            if x.defining_op is None:
                read.add(x.index)  # type: ignore[attr-defined]
            elif x.defining_op.name.startswith("arith."):
                stack += x.defining_op.operands
            else:
                return False
        bk, maker = self.tile[2], self.makers[v]
        bounds = {"x": (0, ceildiv(self.op["dims"][self.roles.k[-1]], bk * parts) - 1), "t": (0, bk - 1)}
        mapped = [j for j, m in enumerate(maker["maps"]) if m is not None]
        for part in range(parts):
            offsets = dict(zip(mapped, self._offsets(v, (sym("x") * bk + sym("t")) * parts + part, bounds), strict=True))
            if any(j not in offsets or "t" in free_symbols(offsets[j]) for j in read):
                return False
        return True

    def _interleaved(self) -> int:
        """How many successive steps of K all reads of the prologue find in the same elements."""
        if not self.makers or not isinstance(self.k_sizes[-1], int):
            return 1
        return next((p for p in INTERLEAVED if self.k_sizes[-1] % p == 0 and self._same_elements(p)), 1)

    def _same_elements(self, parts: int) -> bool:
        bounds = {"x": (0, self.op["dims"][self.roles.k[-1]] // parts - 1)}
        return all(len({tuple(offsets) for offsets in found}) == 1 for found in (
            [self._offsets(v, sym("x") * parts + part, bounds) for part in range(parts)] for v in self.op.operands if v in self.makers))

    def _step(self, most: int) -> int:
        """Of the steps up to `most`, the largest over which what the prologue reads moves evenly: a group's scale is read once, not per element."""
        for step in (most, most // 2, most // 4):
            bounds = {"x": (0, ceildiv(self.op["dims"][self.roles.k[-1]], step * self.parts) - 1), "t": (0, step - 1)}
            k = (sym("x") * step + sym("t")) * self.parts
            made = [v for v in self.op.operands if v in self.makers]
            if step >= 32 and all(split_linear(o, "t") is not None for v in made for o in self._offsets(v, k, bounds)):
                return step
        return most

    def _offsets(self, v: Value, k: Dim, bounds: Mapping[str, tuple[Dim, Dim]]) -> list[Dim]:
        """Where the operand `v` of the contraction, made by the prologue, is read from at place `k` of the last dimension of K."""
        dims = self.op["dims"]
        ranges = {**{f"d{d}": (0, size - 1) for d, size in enumerate(dims)}, **bounds}
        at: dict[str, Dim] = {**{f"d{d}": sym(f"d{d}") for d in range(len(dims))}, f"d{self.roles.k[-1]}": k}
        maker, m = self.makers[v], self.op["maps"][self.op.operands.index(v)]
        place = {f"d{j}": simplify(substitute(x, at), ranges) for j, x in enumerate(m)}
        return [offset_of(s, mp, place, ranges) for s, mp in zip(maker.operands, maker["maps"], strict=True) if mp is not None]


def _cast(e: Emitter, value: Value, dtype: DType) -> Value:
    if element_type(value.type) == dtype:
        return value
    made = TileType(value.type.shape, dtype) if isinstance(value.type, TileType) else ScalarType(dtype)
    return e.builder.op("arith.cast", value, type=made)


def _is_aligned(offset: Dim, width: int, e: Emitter) -> bool:
    """A multiple of 16 bytes, in elements of `width` bytes."""
    return simplify(mod(offset, max(1, 16 // width)), e.bounds()) == 0

