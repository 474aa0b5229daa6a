"""Attention as two contractions around a softmax, in the form that streams.

    s = q @ k^T * scale + mask;  m = max(s);  e = exp(s - m);  l = sum(e);  result = (e @ v) / l;  lse = m + log(l)

Dividing after the second product is what lets fusion keep one running m, l and e @ v. Query head h reads key head
h // (H / Hkv). A row that is masked throughout has result 0 and lse 0, as in torch (so that the backward's exp(s - lse) is 0).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...ir import Builder, Dim, Operation, Value, element_type
from ...ir.expr import floordiv
from .common import I1, Rule, broadcast_map, computing, convert, d, identity, index, pointwise, reduce, shape_of, tensor_type

__all__ = ["RULES"]


def _key_head(heads: Dim, key_heads: Dim) -> Dim:
    if key_heads == 1:
        return 0
    return floordiv(d(1), floordiv(heads, key_heads)) if heads != key_heads else d(1)


def _scores(b: Builder, op: Operation, q: Value, k: Value, mask: Sequence[Value]) -> Value:
    """[B, H, S, T] in the computing type: scaled, masked."""
    (batch, heads, length, width), (_, key_heads, keys, _) = shape_of(q), shape_of(k)
    space = (batch, heads, length, keys)
    products = reduce(b, space, (width,), (q, k), ((d(0), d(1), d(2), d(4)), (d(0), _key_head(heads, key_heads), d(3), d(4))),
                      lambda i, x, y: i.arith("mul", x, y), "sum")

    def body(i: Builder, s: Value, *bias: Value) -> Value:
        if op["scale"] != 1.0:
            s = i.arith("mul", s, op["scale"])
        for m in bias:
            s = i.arith("select", m, s, -math.inf) if element_type(m.type) == I1 else i.arith("add", s, m)
        if op["causal"]:
            s = i.arith("select", i.arith("le", index(i, 3), index(i, 2)), s, -math.inf)
        return s

    maps = [identity(4), *(broadcast_map(shape_of(m), 4) for m in mask)]
    return pointwise(b, space, [products, *mask], body, tensor_type(products).dtype, maps=maps)


def _attention(b: Builder, op: Operation) -> list[Value | None]:
    q, k, v, *mask = op.operands
    (batch, heads, length, _), (_, value_heads, keys, width) = shape_of(q), shape_of(v)
    rows, wide = (batch, heads, length), computing(tensor_type(q).dtype)
    row = identity(3)

    scores = _scores(b, op, q, k, mask)
    m = reduce(b, rows, (keys,), [scores], [identity(4)], lambda _, s: s, "max")
    e = pointwise(b, (*rows, keys), [scores, m], lambda i, s, x: i.arith("exp", i.arith("sub", s, x)), wide,
                  maps=(identity(4), row))
    total = reduce(b, rows, (keys,), [e], [identity(4)], lambda _, s: s, "sum")
    read_v = (d(0), _key_head(heads, value_heads), d(4), d(3))
    weighted = reduce(b, (*rows, width), (keys,), (e, v), ((d(0), d(1), d(2), d(4)), read_v),
                      lambda i, x, y: i.arith("mul", x, y), "sum")

    def unless_dead(i: Builder, value: Value, x: Value) -> Value:
        """Weights of a row whose maximum is -inf are exp(-inf + inf), NaN."""
        return i.arith("select", i.arith("eq", x, -math.inf), 0, value) if mask else value

    out = pointwise(b, shape_of(op.results[0]), [weighted, total, *([m] if mask else [])],
                    lambda i, x, s, *top: unless_dead(i, i.arith("div", x, s), *(top or [x])), tensor_type(op.results[0]).dtype,
                    maps=(identity(4), row, *([row] if mask else [])))
    lse: Value | None = None
    if op.results[1].uses:
        lse = pointwise(b, rows, [m, total], lambda i, x, s: unless_dead(i, i.arith("add", x, i.arith("log", s)), x),
                        tensor_type(op.results[1]).dtype)
    return [out, lse]


def _attention_backward(b: Builder, op: Operation) -> list[Value]:
    """The weights again from the scores and lse; three products of them (Dao 2023, section 3.1.2). Gradients of a key head sum over its queries'."""
    grad, q, k, v, result, lse, *mask = op.operands
    (batch, heads, length, width), (_, key_heads, keys, wide_v) = shape_of(q), shape_of(v)
    space, rows, wide = (batch, heads, length, keys), (batch, heads, length), computing(tensor_type(q).dtype)
    row, key_head = identity(3), _key_head(heads, key_heads)
    scores = _scores(b, op, q, k, mask)

    def weight(i: Builder, s: Value, x: Value) -> Value:
        return i.arith("select", i.arith("eq", s, -math.inf), 0, i.arith("exp", i.arith("sub", s, x)))

    p = pointwise(b, space, [scores, convert(b, lse, wide)], weight, wide, maps=(identity(4), row))
    delta = reduce(b, rows, (wide_v,), [grad, result], [identity(4), identity(4)], lambda i, x, y: i.arith("mul", x, y), "sum")
    dp = reduce(b, space, (wide_v,), (grad, v), ((d(0), d(1), d(2), d(4)), (d(0), key_head, d(3), d(4))), lambda i, x, y: i.arith("mul", x, y),
                "sum")
    ds = pointwise(b, space, [p, dp, delta], lambda i, x, y, z: i.arith("mul", i.arith("mul", x, i.arith("sub", y, z)), op["scale"]),
                   tensor_type(q).dtype, maps=(identity(4), identity(4), row))
    dq = reduce(b, (batch, heads, length, width), (keys,), (ds, k), ((d(0), d(1), d(2), d(4)), (d(0), key_head, d(4), d(3))),
                lambda i, x, y: i.arith("mul", x, y), "sum")
    group = floordiv(heads, key_heads)

    def of_keys(x: Value, y: Value, into: Value) -> Value:
        """sum over queries, and over the query heads of a key head, of x[.., s, t] * y[.., s, d]."""
        head, s, over = (d(1), d(4), (length,)) if group == 1 else (d(1) * group + d(4), d(5), (group, length))
        made = reduce(b, shape_of(into), over, (x, y), ((d(0), head, s, d(2)), (d(0), head, s, d(3))), lambda i, a, c: i.arith("mul", a, c), "sum")
        return convert(b, made, tensor_type(into).dtype)

    return [convert(b, dq, tensor_type(q).dtype), of_keys(ds, q, k), of_keys(convert(b, p, tensor_type(v).dtype), grad, v)]


RULES: dict[str, Rule] = {"graph.attention": _attention, "graph.attention_backward": _attention_backward}
