"""Convolutions with three taps along a row by Winograd's F(2, 3): two neighbouring outputs from four products instead of six.

    y[2t]     = m0 + m1 + m2          m0 = (x0 - x2) g0              with x0..x3 = x[2t .. 2t+3], g the three taps,
    y[2t + 1] = m1 - m2 - m3          m1 = (x1 + x2) (g0 + g1 + g2) / 2      and each product summed over channels
                                      m2 = (x2 - x1) (g0 - g1 + g2) / 2      and over the taps of the other dimensions
                                      m3 = (x1 - x3) g2

So a convolution becomes a pointwise op that makes v[j] (j = 0..3) from the input, one contraction with j as its batch dimension and a third of
the steps of K, and a pointwise op that joins the m[j]. What is made of the parameter is made once. Padding is part of v.
Source: Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2016), section 4.1, along one dimension only: the two-dimensional form
saves more products (2.25 to 1 for 3 x 3, against 1.5), moves more memory and rounds worse.

Error: the transforms add or subtract two or three numbers, so a result is off by about twice the rounding of the direct sum of as many
products, and the sums are a third as long; a test compares both with float64.
Only for float32 on CPUs, parameters as taps, stride and dilation one along that row, known sizes, and enough channels on both sides to pay for
the transforms. After: such convolutions have no three-tap dimension in a contraction.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ir import Builder, Dim, Operation, TensorType, Value, sym
from ..ir.dialects.tensor import fill_of, parallel_dims
from ..ir.expr import free_symbols, substitute
from ..ir.opdef import Trait
from ..ir.passes import Pass, PassContext, register
from ..ir.ranges import known_nonnegative, lower_bound, simplify, upper_bound
from ..ir.types import i64
from .structured import constant_values, in_order, is_contraction, plain_dims, space_bounds

__all__ = ["Winograd"]

TAPS, PRODUCTS = 3, 4
CHANNELS = 32
"""Fewest channels on either side: with fewer the transforms cost what the products save."""
WASTE = 0.2
"""Most of the products that may go to an output past the end of an odd row."""


@dataclass(frozen=True)
class _Row:
    """Where the row lies: operand numbers of the input and the parameter, parallel and reduction dimension, dimension of the input, its start."""

    x: int
    w: int
    out: int
    tap: int
    axis: int
    start: int


@register
@dataclass(frozen=True)
class Winograd(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "winograd"

    def run(self, module: Operation, ctx: PassContext) -> None:
        if ctx.target.is_gpu:
            ctx.remark("note", "matrix units leave nothing to save")
            return
        for func in [f for f in module.body if f.name == "func"]:
            constant = constant_values(func)
            for op in list(func.body):
                row = _row_of(op, constant) if is_contraction(op) else None
                if row is not None:
                    _rewrite(op, row)
                    ctx.remark("done", f"a row of {TAPS} taps in {PRODUCTS} products for two outputs", op.location)


def _dims_in(m: tuple[Dim, ...]) -> list[set[int]]:
    return [{int(s[1:]) for s in free_symbols(e) if s[0] == "d" and s[1:].isdigit()} for e in m]


def _taps(m: tuple[Dim, ...]) -> list[int] | None:
    """The dims that the parameter is read along; those of size 1 are left out."""
    return plain_dims([e for e in m if e != 0])


def _row_of(op: Operation, constant: set[Value]) -> _Row | None:
    """The last spatial dimension of a convolution, if the transform fits it."""
    dims, parallel = op["dims"], len(parallel_dims(op))
    if any(not isinstance(s, int) for s in dims) or any(v.type.dtype.name != "f32" for v in (*op.operands, op.result)):  # type: ignore[attr-defined]
        return None
    if any(u["maps"][i - (u.name == "tensor.scatter")] is None for u, i in op.result.uses if u.has_trait(Trait.Structured)):
        return None  # a reader's body holds the tensor whole, with its layout
    for x, w in ((0, 1), (1, 0)):
        taps = _taps(op["maps"][w])
        if op.operands[w] not in constant or op.operands[x] in constant or taps is None or fill_of(op, w) is not None:
            continue
        own = [d for d in taps if d < parallel]
        if len(own) != 1 or set(taps) - set(own) != set(range(parallel, len(dims))) or fill_of(op, x) not in (None, 0):
            continue
        reads = _dims_in(op["maps"][x])
        channels = [r for r in reads if len(r) == 1 and min(r) >= parallel and dims[min(r)] > TAPS]
        if dims[own[0]] < CHANNELS or not channels or max(dims[min(r)] for r in channels) < CHANNELS:
            continue
        for axis in reversed(range(len(reads))):
            out, tap = min(reads[axis], default=0), max(reads[axis], default=0)
            if len(reads[axis]) != 2 or not out < parallel <= tap or dims[tap] != TAPS or sum(bool(r & {out, tap}) for r in reads) != 1:
                continue
            start = op["maps"][x][axis] - sym(f"d{out}") - sym(f"d{tap}")
            size = dims[out]
            if isinstance(start, int) and (size + size % 2) <= size * (1 + WASTE):
                return _Row(x, w, out, tap, axis, start)
    return None


def _rewrite(op: Operation, row: _Row) -> None:
    dims, parallel = list(op["dims"]), len(parallel_dims(op))
    pairs = -(-dims[row.out] // 2)
    b = Builder.before_op(op)
    v, read_v = _transformed_input(b, op, row, pairs)
    u = _transformed_taps(b, op, row)
    # The space of the products: j first, pairs instead of outputs, no taps.
    new = [PRODUCTS, *(pairs if d == row.out else s for d, s in enumerate(dims) if d != row.tap)]
    renamed = {f"d{d}": sym(f"d{1 + d - (d > row.tap)}") for d in range(len(dims)) if d != row.tap}
    taps = _taps(op["maps"][row.w]) or []
    read_u = (sym("d0"), *(renamed[f"d{d}"] for d in taps if d != row.tap))
    operands, maps = [v, u], [(sym("d0"), *(substitute(e, renamed) for e in read_v)), read_u]
    made = b.generic(operands, [tuple(simplify(e, space_bounds(new)) for e in m) for m in maps], new, lambda i, a, c: i.arith("mul", a, c),
                     reductions=len(new) - 1 - parallel, combine=("sum",), name=op.result.name)
    joined = _joined(b, op, row, made.result)
    assert isinstance(joined.type, TensorType)
    channel = next(d for d in taps if d < parallel)
    joined.type = in_order(joined.type, [d for d in range(parallel) if d != channel] + [channel])
    op.result.replace_all_uses_with(joined)
    op.erase()


def _transformed_input(b: Builder, op: Operation, row: _Row, pairs: int) -> tuple[Value, tuple[Dim, ...]]:
    """v[j, ..., pair, channel], padding included, and where it is read after j, in the dims of `op` (pairs as the row's output dimension)."""
    x, m = op.operands[row.x], op["maps"][row.x]
    assert isinstance(x.type, TensorType)
    bounds, parallel = space_bounds(op["dims"]), len(parallel_dims(op))
    channel = next(k for k, r in enumerate(_dims_in(m)) if len(r) == 1 and min(r) >= parallel and op["dims"][min(r)] >= CHANNELS)
    order = [k for k in range(len(m)) if k not in (row.axis, channel)] + [row.axis, channel]
    dims: list[Dim] = [PRODUCTS]
    source: dict[int, Dim] = {}
    read: list[Dim] = []
    for k in order:
        here = sym(f"d{len(dims)}")
        if k == row.axis:
            dims.append(pairs)
            source[k] = here * 2 + row.start
            read.append(sym(f"d{row.out}"))
            continue
        low, high = lower_bound(m[k], bounds), upper_bound(m[k], bounds)
        assert isinstance(low, int) and isinstance(high, int), "known sizes have known bounds"
        low = min(low, 0)
        dims.append(high + 1 - low)
        source[k] = here + low
        read.append(m[k] - low)
    at = [source[k] for k in range(len(m))]
    maps = [tuple(e + step if k == row.axis else e for k, e in enumerate(at)) for step in range(PRODUCTS)]
    inside = all(known_nonnegative(lower_bound(e, space_bounds(dims))) and upper_bound(e, space_bounds(dims)) < size  # type: ignore[operator, arg-type]
                 for step in maps for e, size in zip(step, x.type.shape, strict=True))

    def body(i: Builder, x0: Value, x1: Value, x2: Value, x3: Value) -> Value:
        j = i.op("tensor.index", type=i64, dim=0)
        first, last = i.arith("eq", j, 0), i.arith("eq", j, 3)
        plus = i.arith("select", first, x0, i.arith("select", i.arith("eq", j, 2), x2, x1))
        other = i.arith("select", last, x3, i.arith("select", i.arith("eq", j, 2), x1, x2))
        return i.arith("add", plus, i.arith("select", i.arith("eq", j, 1), other, i.arith("neg", other)))
    made = b.generic([x] * PRODUCTS, maps, dims, body, fills=() if inside else (0.0,) * PRODUCTS, name=f"{x.name or 'x'}_rows")
    return made.result, tuple(read)


def _transformed_taps(b: Builder, op: Operation, row: _Row) -> Value:
    """u[j, ...] from the parameter, without the dimension of the taps."""
    w = op.operands[row.w]
    read = op["maps"][row.w]
    kept = [d for d in _taps(read) or () if d != row.tap]
    dims: list[Dim] = [PRODUCTS, *(op["dims"][d] for d in kept)]
    env: dict[str, Dim] = {f"d{d}": sym(f"d{1 + i}") for i, d in enumerate(kept)}
    maps = [tuple(substitute(e, {**env, f"d{row.tap}": tap}) for e in read) for tap in range(TAPS)]

    def body(i: Builder, g0: Value, g1: Value, g2: Value) -> Value:
        j = i.op("tensor.index", type=i64, dim=0)
        outer = i.arith("add", g0, g2)
        middle = i.arith("select", i.arith("eq", j, 1), g1, i.arith("neg", g1))
        half = i.arith("mul", i.arith("add", outer, middle), 0.5)
        return i.arith("select", i.arith("eq", j, 0), g0, i.arith("select", i.arith("eq", j, 3), g2, half))
    return b.generic([w] * TAPS, maps, dims, body, name=f"{w.name or 'w'}_taps").result


def _joined(b: Builder, op: Operation, row: _Row, products: Value) -> Value:
    """The convolution's result from the sums of products."""
    dims = parallel_dims(op)
    pair = sym(f"d{row.out}") // 2
    maps = [(j, *(pair if d == row.out else sym(f"d{d}") for d in range(len(dims)))) for j in range(PRODUCTS)]

    def body(i: Builder, m0: Value, m1: Value, m2: Value, m3: Value) -> Value:
        odd = i.arith("eq", i.arith("mod", i.op("tensor.index", type=i64, dim=row.out), 2), 1)
        even = i.arith("add", i.arith("add", m0, m1), m2)
        return i.arith("select", odd, i.arith("sub", i.arith("sub", m1, m2), m3), even)
    return b.generic([products] * PRODUCTS, maps, dims, body, name=op.result.name).result
