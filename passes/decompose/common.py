"""What all decomposition rules share: index maps, promotion to the computing type, and short ways to emit generics.

A rule is a function `(builder, op) -> values`: it emits tensor ops in front of a graph op, whose operands are tensor-level
values already, and gives one value per result (none for a result without uses that it did not care to compute).

Precision: floats of fewer than 32 bits are only ever converted to and from f32. `pointwise` hands promoted operands to its
body and rounds once, at the end; `reduce` leaves its result in the accumulation type, and `convert` rounds it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...ir import (
    DTYPES,
    Block,
    Builder,
    Dim,
    DType,
    IRError,
    Operation,
    Region,
    ScalarType,
    TensorType,
    Value,
    element_type,
    sym,
)
from ...ir.ranges import Bounds, simplify

__all__ = ["F32", "I1", "I64", "Body", "Map", "Rule", "bounds_of", "broadcast_map", "broadcast_shape", "computing", "convert",
           "d", "fill_value", "identity", "index", "lowest", "move", "pointwise", "promote", "reduce", "scalar_size",
           "shape_of", "simplified", "structured_body", "tensor_type", "to_dtype"]

Rule = Callable[[Builder, Operation], "Sequence[Value | None]"]
Body = Callable[..., Value]
Map = tuple[Dim, ...]
Shape = Sequence[Dim]

I1, I64, F32, F64 = DTYPES["i1"], DTYPES["i64"], DTYPES["f32"], DTYPES["f64"]


# -- types and maps ---------------------------------------------------------------------------------------------------

def tensor_type(v: Value) -> TensorType:
    """The type of `v`; IRError if it is no tensor."""
    if not isinstance(v.type, TensorType):
        raise IRError(f"expected a tensor, got {v.type}")
    return v.type


def shape_of(v: Value) -> tuple[Dim, ...]:
    return tensor_type(v).shape


def d(i: int) -> Dim:
    """Dimension i of the iteration space, as an expression."""
    return sym(f"d{i}")


def identity(rank: int) -> Map:
    return tuple(d(i) for i in range(rank))


def bounds_of(dims: Shape) -> Bounds:
    """What `simplify` may assume in an iteration space of `dims`: 0 <= di <= size - 1."""
    return {f"d{i}": (0, size - 1) for i, size in enumerate(dims)}


def simplified(m: Sequence[Dim], dims: Shape) -> Map:
    bounds = bounds_of(dims)
    return tuple(simplify(e, bounds) for e in m)


def broadcast_map(source: Shape, rank: int, first: int = 0) -> Map:
    """How a tensor of shape `source` is read at dimensions first .. first + rank - 1 of a space: numpy's rule."""
    start = first + rank - len(source)
    return tuple(0 if size == 1 else d(start + i) for i, size in enumerate(source))


def broadcast_shape(shapes: Sequence[Shape]) -> tuple[Dim, ...]:
    """The numpy broadcast of shapes; where two symbolic sizes differ the first that is not 1 is taken."""
    out: list[Dim] = [1] * max(map(len, shapes), default=0)
    for shape in shapes:
        for i, size in enumerate(shape, len(out) - len(shape)):
            if out[i] == 1:
                out[i] = size
    return tuple(out)


# -- element types ----------------------------------------------------------------------------------------------------

def _is_small(t: DType) -> bool:
    return t.is_float and t.bits < 32


def computing(t: DType) -> DType:
    """The type in which values of `t` are computed and accumulated: f32 for narrower floats, else itself."""
    return F32 if _is_small(t) else t


def promote(b: Builder, x: Value) -> Value:
    """A scalar in its computing type."""
    return b.cast(x, computing(element_type(x.type)))


def to_dtype(b: Builder, x: Value, want: DType) -> Value:
    """A scalar converted as torch converts: to bool by `x != 0`, to and from floats under 32 bits through f32."""
    have = element_type(x.type)
    if have == want:
        return x
    x = promote(b, x)
    if want == I1:
        return b.arith("ne", x, 0)
    if _is_small(want):
        x = b.cast(x, F32)
    return b.cast(x, want)


