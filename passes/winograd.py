"""Convolutions with three taps along one or two dimensions by Winograd's F(2, 3) and F(4, 3): fewer products for sums before and after.

Along one dimension m neighbouring outputs come from m + 2 products instead of 3 m (`winograd_forms.py`), along two from as many in each:
3 x 3 taps as F(2 x 4, 3 x 3) take 24 products for 8 outputs, a third of 72. So a convolution becomes
  1. a pointwise op that makes v[j, ...] from the input, j the number of the product (one number for both dimensions), padding included,
  2. u[j, ...] made of the parameter, once, in double precision,
  3. one contraction with j as its batch dimension, without these taps in its sums,
  4. a pointwise op that makes the outputs of the sums.
Which of the forms, or none, is decided per convolution by estimated cycles (`_cycles`): products, the bytes of u, which every call streams, and
reads of the transforms.

Error: `budget` is the most that a form may be away from float64, as a multiple of eager's distance, by what was measured (`noise`). With the
default of 2, F(4 x 4, 3 x 3), which is 2.1 to 2.4 times as far as eager, is not taken; with `options={"winograd_budget": 3.0}` it is, where it
pays. What is not finite spreads to the outputs of its tile.
Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2016), sections 4 and 5.

The gradient of a convolution by its input is one with the taps read backwards, and is taken as well; its taps are transformed in every call.

Only for float32 on CPUs, parameters or what is read like one as taps, stride and dilation one along those dimensions, known sizes, and
CHANNELS on both sides.
After: such convolutions have no three-tap dimensions in a contraction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product as combinations
from math import prod
from typing import ClassVar

import numpy as np

from ..ir import Builder, Dim, Operation, Target, TensorType, Value, sym
from ..ir.attributes import Dense
from ..ir.dialects.tensor import fill_of, parallel_dims
from ..ir.expr import floordiv, free_symbols, mod, substitute
from ..ir.opdef import Trait
from ..ir.passes import Pass, PassContext, register
from ..ir.ranges import known_nonnegative, lower_bound, simplify, upper_bound
from ..ir.types import DTYPES, i64
from .structured import constant_values, in_order, is_contraction, space_bounds, tap_dims, windowed_operand
from .winograd_forms import TAPS, Form, Sparse, form, noise

__all__ = ["Winograd"]

_F32, _F64 = DTYPES["f32"], DTYPES["f64"]
CHANNELS = 32
"""Fewest channels on either side: with fewer the transforms cost what the products save."""
BYTES_PER_CYCLE = 5
"""Of parameters from memory, one core."""
READ = 1.2
"""Cycles of a transform per vector that it reads: measured, 1.05 to 1.4."""

TAP_CYCLES = 14
"""Of a vector of transformed taps in double precision, where they are made anew in each call."""


@dataclass(frozen=True)
class _Row:
    """One dimension of three taps: its parallel and its reduction dimension, the dimension of the input, and where that begins."""

    out: int
    tap: int
    axis: int
    start: int
    form: Form


@dataclass(frozen=True)
class _Site:
    """A convolution to rewrite: operand numbers of the input and the parameter, reduction dimension of the channels, output channels' dimension, the
    rows, and whether the parameter is transformed once only."""

    x: int
    w: int
    channel: int
    own: int
    rows: tuple[_Row, ...]
    kept: bool

    @property
    def products(self) -> int:
        return prod(r.form.products for r in self.rows)

    def numbers(self, j: Dim) -> list[Dim]:
        """The number of the product along each row, of the number of the product."""
        found: list[Dim] = []
        for r in reversed(self.rows):
            found.insert(0, mod(j, r.form.products) if len(found) + 1 < len(self.rows) else j)
            j = floordiv(j, r.form.products)
        return found


@register
@dataclass(frozen=True)
class Winograd(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "winograd"
    budget: float = 2.0

    def run(self, module: Operation, ctx: PassContext) -> None:
        if ctx.target.is_gpu:
            ctx.remark("note", "matrix units leave nothing to save")
            return
        for func in [f for f in module.body if f.name == "func"]:
            constant = constant_values(func)
            for op in list(func.body):
                found = _site_of(op, constant) if is_contraction(op) else None
                if found is None:
                    continue
                site, cycles, direct = _choose(op, found, self.budget, ctx.target)
                if not site.rows:
                    ctx.remark("declined", f"three taps stay products: {direct:.0f} cycles", op.location)
                    continue
                _rewrite(op, site)
                sizes = " x ".join(str(r.form.outputs) for r in site.rows)
                ctx.remark("done", f"{sizes} outputs of {TAPS} taps from {site.products} products: {cycles:.0f} cycles for {direct:.0f}", op.location)


def _dims_in(m: tuple[Dim, ...]) -> list[set[int]]:
    return [{int(s[1:]) for s in free_symbols(e) if s[0] == "d" and s[1:].isdigit()} for e in m]


def _site_of(op: Operation, constant: set[Value]) -> _Site | None:
    """A convolution with dimensions that a transform fits, the rows not chosen yet: those in the order of the input's dimensions."""
    dims, parallel = op["dims"], len(parallel_dims(op))
    if any(not isinstance(s, int) for s in dims) or any(v.type.dtype.name != "f32" for v in (*op.operands, op.result)):  # type: ignore[attr-defined]
        return None
    if any(u["maps"][i - (u.name == "tensor.scatter")] is None for u, i in op.result.uses if u.has_trait(Trait.Structured)):
        return None  # a reader's body holds the tensor whole, with its layout
    for x, w in ((0, 1), (1, 0)):
        taps = tap_dims(op["maps"][w])
        if op.operands[x] in constant or taps is None or fill_of(op, w) is not None:
            continue
        if op.operands[w] not in constant and windowed_operand(op) != x:
            continue
        own = [d for d in taps if d < parallel]
        if len(own) != 1 or set(taps) - set(own) != set(range(parallel, len(dims))) or fill_of(op, x) not in (None, 0):
            continue
        reads = _dims_in(op["maps"][x])
        channels = [min(r) for r in reads if len(r) == 1 and min(r) >= parallel and dims[min(r)] >= CHANNELS]
        if dims[own[0]] < CHANNELS or not channels:
            continue
        rows = []
        for axis, dims_here in enumerate(reads):
            out, tap = min(dims_here, default=0), max(dims_here, default=0)
            if len(dims_here) != 2 or not out < parallel <= tap or dims[tap] != TAPS or sum(bool(r & {out, tap}) for r in reads) != 1:
                continue
            start = op["maps"][x][axis] - sym(f"d{out}") - sym(f"d{tap}")
            if isinstance(start, int):
                rows.append(_Row(out, tap, axis, start, form(2)))
        if rows:
            return _Site(x, w, channels[0], own[0], tuple(rows[-2:]), op.operands[w] in constant)
    return None


