"""Reads and writes at computed positions: generics that extract, and scatters.

A position out of range makes the call fail (`check`), as in torch; only advanced indexing (`index`, `index_put`) counts
negative ones from the end. Scatters that add or multiply floats under 32 bits do so in f32 and round once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...ir import Builder, Dim, Operation, ScalarType, TensorType, Value
from .common import (
    I64,
    Map,
    Rule,
    broadcast_map,
    broadcast_shape,
    computing,
    convert,
    d,
    identity,
    index,
    promote,
    scalar_size,
    shape_of,
    structured_body,
    tensor_type,
)

__all__ = ["RULES"]

_COMBINE = {"set": "set", "add": "add", "mul": "mul", "amax": "max", "amin": "min"}


def _extract(i: Builder, source: Value, indices: Sequence[Value]) -> Value:
    return i.op("tensor.extract", source, *indices, type=ScalarType(tensor_type(source).dtype))


def _wrapped(i: Builder, position: Value, size: Dim) -> Value:
    """A position that counts from the end when negative."""
    position = i.cast(position, I64)
    return i.arith("select", i.arith("lt", position, 0), i.arith("add", position, scalar_size(i, size)), position)


def _read(b: Builder, shape: Sequence[Dim], source: Value, indices: Sequence[Value], maps: Sequence[Map],
          where: Callable[..., Sequence[Value]]) -> list[Value]:
    """A tensor of `shape`: source[where(builder, *index elements)]."""
    return [b.generic([source, *indices], [None, *maps], shape, lambda i, whole, *at: _extract(i, whole, where(i, *at))).result]


def _embedding(b: Builder, op: Operation) -> list[Value]:
    weight, indices = op.operands
    shape, lead = shape_of(op.result), tensor_type(indices).rank

    def where(i: Builder, row: Value) -> list[Value]:
        return [i.cast(row, I64), *(index(i, k) for k in range(lead, len(shape)))]

    return _read(b, shape, weight, [indices], [identity(lead)], where)


def _bags(b: Builder, op: Operation) -> list[Value]:
    weight, indices, starts, *scales = op.operands
    t, inside, padding = tensor_type(op.result), computing(tensor_type(op.result).dtype), op["padding"]
    dims: list[Dim] = [t.shape[1], tensor_type(indices).shape[0]]
    inputs, maps = [starts, weight, indices, *scales], [None, None, *((d(1),) for _ in (indices, *scales))]

    def body(i: Builder, _: Value, table: Value, number: Value, *scale: Value) -> list[Value]:
        row = i.cast(number, I64)
        value = i.cast(_extract(i, table, [row, index(i, 0)]), inside)
        if scale:
            value = i.arith("mul", value, i.cast(scale[0], inside))
        return [value] if padding is None else [value, i.arith("ne", row, padding)]

    region = structured_body(b, inputs, maps, body)
    made = b.create("tensor.segments", inputs, {"dims": tuple(dims), "maps": tuple(maps), "combine": op["kind"]},
                    [TensorType(t.shape, inside)], [region]).result
    return [convert(b, made, t.dtype)]


def _gather(b: Builder, op: Operation) -> list[Value]:
    x, at = op.operands
    shape = shape_of(op.result)
    return _read(b, shape, x, [at], [identity(len(shape))],
                 lambda i, p: [i.cast(p, I64) if k == op["dim"] else index(i, k) for k in range(len(shape))])


def _take(b: Builder, op: Operation) -> list[Value]:
    x, at = op.operands
    shape = shape_of(op.result)
    m = broadcast_map(shape_of(at), 1, op["dim"]) if shape else ()
    return _read(b, shape, x, [at], [m],
                 lambda i, p: [i.cast(p, I64) if k == op["dim"] else index(i, k) for k in range(len(shape))])


@dataclass(frozen=True)
class _Advanced:
    """The geometry of x[indices at dims]: the shape of what is indexed, and where its parts come from.

    The broadcast shape of the indices stands at the first indexed dimension if the indexed ones are adjacent, else in front.
    """

    shape: tuple[Dim, ...]
    maps: tuple[Map, ...]
    dims: tuple[int, ...]
    rest: dict[int, int]  # unindexed dimension of x -> dimension of the indexed shape
    source: tuple[Dim, ...]

    def where(self, i: Builder, positions: Sequence[Value]) -> list[Value]:
        """The position in x, per dimension, of an element of the indexed shape."""
        at = dict(zip(self.dims, positions, strict=True))
        return [_wrapped(i, at[k], size) if k in at else index(i, self.rest[k]) for k, size in enumerate(self.source)]


def _advanced(x: Value, indices: Sequence[Value], dims: tuple[int, ...]) -> _Advanced:
    source, shapes = shape_of(x), [shape_of(v) for v in indices]
    joint = broadcast_shape(shapes)
    adjacent = dims == tuple(range(dims[0], dims[0] + len(dims)))
    first = dims[0] if adjacent else 0
    others = [k for k in range(len(source)) if k not in dims]
    shape = [source[k] for k in others]
    shape[first:first] = joint
    rest = {k: n if n < first else n + len(joint) for n, k in enumerate(others)}
    maps = tuple(broadcast_map(s, len(joint), first) for s in shapes)
    return _Advanced(tuple(shape), maps, dims, rest, source)


def _index(b: Builder, op: Operation) -> list[Value]:
    x, *indices = op.operands
    space = _advanced(x, indices, tuple(op["dims"]))
    return _read(b, shape_of(op.result), x, indices, space.maps, lambda i, *at: space.where(i, at))


def _scatter_into(b: Builder, init: Value, combine: str, dims: Sequence[Dim], inputs: Sequence[Value], maps: Sequence[Map],
                  where: Callable[[Builder, Sequence[Value]], list[Value]]) -> Value:
    """A `tensor.scatter` of the first input, at the positions that the others give."""
    t = tensor_type(init)
    wide = computing(t.dtype) if combine in ("add", "mul") else t.dtype

    def body(i: Builder, value: Value, *at: Value) -> list[Value]:
        return [promote(i, value) if wide != t.dtype else value, *where(i, at)]

    region = structured_body(b, inputs, maps, body)
    attrs = {"dims": tuple(dims), "maps": tuple(maps), "combine": combine}
    made = b.create("tensor.scatter", [convert(b, init, wide), *inputs], attrs, [TensorType(t.shape, wide)], [region])
    return convert(b, made.result, t.dtype)


def _index_put(b: Builder, op: Operation) -> list[Value]:
    x, values, *indices = op.operands
    space = _advanced(x, indices, tuple(op["dims"]))
    maps = [broadcast_map(shape_of(values), len(space.shape)), *space.maps]
    return [_scatter_into(b, x, "add" if op["accumulate"] else "set", space.shape, [values, *indices], maps, space.where)]


def _scatter(b: Builder, op: Operation) -> list[Value]:
    x, at, src = op.operands
    dims = shape_of(at)
    rank = len(dims)

    def where(i: Builder, positions: Sequence[Value]) -> list[Value]:
        return [i.cast(positions[0], I64) if k == op["dim"] else index(i, k) for k in range(rank)]

    read_src = identity(rank) if tensor_type(src).rank == rank else ()
    return [_scatter_into(b, x, _COMBINE[op["reduce"]], dims, [src, at], [read_src, identity(rank)], where)]


RULES: dict[str, Rule] = {
    "graph.embedding": _embedding, "graph.bags": _bags, "graph.gather": _gather, "graph.take": _take, "graph.index": _index,
    "graph.index_put": _index_put, "graph.scatter": _scatter,
}