def fill_value(value: Any, t: DType) -> bool | int | float:
    """A Python number of the kind that `t` holds."""
    if t.kind == "bool":
        return bool(value)
    return float(value) if t.is_float else int(value)


def lowest(t: DType) -> bool | int | float:
    """The neutral element of max on `t`."""
    if t.is_float:
        return float("-inf")
    if t.kind == "bool":
        return False
    return -(1 << (t.bits - 1)) if t.is_signed else 0


# -- scalars in bodies ------------------------------------------------------------------------------------------------

def index(b: Builder, dim: int) -> Value:
    """The position along dimension `dim` of the iteration space, i64."""
    return b.op("tensor.index", type=ScalarType(I64), dim=dim)


def scalar_size(b: Builder, size: Dim, t: DType = I64) -> Value:
    """A size expression as a scalar of type `t`, in a body."""
    if isinstance(size, int):
        return b.constant(size, t)
    return b.cast(b.op("tensor.sym", type=ScalarType(I64), expr=size), t)


# -- structured ops ---------------------------------------------------------------------------------------------------

def pointwise(b: Builder, shape: Shape, inputs: Sequence[Value], body: Body, want: DType, *,
              maps: Sequence[Map | None] | None = None, fills: Sequence[Any] = (), name: str = "") -> Value:
    """A tensor of `shape` and type `want`: `body(builder, *operands)` on promoted operands, rounded once.

    Without `maps` the operands broadcast. An operand whose map is none reaches the body whole, as it is.
    """
    rank = len(shape)
    used = [broadcast_map(shape_of(v), rank) for v in inputs] if maps is None else list(maps)

    def rounded(inner: Builder, *args: Value) -> Value:
        ready = [a if isinstance(a.type, TensorType) else promote(inner, a) for a in args]
        return to_dtype(inner, body(inner, *ready), want)

    return b.generic(inputs, [m if m is None else simplified(m, shape) for m in used], shape, rounded, fills=fills,
                     name=name).result


def reduce(b: Builder, parallel: Shape, reduced: Shape, inputs: Sequence[Value], maps: Sequence[Map], body: Body, kind: str, *,
           fills: Sequence[Any] = (), name: str = "") -> Value:
    """The `kind` combination of `body` over `reduced`; dimensions of the space are `parallel`, then `reduced`.

    The body takes promoted operands; the result keeps its type (i64 for argmax and argmin). Nothing to reduce is no error.
    """
    dims = (*parallel, *reduced)

    def promoted(inner: Builder, *args: Value) -> Value:
        return body(inner, *(promote(inner, a) for a in args))

    if not reduced and kind in ("argmax", "argmin"):
        return pointwise(b, parallel, [], lambda i: i.constant(0, I64), I64, name=name)
    return b.generic(inputs, [simplified(m, dims) for m in maps], dims, promoted, reductions=len(reduced),
                     combine=(kind,) if reduced else (), fills=fills, name=name).result


def move(b: Builder, x: Value, shape: Shape, m: Map, fill: Any = None) -> Value:
    """A view: result element at d0, d1, ... is x[m], or `fill` where m is out of bounds."""
    fills = () if fill is None else (fill_value(fill, tensor_type(x).dtype),)
    return b.generic([x], [simplified(m, shape)], shape, lambda _, a: a, fills=fills).result


def convert(b: Builder, x: Value, want: DType) -> Value:
    """A tensor in another element type; itself when it has that type."""
    t = tensor_type(x)
    return x if t.dtype == want else pointwise(b, t.shape, [x], lambda _, a: a, want)


def structured_body(b: Builder, inputs: Sequence[Value], maps: Sequence[Map | None],
                    body: Callable[..., Sequence[Value]]) -> Region:
    """The region of a structured op: one argument per input (whole where its map is none), yielding what `body` gives."""
    block = Block([v.type if m is None else ScalarType(tensor_type(v).dtype) for v, m in zip(inputs, maps, strict=True)])
    inner = Builder(block, None, b.location)
    inner.create("tensor.yield", body(inner, *block.args))
    return Region([block])