def _choose(op: Operation, found: _Site, budget: float, target: Target) -> tuple[_Site, float, float]:
    """The site with the forms that cost least (no rows: none), its cycles, and those of direct sums."""
    choices = []
    for outputs in combinations((1, 2, 4), repeat=len(found.rows)):
        used = tuple(n for n in outputs if n > 1)
        if used and noise(used, target.lanes(32)) > budget:
            continue
        rows = tuple(_Row(r.out, r.tap, r.axis, r.start, form(n)) for r, n in zip(found.rows, outputs, strict=True) if n > 1)
        site = replace(found, rows=rows)
        choices.append((_cycles(op, site, target), len(rows), outputs, site))
    cycles, _, _, site = min(choices, key=lambda c: c[:3])
    return site, cycles, choices[0][0]


def _cycles(op: Operation, site: _Site, target: Target) -> float:
    """Estimated time on one core: products at nine tenths of two multiply-adds a cycle, a parameter that is larger than the second-level cache at
    the rate of memory, and what the transforms read and write."""
    lanes, parallel = target.lanes(32), len(parallel_dims(op))
    tiled = {r.out: -(-op["dims"][r.out] // r.form.outputs) for r in site.rows}
    points = prod(tiled.get(d, s) for d, s in enumerate(op["dims"][:parallel]) if d != site.own)
    sums = prod(s for d, s in enumerate(op["dims"]) if d >= parallel and d not in {r.tap for r in site.rows})
    channels, own = op["dims"][site.channel], op["dims"][site.own]
    parameter = site.products * sums * own * 4
    cycles = site.products * points * sums * own / (2 * lanes * 0.9) + (parameter / BYTES_PER_CYCLE if parameter > target.l2 else 0)
    if site.rows:
        before, after = prod(r.form.inputs.reads for r in site.rows), prod(r.form.results.reads for r in site.rows)
        cycles += site.products * points * channels * (READ * before + 2) / lanes
        cycles += prod(op["dims"][:parallel]) * (READ * after + 2) / lanes + site.products * points * own * 2 / lanes
        if not site.kept:
            cycles += site.products * sums * own * TAP_CYCLES * 2 / lanes
    return cycles


def _rewrite(op: Operation, site: _Site) -> None:
    dims, parallel = list(op["dims"]), len(parallel_dims(op))
    tiles = {r.out: -(-dims[r.out] // r.form.outputs) for r in site.rows}
    gone = {r.tap for r in site.rows}
    b = Builder.before_op(op)
    v, read_v = _transformed_input(b, op, site, tiles)
    u = _transformed_taps(b, op, site)
    # The space of the products: j first, tiles instead of outputs, no taps.
    kept = [d for d in range(len(dims)) if d not in gone]
    new = [site.products, *(tiles.get(d, dims[d]) for d in kept)]
    renamed: dict[str, Dim] = {f"d{d}": sym(f"d{1 + k}") for k, d in enumerate(kept)}
    read_u = (sym("d0"), *(renamed[f"d{d}"] for d in tap_dims(op["maps"][site.w]) or [] if d not in gone))
    maps = [(sym("d0"), *(substitute(e, renamed) for e in read_v)), read_u]
    made = b.generic([v, u], [tuple(simplify(e, space_bounds(new)) for e in m) for m in maps], new, lambda i, a, c: i.arith("mul", a, c),
                     reductions=len(new) - 1 - parallel, combine=("sum",), name=op.result.name)
    joined = _joined(b, op, site, made.result)
    assert isinstance(joined.type, TensorType) and isinstance(made.result.type, TensorType)
    if not site.kept:  # nothing tells `layout` that u takes the place of a parameter
        last = 1 + [d for d in range(parallel) if d not in gone].index(site.own)
        made.result.type = in_order(made.result.type, [d for d in range(made.result.type.rank) if d != last] + [last])
    joined.type = in_order(joined.type, [d for d in range(parallel) if d != site.own] + [site.own])
    op.result.replace_all_uses_with(joined)
    op.erase()


def _table(b: Builder, s: Sparse, name: str) -> Value:
    data = Dense.from_numpy(np.array(s.table, np.float32), _F32)
    v = b.op("tensor.constant", type=TensorType(data.shape, _F32), value=data)
    v.name = name
    return v


def _summed(b: Builder, source: Value, maps: Sequence[tuple[Dim, ...]], sparse: Sequence[Sparse], rows: Sequence[Dim], dims: Sequence[Dim],
            inside: bool, name: str) -> Value:
    """sum over k, l of table0[row0, k] * table1[row1, l] * source[map k, l]: the maps in the order of `combinations` of the reads."""
    tables = [_table(b, s, f"{name}_factors") for s in sparse]
    operands, reads = [source] * len(maps), list(maps)
    for t, s, r in zip(tables, sparse, rows, strict=True):
        operands += [t] * s.reads
        reads += [(r, k) for k in range(s.reads)]

    def body(i: Builder, *args: Value) -> Value:
        values, factors = list(args[:len(maps)]), list(args[len(maps):])
        for s in reversed(sparse):
            mine, factors = factors[-s.reads:], factors[:-s.reads]
            sums = []
            for first in range(0, len(values), s.reads):
                total = i.arith("mul", values[first], mine[0])
                for value, factor in zip(values[first + 1:first + s.reads], mine[1:], strict=True):
                    total = i.arith("add", total, i.arith("mul", value, factor))
                sums.append(total)
            values = sums
        return values[0]
    fills = () if inside else (0.0,) * len(maps) + (None,) * (len(operands) - len(maps))
    return b.generic(operands, reads, dims, body, fills=fills, name=name).result


def _transformed_input(b: Builder, op: Operation, site: _Site, tiles: dict[int, int]) -> tuple[Value, tuple[Dim, ...]]:
    """v[j, ..., tiles, channel], padding included, and where it is read after j, in the dims of `op` (tiles as the rows' output dimensions)."""
    x, m = op.operands[site.x], op["maps"][site.x]
    assert isinstance(x.type, TensorType)
    bounds = space_bounds(op["dims"])
    axes = {r.axis: (r, n) for r, n in zip(site.rows, site.numbers(sym("d0")), strict=True)}
    last = next(k for k, r in enumerate(_dims_in(m)) if r == {site.channel})
    dims: list[Dim] = [site.products]
    at: dict[int, Dim] = {}
    read: list[Dim] = []
    for k in [k for k in range(len(m)) if k not in axes and k != last] + [*axes, last]:
        here = sym(f"d{len(dims)}")
        if k in axes:
            row = axes[k][0]
            dims.append(tiles[row.out])
            at[k] = here * row.form.outputs + row.start
            read.append(sym(f"d{row.out}"))
            continue
        low, high = lower_bound(m[k], bounds), upper_bound(m[k], bounds)
        assert isinstance(low, int) and isinstance(high, int), "known sizes have known bounds"
        low = min(low, 0)
        dims.append(high + 1 - low)
        at[k] = here + low
        read.append(m[k] - low)
    maps = []
    for reads in combinations(*(range(r.form.inputs.reads) for r, _ in axes.values())):
        columns = {k: r.form.inputs.column(n, number) for (k, (r, number)), n in zip(axes.items(), reads, strict=True)}
        maps.append(tuple(at[k] + columns.get(k, 0) for k in range(len(m))))
    inside = all(known_nonnegative(lower_bound(e, space_bounds(dims))) and upper_bound(e, space_bounds(dims)) < size  # type: ignore[operator, arg-type]
                 for each in maps for e, size in zip(each, x.type.shape, strict=True))
    made = _summed(b, x, maps, [r.form.inputs for r, _ in axes.values()], [n for _, n in axes.values()], dims, inside, f"{x.name or 'x'}_tiles")
    return made, tuple(read)


def _transformed_taps(b: Builder, op: Operation, site: _Site) -> Value:
    """u[j, ...] from the parameter, without the dimensions of the taps."""
    w = op.operands[site.w]
    read = op["maps"][site.w]
    gone = [f"d{r.tap}" for r in site.rows]
    kept = [d for d in tap_dims(read) or () if f"d{d}" not in gone]
    dims: list[Dim] = [site.products, *(op["dims"][d] for d in kept)]
    env: dict[str, Dim] = {f"d{d}": sym(f"d{1 + i}") for i, d in enumerate(kept)}
    maps = [tuple(substitute(e, {**env, **dict(zip(gone, taps, strict=True))}) for e in read)
            for taps in combinations(range(TAPS), repeat=len(site.rows))]

    def body(i: Builder, *args: Value) -> Value:
        values = [i.cast(a, _F64) for a in args]
        j = i.op("tensor.index", type=i64, dim=0)
        for r in reversed(site.rows):
            number = i.arith("mod", j, r.form.products) if r is not site.rows[0] else j
            j = i.arith("floordiv", j, r.form.products) if r is not site.rows[0] else j
            factors = [_picked(i, number, [row[k] for row in r.form.taps]) for k in range(TAPS)]
            sums = []
            for first in range(0, len(values), TAPS):
                terms = [i.arith("mul", value, factor) for value, factor in zip(values[first:first + TAPS], factors, strict=True)]
                sums.append(i.arith("add", i.arith("add", terms[0], terms[1]), terms[2]))
            values = sums
        return i.cast(values[0], _F32)
    return b.generic([w] * len(maps), maps, dims, body, name=f"{w.name or 'w'}_taps").result


def _picked(i: Builder, number: Value, values: Sequence[float]) -> Value:
    """values[number], in double precision."""
    found = i.constant(values[-1], _F64)
    for n in reversed(range(len(values) - 1)):
        found = i.arith("select", i.arith("eq", number, n), i.constant(values[n], _F64), found)
    return found


def _joined(b: Builder, op: Operation, site: _Site, products: Value) -> Value:
    """The convolution's result from the sums of products."""
    dims = parallel_dims(op)
    tiles = {r.out: floordiv(sym(f"d{r.out}"), r.form.outputs) for r in site.rows}
    places = [mod(sym(f"d{r.out}"), r.form.outputs) for r in site.rows]
    maps = []
    for reads in combinations(*(range(r.form.results.reads) for r in site.rows)):
        j: Dim = 0
        for r, place, n in zip(site.rows, places, reads, strict=True):
            j = j * r.form.products + r.form.results.column(n, place)
        maps.append((j, *(tiles.get(d, sym(f"d{d}")) for d in range(len(dims)))))
    return _summed(b, products, maps, [r.form.results for r in site.rows], places, dims, True, op.result.name)
