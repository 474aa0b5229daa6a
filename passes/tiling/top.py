"""The best elements of a row (`tensor.topk`): one pass, a sorted list of the best so far in memory of the program's own.

Few elements enter the list once it has seen some (k ln(n / k) of n in random order), so a vector comparison with its last element decides about most.
"""

from __future__ import annotations

from ...ir import BufferType, Dim, Operation, TensorType, TileType, Value, element_type, sym
from ...ir.types import DTYPES, index
from .emit import Emitter, Pair
from .ordered import body_values, dot_of

__all__ = ["emit_topk"]

I64 = DTYPES["i64"]


def emit_topk(op: Operation, e: Emitter, buffers: dict[Value, Value], outs: list[Value | None]) -> list[Dim]:
    """Writes the kernel into `e`, a program per row; returns the grid. `outs` are the buffers of values and places, none for what nobody wants."""
    dims, k = op["dims"], op["k"]
    dtype = element_type(op.results[0].type)
    at: dict[str, Dim] = {}
    for j, size in enumerate(dims[:-1]):
        at[f"d{j}"] = e.fresh(e.builder.op("tile.program_id", type=index, axis=j), 0, size - 1)
    width = e.shape[1]
    lists = [e.builder.op("tile.alloca", type=BufferType((k,), t)) for t in (dtype, I64)]

    def clear(inner: Emitter, i: Dim, _: list[Value]) -> list[Value]:
        place = i + sym("t1")
        free = inner.broadcast(inner.builder.constant(-1, I64), (1, width))
        inner.store(lists[1], free, place, inner.needed([(place, k)]))
        return []

    def enter(inner: Emitter, i: Dim, _: list[Value]) -> list[Value]:
        place = i + sym("t1")
        active: list[Pair] = [(place, dims[-1])]
        value, = body_values(inner, op, buffers, {**at, f"d{len(dims) - 1}": place}, active)
        if not isinstance(value.type, TileType) or value.type.shape != (1, width):
            value = inner.broadcast(value, (1, width))
        inner.keep(lists[0], lists[1], value, place, inner.needed(active), largest=op["largest"])
        return []

    def copy(inner: Emitter, i: Dim, _: list[Value]) -> list[Value]:
        place = i + sym("t1")
        mask = inner.needed([(place, k)])
        for kept, out, result in zip(lists, outs, op.results, strict=True):
            if out is None:
                continue
            assert isinstance(result.type, TensorType)
            where = [*(at[f"d{j}"] for j in range(len(dims) - 1)), place]
            inner.store(out, inner.load(kept, place, mask), dot_of(where, result.type.layout, inner), mask)
        return []

    e.loop(0, k, width, [], clear)
    e.loop(0, dims[-1], width, [], enter)
    e.loop(0, k, width, [], copy)
    return list(dims[:-1])
