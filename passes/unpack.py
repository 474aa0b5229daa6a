"""A dequantised parameter that few rows multiply is packed as it is stored, and dequantised in the product's inner loop (CPUs).

    w = (q - zero) * scale;  y = x @ w      ->      panels of q, zero and scale;  w a vector at a time, as the product reads it

Such a product waits for its parameter to come from memory: 8 or 4 bits of it instead of 32, and no copy of the dequantised parameter is
kept. With more rows, whose tiles would dequantise again, `pack` keeps the dequantised panels.

Each operand is packed in panels of the product's columns, with as few steps of K as tell its elements apart: a byte of two 4-bit numbers
serves two steps, a group's scale as many as the group has. The op that dequantises has `_unpacks`; `fuse` puts it into the product's kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..ir import Builder, Dim, Operation, TensorType, Value, element_type, sym
from ..ir.dialects.tensor import fill_of
from ..ir.expr import as_int, free_symbols, substitute
from ..ir.ranges import simplify
from .structured import EXPENSIVE, body_ops, inline_into, inline_padded, is_pointwise, rebuild, space_bounds

__all__ = ["UNPACKS", "unpacked_in_kernel"]

UNPACKS = "_unpacks"
OPS = 24
"""Most ops per element, those that choose among them by position included."""
ROWS = 4
"""Most rows, if not all are of one register tile."""
GROUPS = (1024, 512, 256, 128, 64, 32, 16, 8, 4, 2)
"""Steps of K that may share an element of an operand."""


def unpacked_in_kernel(v: Value, source: Sequence[Dim], dims: Sequence[Dim], rows: Dim, tile_rows: int, constant: set[Value],
                       body: Callable[..., Any], fill: Any, b: Builder) -> Value | None:
    """The panels [panels, k, columns] of `v`, read at `source` from their space `dims`, as an op that makes them from narrower panels; None where
    that does not pay. `body` and `fill` make panels of any operand: with nothing past the last column."""
    maker = v.defining_op
    if not isinstance(rows, int) or rows > max(ROWS, tile_rows) or len(dims) != 3 or not all(isinstance(n, int) for n in dims):
        return None
    if element_type(v.type).name != "f32" or not _may_be_copied(maker, constant):
        return None
    assert maker is not None
    original, maker = maker, b.insert(maker.clone({}))
    while (i := _made_of_less(maker, constant)) is not None:
        made = maker.operands[i].defining_op
        maker = inline_padded(maker, i) if fill_of(maker, i) is not None else inline_into(maker, made)  # type: ignore[arg-type]
    bounds, env = space_bounds(dims), {f"d{d}": e for d, e in enumerate(source)}
    maps = [tuple(simplify(substitute(e, env), bounds) for e in m) for m in maker["maps"]]
    groups = [_group(m, dims) for m in maps]
    wide = [bool({"d0", "d2"} & {s for e in m for s in free_symbols(e)}) for m in maps]
    stored = sum(as_int(dims[1]) // g * element_type(u.type).bits for u, g, w in zip(maker.operands, groups, wide, strict=True) if w)
    if not _is_cheap(maker) or stored * 2 > as_int(dims[1]) * element_type(v.type).bits or original.result.type != maker.result.type:
        maker.erase()
        return None
    operands = list(maker.operands)
    fills: list[Any] = [fill_of(maker, i) for i in range(len(operands))]
    for i, (u, m, g, w) in enumerate(zip(maker.operands, maps, groups, wide, strict=True)):
        if w:
            read = tuple(simplify(substitute(e, {"d1": sym("d1") * g}), bounds) for e in m)
            panels = b.generic([u], [read], [dims[0], dims[1] // g, dims[2]], body, fills=[0 if fills[i] is not None else fill],
                               name=f"{u.name or 'w'}_packed")
            constant.add(panels.result)
            operands[i], maps[i], fills[i] = panels.result, (sym("d0"), simplify(sym("d1") // g, bounds), sym("d2")), None
    index = {d: simplify(e, bounds) for d, e in enumerate(source)}
    made = rebuild(maker, b, operands, maps, fills, dims, index)
    made.attributes[UNPACKS] = True
    maker.erase()
    return made.result


def _may_be_copied(maker: Operation | None, constant: set[Value]) -> bool:
    return (maker is not None and is_pointwise(maker) and len(maker.results) == 1 and bool(maker.operands)
            and all(m is not None for m in maker["maps"]) and all(v in constant for v in maker.operands))


def _made_of_less(maker: Operation, constant: set[Value]) -> int | None:
    """An operand that a pointwise op makes of no more bytes (numbers of 4 bits, of bytes)."""
    for i, v in enumerate(maker.operands):
        made = v.defining_op
        if made is None or not _may_be_copied(made, constant) or any(fill_of(made, j) is not None for j in range(len(made.operands))):
            continue
        if sum(_bytes(u) for u in made.operands) <= _bytes(v) and len(body_ops(maker)) + len(body_ops(made)) <= 2 * OPS:
            return i
    return None


def _bytes(v: Value) -> int:
    assert isinstance(v.type, TensorType)
    return as_int(v.type.numel) * v.type.dtype.bytes


def _is_cheap(maker: Operation) -> bool:
    real = [o for o in body_ops(maker) if o.name not in ("arith.constant", "tensor.index", "tensor.sym")]
    return len(real) <= OPS and not any(o.name in EXPENSIVE or o.name == "tensor.extract" for o in real)


def _group(m: Sequence[Dim], dims: Sequence[Dim]) -> int:
    """How many steps of K (d1) next to each other read the same element."""
    for g in GROUPS:
        if as_int(dims[1]) % g == 0:
            bounds = {**space_bounds(dims), "group": (0, dims[1] // g - 1), "within": (0, g - 1)}
            at = {"d1": sym("group") * g + sym("within")}
            if not any("within" in free_symbols(simplify(substitute(e, at), bounds)) for e in m):
                return g
    return 1


