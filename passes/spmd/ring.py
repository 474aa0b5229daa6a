"""Ring attention (Liu et al. 2023): every rank has a block of the sequence; keys and values go round, once, and meet all queries.

    ring_strategy(op, ranks)        # attention or its gradient, cut along the sequence; None where it does not come out even

Forward, step t: a rank's queries meet the block of the rank t places before it. The results of two steps are put together by their
log-sum-exps, as in streaming attention. Backward, keys and values go round again, and with each block travel the gradients that it has got so far;
after as many shifts as there are ranks they are home. A causal mask is a matter of whole blocks: a rank's own is masked, those of
ranks before it count whole, those of ranks behind it not at all; a rank knows its place when its program is compiled, and what does not count is
not computed.
Sums over blocks are kept in float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...ir.core import Operation, Value
from ...ir.sharding import REPLICATE, Placement, shard
from ...ir.types import DTYPES, DType, TensorType
from .build import I1, I64, LocalBuilder, sizes_of, tensor_type
from .rules import Strategy

__all__ = ["ring_attention", "ring_attention_backward", "ring_strategy"]

F32 = DTYPES["f32"]
SEQUENCE = 2


def ring_strategy(op: Operation, ranks: int) -> Strategy | None:
    """Queries, keys, values, results and log-sum-exps cut along the sequence; masks along their rows."""
    if op.name not in ("graph.attention", "graph.attention_backward"):
        return None
    first = 0 if op.name == "graph.attention" else 1
    q, k = sizes_of(op.operands[first]), sizes_of(op.operands[first + 1])
    masks = op.operands[first + 3:] if not first else op.operands[6:]
    if q[SEQUENCE] % ranks or k[SEQUENCE] % ranks or (op["causal"] and q[SEQUENCE] != k[SEQUENCE]):
        return None
    if any(tensor_type(m).rank != 4 or not tensor_type(m).dtype.is_float for m in masks):
        return None
    cut = shard(SEQUENCE)
    rows: list[Placement] = [cut if sizes_of(m)[SEQUENCE] > 1 else REPLICATE for m in masks]
    given = len(op.operands) - len(masks)
    return Strategy((*(cut,) * given, *rows), (cut,) * len(op.results), "ring_attention_backward" if first else "ring_attention")


def _columns(b: LocalBuilder, masks: Sequence[Value], step: int) -> list[Value]:
    """Of the masks, the columns of the block that is here at this step."""
    return [b.shard(m, shard(3), step) if sizes_of(m)[3] > 1 else m for m in masks]


def _reached(b: LocalBuilder, step: int) -> Value:
    """Whether the block that is here lies before this rank's own in the sequence."""
    return b.ew("ge", b.coordinate(), b.full((), step, I64), dtype=I1)


def _cast(b: LocalBuilder, x: Value, dtype: DType) -> Value:
    t = tensor_type(x)
    return x if t.dtype == dtype else b.b.op("graph.cast", x, type=TensorType(t.shape, dtype))


def _accumulates_in(dtype: DType) -> DType:
    return F32 if dtype.bytes < 4 else dtype


def _low(b: LocalBuilder, dtype: DType) -> Value:
    return b.full((), -math.inf, dtype)


def ring_attention(b: LocalBuilder, op: Operation, xs: Sequence[Value]) -> list[Value]:
    """The program of `graph.attention` on this rank's queries: see the module docstring."""
    q, k, v, *masks = xs
    result, lse = (tensor_type(r) for r in op.results)
    shape, rows = (*sizes_of(q)[:3], result.shape[3]), sizes_of(q)[:3]
    wide = _accumulates_in(result.dtype)

    def block(k: Value, v: Value, step: int) -> tuple[Value, Value]:
        """(result in the accumulating type, lse: -inf for rows that see nothing of the block)."""
        columns = _columns(b, masks, step)
        causal = {"causal": True} if op["causal"] and not step else {}
        made = b.b.create("graph.attention", [q, k, v, *columns], {"scale": op["scale"], **causal},
                          [TensorType(shape, result.dtype), TensorType(rows, lse.dtype)])
        here: Value = made.results[1]
        if columns:
            seen = b.reduce("amax", columns[0], 3)
            t = tensor_type(seen)
            dead = b.ew("eq", b.reshape(seen, sizes_of(seen)[:3]), _low(b, t.dtype), dtype=I1)
            here = b.ew("select", dead, _low(b, lse.dtype), here)
        found = _cast(b, made.results[0], wide)
        if op["causal"] and step:
            here = b.ew("select", _reached(b, step), here, _low(b, lse.dtype))
            found = b.ew("select", _reached(b, step), found, b.full((), 0.0, wide))
        return found, here

    def weight(here: Value, top: Value) -> Value:
        return b.ew("exp", b.ew("sub", here, top))

    total, at = block(k, v, 0)
    for step in range(1, b.ranks):
        k, v = b.shift(k), b.shift(v)
        part, here = block(k, v, step)
        top = b.ew("max", at, here)
        if masks:  # rows that have seen nothing yet
            top = b.ew("select", b.ew("eq", top, _low(b, lse.dtype), dtype=I1), b.full((), 0.0, lse.dtype), top)
        before, now = weight(at, top), weight(here, top)
        both = b.ew("add", before, now)
        at = b.ew("add", top, b.ew("log", both))
        if masks:
            both = b.ew("select", b.ew("eq", both, b.full((), 0.0, lse.dtype), dtype=I1), b.full((), 1.0, lse.dtype), both)

        def share(x: Value, of: Value, both: Value = both) -> Value:
            factor = _cast(b, b.ew("div", of, both), wide)
            return b.ew("mul", x, b.reshape(factor, (*rows, 1)))
        total = b.ew("add", share(total, before), share(part, now))
    if masks:
        at = b.ew("select", b.ew("eq", at, _low(b, lse.dtype), dtype=I1), b.full((), 0.0, lse.dtype), at)
    return [_cast(b, total, result.dtype), at]


def ring_attention_backward(b: LocalBuilder, op: Operation, xs: Sequence[Value]) -> list[Value]:
    """The program of `graph.attention_backward` on this rank's queries, keys and values: see the module docstring."""
    grad, q, k, v, result, lse, *masks = xs
    types = [TensorType(tensor_type(x).shape, tensor_type(x).dtype) for x in (q, k, v)]
    wide = _accumulates_in(types[0].dtype)

    def block(k: Value, v: Value, step: int) -> list[Value]:
        causal = {"causal": True} if op["causal"] and not step else {}
        given = [grad, q, k, v, result, lse, *_columns(b, masks, step)]
        made = b.b.create("graph.attention_backward", given, {"scale": op["scale"], **causal}, types)
        found = [_cast(b, r, wide) for r in made.results]
        if not op["causal"] or not step:
            return found
        return [b.ew("select", _reached(b, step), x, b.full((), 0.0, wide)) for x in found]

    dq, dk, dv = block(k, v, 0)
    for step in range(1, b.ranks):
        k, v, dk, dv = (b.shift(x) for x in (k, v, dk, dv))
        to_q, to_k, to_v = block(k, v, step)
        dq, dk, dv = b.ew("add", dq, to_q), b.ew("add", dk, to_k), b.ew("add", dv, to_v)
    made = [dq, b.shift(dk), b.shift(dv)]
    return [_cast(b, x, t.dtype) for x, t in zip(made, types, strict=True)]
