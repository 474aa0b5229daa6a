"""The place of the largest or smallest element of a row, beside the element: (best value, its position) for each lane of a tile."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...ir import Builder, DType, Value, element_type
from ...ir.types import DTYPES
from .emit import Emitter, identity_of

__all__ = ["better_of", "initial_extreme", "place_of"]

NOWHERE = (1 << 63) - 1


def initial_extreme(e: Emitter, kind: str, dtype: DType, tile: tuple[int, int]) -> list[Value]:
    """Before the first element. `kind`: argmax or argmin, as everywhere here."""
    b = e.builder
    return [e.broadcast(b.constant(identity_of(kind[3:], dtype), dtype), tile), e.broadcast(b.constant(NOWHERE, DTYPES["i64"]), tile)]


def better_of(b: Builder, value: Value, position: Value, acc: Sequence[Value], mask: Value | None, kind: str) -> list[Value]:
    """Better is strictly larger, or NaN over a number; ties keep the earlier position."""
    best, at = acc
    better = b.arith("gt" if kind == "argmax" else "lt", value, best)
    if element_type(value.type).is_float:
        nan_now, nan_before = b.arith("isnan", value), b.arith("isnan", best)
        better = b.arith("or", b.arith("and", better, b.arith("bitnot", nan_before)), b.arith("and", nan_now, b.arith("bitnot", nan_before)))
    better = b.arith("or", better, b.arith("eq", at, NOWHERE))
    if mask is not None:
        better = b.arith("and", better, mask)
    return [b.arith("select", better, value, best), b.arith("select", better, position, at)]


def place_of(b: Builder, acc: Sequence[Value], kind: str, axes: Sequence[int], reduced: Callable[[Value, int, str], Value]) -> Value:
    """Over all lanes along `axes`; `reduced(value, axis, kind)` reduces a tile."""
    best, at = acc
    for axis in axes:
        top = reduced(best, axis, kind[3:])
        same = b.arith("eq", best, top)
        if element_type(best.type).is_float:  # any NaN makes the reduced value NaN: then only NaN lanes compete
            same = b.arith("or", same, b.arith("isnan", best))
        candidates = b.arith("select", same, at, NOWHERE)
        if element_type(best.type).is_float:
            candidates = b.arith("select", b.arith("and", b.arith("isnan", top), b.arith("bitnot", b.arith("isnan", best))), NOWHERE, candidates)
        at = reduced(candidates, axis, "min")
        best = top
    return at
