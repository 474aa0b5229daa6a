"""Views, concatenation and padding: generics whose body yields what it reads."""

from __future__ import annotations

from ...ir import Builder, Dim, IRError, Operation, Value
from .common import (
    Map,
    Rule,
    broadcast_map,
    d,
    fill_value,
    identity,
    index,
    move,
    scalar_size,
    shape_of,
    simplified,
    tensor_type,
)
from .reshape import reshape_map

__all__ = ["RULES"]


def _view(b: Builder, op: Operation, m: Map) -> list[Value]:
    return [move(b, op.operands[0], shape_of(op.result), m)]


def _reshape(b: Builder, op: Operation) -> list[Value]:
    return _view(b, op, reshape_map(shape_of(op.operands[0]), shape_of(op.result)))


def _permute(b: Builder, op: Operation) -> list[Value]:
    m: list[Dim] = [0] * len(op["perm"])
    for i, p in enumerate(op["perm"]):
        m[p] = d(i)
    return _view(b, op, tuple(m))


def _expand(b: Builder, op: Operation) -> list[Value]:
    return _view(b, op, broadcast_map(shape_of(op.operands[0]), len(shape_of(op.result))))


def _slice(b: Builder, op: Operation) -> list[Value]:
    spans = enumerate(zip(op["starts"], op["steps"], strict=True))
    return _view(b, op, tuple(start + d(i) * step for i, (start, step) in spans))


def _flip(b: Builder, op: Operation) -> list[Value]:
    shape = shape_of(op.result)
    return _view(b, op, tuple(size - 1 - d(i) if i in op["dims"] else d(i) for i, size in enumerate(shape)))


def _remap(b: Builder, op: Operation) -> list[Value]:
    return _view(b, op, tuple(op["map"]))


def _pad(b: Builder, op: Operation) -> list[Value]:
    x, low, high = op.operands[0], op["low"], op["high"]
    crops_only = all(isinstance(n, int) and n <= 0 for n in (*low, *high))
    m = tuple(d(i) - n for i, n in enumerate(low))
    return [move(b, x, shape_of(op.result), m, None if crops_only else op["value"])]


def _cat(b: Builder, op: Operation) -> list[Value]:
    """All operands are read, those that do not hold the element out of bounds; the position picks one."""
    dim, shape = op["dim"], shape_of(op.result)
    parts = [v for v in op.operands if shape_of(v)[dim] != 0] or list(op.operands[:1])
    if not parts:
        raise IRError("'graph.cat' has no operands")
    if len(parts) == 1:
        return [move(b, parts[0], shape, identity(len(shape)))]
    zero = fill_value(0, tensor_type(op.result).dtype)
    maps, ends, offset = [], [], 0
    for v in parts:
        maps.append(simplified([d(i) - offset if i == dim else d(i) for i in range(len(shape))], shape))
        offset = offset + shape_of(v)[dim]
        ends.append(offset)

    def body(i: Builder, *args: Value) -> Value:
        position = index(i, dim)
        out = args[-1]
        for value, end in reversed(list(zip(args[:-1], ends[:-1], strict=True))):
            out = i.arith("select", i.arith("lt", position, scalar_size(i, end)), value, out)
        return out

    made = b.generic(parts, maps, shape, body, fills=(zero,) * len(parts))
    made.attributes["_concatenates"] = dim
    return [made.result]


RULES: dict[str, Rule] = {
    "graph.reshape": _reshape, "graph.permute": _permute, "graph.expand": _expand, "graph.slice": _slice, "graph.flip": _flip,
    "graph.remap": _remap, "graph.cat": _cat, "graph.pad": _pad,
}
