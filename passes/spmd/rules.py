"""The sharding rule of every graph op: one table row each.

    strategies(op, ranks, parts) -> [Strategy, ...]

A strategy says, for one mesh axis of `ranks` ranks, how the operands must lie so that every rank can do its share without
communicating, and how the results then lie. Running replicated is always possible and not listed. Most rows name *factors*
(as in Shardy): iteration dimensions that operands and results share; cutting one cuts them all, and a factor that no result
has is combined: the results are partial. Ops that are linear pass partial operands on. A strategy with `emit` needs more than
the op on local shapes: `special.py` has the program for it, and `traffic` the bytes that it communicates.
`parts` lists the part counts in use on the operands (see `ir/sharding.py`); views map them exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...ir.core import Operation, Value
from ...ir.dialects.arith import BY_NAME
from ...ir.expr import Expr, free_symbols
from ...ir.sharding import REPLICATE, Placement, partial, shard
from ...ir.types import TensorType

__all__ = ["RULES", "Strategy", "shape_of", "strategies"]

Dims = Sequence["str | None"]
"""Per dimension of a tensor the factor it runs over, or none where it must stay whole."""


@dataclass(frozen=True)
class Strategy:
    """Placements of operands and results along one axis; `emit` names a program of `special.py`, `traffic` its bytes per rank."""

    operands: tuple[Placement, ...]
    results: tuple[Placement, ...]
    emit: str = ""
    traffic: float = 0.0


@dataclass(frozen=True)
class Query:
    """What a row is asked: an op, on an axis of `ranks` ranks, with these part counts."""

    op: Operation
    ranks: int
    parts: tuple[int, ...]

    def fits(self, size: Any, parts: int) -> bool:
        return isinstance(size, int) and size > 0 and size % (self.ranks * parts) == 0


Rule = Callable[[Query], list[Strategy]]


def shape_of(v: Value) -> tuple[Any, ...]:
    """The shape of a tensor value."""
    assert isinstance(v.type, TensorType)
    return v.type.shape


def strategies(op: Operation, ranks: int, parts: Iterable[int] = ()) -> list[Strategy]:
    """Every way but replication to run `op` on an axis of `ranks` ranks; [] for ops that must see whole tensors."""
    row = RULES.get(op.name)
    return row(Query(op, ranks, tuple(sorted({1, *parts})))) if row is not None else []


# -- building strategies -----------------------------------------------------------------------------------------------


def _factors(q: Query, operands: Sequence[Dims], results: Sequence[Dims], reduce: Mapping[str, str] | None = None) -> list[Strategy]:
    """One strategy per factor and part count that divides every dimension it runs over."""
    op = q.op
    names = dict.fromkeys(f for dims in (*operands, *results) for f in dims if f is not None)
    found = []
    for f in names:
        sizes = [shape_of(v)[i] for v, dims in zip((*op.operands, *op.results), (*operands, *results), strict=True)
                 for i, g in enumerate(dims) if g == f]
        for p in q.parts:
            if not all(q.fits(s, p) for s in sizes):
                continue
            outs = [_at(dims, f, p) for dims in results]
            if reduce is not None and f in reduce:
                if not reduce[f]:
                    continue
                outs = [partial(reduce[f])] * len(outs)
            elif any(o == REPLICATE for o in outs):
                continue
            given = tuple(_at(dims, f, p) for dims in operands)
            if any(g != REPLICATE for g in given):  # a factor of results alone is no reason to cut
                found.append(Strategy(given, tuple(outs)))
    return found


def _at(dims: Dims, factor: str, parts: int) -> Placement:
    return shard(list(dims).index(factor), parts) if factor in dims else REPLICATE


def _linear(q: Query, *groups: Sequence[int], op: str = "sum") -> list[Strategy]:
    """Partial results when the operands of one group are partial and the others replicated."""
    n, results = len(q.op.operands), tuple(partial(op) for _ in q.op.results)
    return [Strategy(tuple(partial(op) if i in group else REPLICATE for i in range(n)), results) for group in groups]


def _named(rank: int, prefix: str = "d") -> list[str | None]:
    return [f"{prefix}{i}" for i in range(rank)]


def _is_float(v: Value) -> bool:
    return isinstance(v.type, TensorType) and v.type.dtype.is_float


# -- elementwise -------------------------------------------------------------------------------------------------------

_LINEAR: dict[str, tuple[tuple[int, ...], ...]] = {
    "add": ((0, 1),), "sub": ((0, 1),), "neg": ((0,),), "mul": ((0,), (1,)), "div": ((0,),), "cast": ((0,),), "select": ((1, 2),),
}
"""Elementwise ops that are linear: the groups of operands that may be partial together."""


def _broadcast_dims(operand: Value, result: Value) -> Dims:
    """Factors of an operand that broadcasts, aligned at the last dimension; a repeated dimension stays whole."""
    a, r = shape_of(operand), shape_of(result)
    shift = len(r) - len(a)
    return [f"d{i + shift}" if a[i] == r[i + shift] else None for i in range(len(a))]


def _elementwise(q: Query) -> list[Strategy]:
    op = q.op
    rank = len(shape_of(op.result))
    found = _factors(q, [_broadcast_dims(v, op.result) for v in op.operands], [_named(rank)])
    groups = _LINEAR.get(op.name.partition(".")[2], ())
    if groups and _is_float(op.result) and all(_is_float(op.operands[i]) for g in groups for i in g):
        found += _linear(q, *groups)
    return found


# -- views -------------------------------------------------------------------------------------------------------------


def _view_factors(q: Query, source: Dims, result: Dims, *, linear: bool = True) -> list[Strategy]:
    return _factors(q, [source], [result]) + (_passing(q) if linear else [])


def _passing(q: Query) -> list[Strategy]:
    """Partial operands of ops that move elements, whatever the combination."""
    n = len(q.op.operands)
    return [s for kind in ("sum", "max", "min") for s in _linear(q, range(n), op=kind)]


def _reshape(q: Query) -> list[Strategy]:
    """Exact: a piece is runs of `chunk` consecutive elements out of every `block`, in row-major order, before and after."""
    source, result = shape_of(q.op.operands[0]), shape_of(q.op.result)
    found = []
    for d, size in enumerate(source):
        stride = _product(source[d + 1:])
        for p in q.parts:
            if not q.fits(size, p):
                continue
            block = size // p * stride
            target = _dimension_of(result, block, block // q.ranks)
            if target is not None:
                found.append(Strategy((shard(d, p),), (target,)))
    return found + _passing(q)


def _dimension_of(shape: Sequence[int], block: int, chunk: int) -> Placement | None:
    """The placement whose pieces are `chunk` consecutive elements out of every `block`; None if there is none."""
    for d in range(len(shape)):
        stride, extent = _product(shape[d + 1:]), _product(shape[d:])
        if extent % block == 0 and chunk % stride == 0 and stride <= chunk and block <= extent and shape[d] > 1:
            return shard(d, extent // block)
    return None


def _product(sizes: Sequence[int]) -> int:
    total = 1
    for s in sizes:
        total *= s
    return total


def _permute(q: Query) -> list[Strategy]:
    perm = q.op["perm"]
    source = _named(len(perm))
    return _view_factors(q, source, [source[p] for p in perm])


def _expand(q: Query) -> list[Strategy]:
    return _view_factors(q, _broadcast_dims(q.op.operands[0], q.op.result), _named(len(shape_of(q.op.result))))


def _slice(q: Query) -> list[Strategy]:
    op = q.op
    source, result = shape_of(op.operands[0]), shape_of(op.result)
    whole = [a == b and s == 0 and t == 1 for a, b, s, t in zip(source, result, op["starts"], op["steps"], strict=True)]
    dims: Dims = [f"d{i}" if w else None for i, w in enumerate(whole)]
    found = _factors(q, [dims], [_named(len(result))]) + _passing(q)
    # Cutting whole parts out of a dimension that is sharded part by part.
    for d, (a, b, start, step) in enumerate(zip(source, result, op["starts"], op["steps"], strict=True)):
        for p in q.parts:
            if p > 1 and not whole[d] and step == 1 and q.fits(a, p) and b % (a // p) == 0 and start % (a // p) == 0:
                found.append(Strategy((shard(d, p),), (shard(d, b // (a // p)),), "slice_parts"))
    return found


def _flip(q: Query) -> list[Strategy]:
    dims: Dims = [None if i in q.op["dims"] else f"d{i}" for i in range(len(shape_of(q.op.result)))]
    return _view_factors(q, dims, _named(len(dims)))


def _remap(q: Query) -> list[Strategy]:
    """Dimensions that the map takes over as they are."""
    source, result = shape_of(q.op.operands[0]), shape_of(q.op.result)
    used = [free_symbols(e) if isinstance(e, Expr) else frozenset() for e in q.op["map"]]
    dims: Dims = [next((f"d{i}" for i in range(len(result)) if str(e) == f"d{i}" and source[j] == result[i]
                        and sum(f"d{i}" in u for u in used) == 1), None) for j, e in enumerate(q.op["map"])]
    return _view_factors(q, dims, _named(len(result)))


def _cat(q: Query) -> list[Strategy]:
    op = q.op
    d, rank = op["dim"], len(shape_of(op.result))
    dims: Dims = [None if i == d else f"d{i}" for i in range(rank)]
    found = _factors(q, [dims] * len(op.operands), [_named(rank)]) + _passing(q)
    sizes = {shape_of(v)[d] for v in op.operands}
    if len(sizes) == 1 and len(op.operands) > 1:  # equal operands become the parts of the result
        for p in q.parts:
            if q.fits(next(iter(sizes)), p):
                n = len(op.operands)
                found.append(Strategy((shard(d, p),) * n, (shard(d, p * n),)))
    return found


def _pad(q: Query) -> list[Strategy]:
    op = q.op
    dims: Dims = [f"d{i}" if lo == 0 and hi == 0 else None for i, (lo, hi) in enumerate(zip(op["low"], op["high"], strict=True))]
    return _factors(q, [dims], [_named(len(dims))]) + (_linear(q, (0,)) if op["value"] == 0 and _is_float(op.result) else [])


# -- contractions ------------------------------------------------------------------------------------------------------


def _matmul(q: Query) -> list[Strategy]:
    batch = _named(len(shape_of(q.op.result)) - 2, "b")
    return _factors(q, [[*batch, "m", "k"], [*batch, "k", "n"]], [[*batch, "m", "n"]], {"k": "sum"}) + _linear(q, (0,), (1,))


def _attention(q: Query) -> list[Strategy]:
    """Batch and heads; and rows of the queries, unless the causal mask counts them."""
    op = q.op
    rows = None if op["causal"] else "s"
    mask: list[Dims] = []
    for v in op.operands[3:]:
        shape, full = shape_of(v), ["b", "h", rows, None]
        mask.append([f if size != 1 else None for f, size in zip(full[4 - len(shape):], shape, strict=True)])
    lse = ["b", "h", rows, None][:len(shape_of(op.results[1]))]
    return _factors(q, [["b", "h", rows, None], ["b", "h", None, None], ["b", "h", None, None], *mask],
                    [["b", "h", rows, None], lse])


def _attention_backward(q: Query) -> list[Strategy]:
    """Batch and heads, which every operand has; of a mask, where it is not repeated."""
    op = q.op
    masks: list[Dims] = [[f if size != 1 else None for f, size in zip(["b", "h", None, None][4 - len(shape):], shape, strict=True)]
                         for shape in (shape_of(v) for v in op.operands[6:])]
    whole: Dims = ["b", "h", None, None]
    return _factors(q, [*[whole] * 5, whole[:3], *masks], [whole] * 3)


def _conv(q: Query) -> list[Strategy]:
    op = q.op
    rest: list[str | None] = [None] * (len(shape_of(op.result)) - 2)
    out, into = ("o", "c") if op["groups"] == 1 else (None, None)
    rows: dict[str, tuple[list[Dims], Dims, dict[str, str]]] = {
        "graph.conv": ([["b", into, *rest], [out, into, *rest]], ["b", out or "o", *rest], {"c": "sum"}),
        "graph.conv_transpose": ([["b", out, *rest], [out, into, *rest]], ["b", into or "c", *rest], {"o": "sum"}),
        "graph.conv_weight_grad": ([["b", out, *rest], ["b", into, *rest]], [out or "o", into or "c", *rest], {"b": "sum"}),
    }
    operands, result, reduce = rows[op.name]
    named = [f or f"x{i}" for i, f in enumerate(result)]
    return [s for s in _factors(q, operands, [named], reduce) if any(p != REPLICATE for p in s.operands)] + _linear(q, (0,), (1,))


# -- reductions and norms ----------------------------------------------------------------------------------------------

_PARTIAL_OF = {"sum": "sum", "mean": "sum", "amax": "max", "amin": "min"}


def _reduction(q: Query) -> list[Strategy]:
    op, kind = q.op, q.op.name.partition(".")[2]
    rank = len(shape_of(op.operands[0]))
    dims = op["dims"]
    operand = _named(rank)
    result: Dims = [None if i in dims else f"d{i}" for i in range(rank) if op["keepdim"] or i not in dims]
    combine = _PARTIAL_OF.get(kind, "")
    if op.result.type.dtype.kind == "bool" or kind.startswith("arg"):  # type: ignore[attr-defined]
        combine = ""
    found = _factors(q, [operand], [_open(result)], {f"d{i}": combine for i in dims})
    if kind == "mean":
        found = [Strategy(s.operands, s.results, "mean") if s.results[0].kind == "partial" else s for s in found]
    if kind in ("sum", "mean") and _is_float(op.result):
        found += _linear(q, (0,))
    if kind in ("amax", "amin"):
        found += _linear(q, (0,), op=combine)
    return found


def _open(dims: Dims) -> Dims:
    """Dimensions of size 1 that no factor runs over get a factor of their own, which never divides."""
    return [f if f is not None else f"one{i}" for i, f in enumerate(dims)]


def _var_mean(q: Query) -> list[Strategy]:
    op = q.op
    rank = len(shape_of(op.operands[0]))
    result: Dims = [None if i in op["dims"] else f"d{i}" for i in range(rank) if op["keepdim"] or i not in op["dims"]]
    return _factors(q, [[None if i in op["dims"] else f"d{i}" for i in range(rank)]], [_open(result)] * 2)


def _along(q: Query) -> list[Strategy]:
    """Ops that work along one dimension of one tensor: all the others may be cut."""
    rank, d = len(shape_of(q.op.result)), q.op["dim"]
    return _factors(q, [[None if i == d else f"d{i}" for i in range(rank)]], [_named(rank)])


def _softmax(q: Query) -> list[Strategy]:
    """Cut along `dim` too: two small all-reduces, of maxima and of sums."""
    shape, d = shape_of(q.op.result), q.op["dim"]
    rows = _product(shape) // shape[d] * q.op.result.type.dtype.bytes  # type: ignore[attr-defined]
    return _along(q) + [Strategy((shard(d, p),), (shard(d, p),), "softmax", 4.0 * rows) for p in q.parts if q.fits(shape[d], p)]


def _norm(q: Query) -> list[Strategy]:
    """Layer and RMS norm: leading dimensions."""
    op = q.op
    rank = len(shape_of(op.operands[0]))
    lead: Dims = [f"d{i}" if i < rank - op["ndims"] else None for i in range(rank)]
    results = [[f if f is not None and i < len(shape_of(r)) else f"one{i}" for i, f in enumerate(lead)][:len(shape_of(r))] for r in op.results]
    return _factors(q, [lead, *([None] * len(shape_of(v)) for v in op.operands[1:])], results)


def _batch_only(q: Query) -> list[Strategy]:
    """Group norm and pools: the batch (and for pools the channels)."""
    op = q.op
    pool = op.name.endswith("_pool")

    def dims(v: Value, i: int) -> Dims:
        rank = len(shape_of(v))
        return [None] * rank if i and op.name == "graph.group_norm" else ["b", "c" if pool else None, *[None] * (rank - 2)]
    results = [[f or f"one{i}" for i, f in enumerate(dims(r, 0))] for r in op.results]
    return [s for s in _factors(q, [dims(v, i) for i, v in enumerate(op.operands)], results) if s.operands[0] != REPLICATE]


# -- indexing ----------------------------------------------------------------------------------------------------------


def _embedding(q: Query) -> list[Strategy]:
    """Indices and features; and rows of the table: each rank looks up what it has, the rest is 0."""
    op = q.op
    weight, index = shape_of(op.operands[0]), shape_of(op.operands[1])
    features, at = _named(len(weight) - 1, "f"), _named(len(index), "i")
    found = _factors(q, [[None, *features], at], [[*at, *features]]) + _linear(q, (0,))
    return found + ([Strategy((shard(0), REPLICATE), (partial(),), "embedding")] if q.fits(weight[0], 1) else [])


def _gather(q: Query) -> list[Strategy]:
    op = q.op
    x, index = shape_of(op.operands[0]), shape_of(op.operands[1])
    d = op["dim"]
    dims: Dims = [None if i == d else f"d{i}" if a == b else None for i, (a, b) in enumerate(zip(x, index, strict=True))]
    found = _factors(q, [dims, _named(len(index))], [_named(len(index))])
    found = [s for s in found if s.operands[0] != REPLICATE or s.operands[1].dim == d]
    if q.fits(x[d], 1) and _is_float(op.result):
        found.append(Strategy((shard(d), REPLICATE), (partial(),), "gather"))
    return found + _linear(q, (0,))


def _take(q: Query) -> list[Strategy]:
    rank, d = len(shape_of(q.op.result)), q.op["dim"]
    x: Dims = [None if i == d else f"d{i}" for i in range(rank)]
    return _factors(q, [x, [f"d{d}"]], [_named(rank)]) + _linear(q, (0,))


def _index(q: Query) -> list[Strategy]:
    """x with adjacent dimensions indexed: the others of x, and those of the indices."""
    op = q.op
    dims, rank = op["dims"], len(shape_of(op.operands[0]))
    if list(dims) != list(range(dims[0], dims[0] + len(dims))):
        return []
    at = max(len(shape_of(v)) for v in op.operands[1:])
    result = [*(f"x{i}" for i in range(dims[0])), *_named(at, "i"), *(f"x{i}" for i in range(dims[-1] + 1, rank))]
    if len(result) != len(shape_of(op.result)):
        return []
    wide = shape_of(op.result)[dims[0]:dims[0] + at]
    indices = [[f"i{j + at - len(shape_of(v))}" if size == wide[j + at - len(shape_of(v))] else None for j, size in enumerate(shape_of(v))]
               for v in op.operands[1:]]
    return _factors(q, [[None if i in dims else f"x{i}" for i in range(rank)], *indices], [result]) + _linear(q, (0,))


def _index_put(q: Query) -> list[Strategy]:
    """Accumulating into zeros: cut indices give partial sums; rows of the target take what falls into them."""
    op = q.op
    x, values, index = (shape_of(v) for v in op.operands[:3])
    if len(op.operands) != 3 or tuple(op["dims"]) != (0,) or not op["accumulate"] or len(values) != len(index) + len(x) - 1:
        return []
    features, at = _named(len(x) - 1, "f"), _named(len(index), "i")
    found = _factors(q, [[None, *features], [*at, *features], at], [["v", *features]])
    zero = partial()  # zeros are partial as they are
    for i, size in enumerate(index):
        for p in q.parts:
            if q.fits(size, p) and _is_float(op.result):
                found.append(Strategy((zero, shard(i, p), shard(i, p)), (partial(),)))
    if q.fits(x[0], 1):
        found.append(Strategy((shard(0), REPLICATE, REPLICATE), (shard(0),), "index_put"))
    return [s for s in found if any(p.kind != "replicate" for p in s.operands)] + _linear(q, (0, 1))


def _scatter(q: Query) -> list[Strategy]:
    op = q.op
    x, index = (shape_of(v) for v in op.operands[:2])
    d = op["dim"]
    dims: Dims = [None if i == d or a != b else f"d{i}" for i, (a, b) in enumerate(zip(x, index, strict=True))]
    found = _factors(q, [dims, dims, dims], [[f or f"one{i}" for i, f in enumerate(dims)]])
    found = [s for s in found if s.operands[0] != REPLICATE]
    if op["reduce"] == "set" and index[d] == 1 and q.fits(x[d], 1) and all(a == b for i, (a, b) in enumerate(zip(x, index)) if i != d):
        found.append(Strategy((shard(d), REPLICATE, REPLICATE), (shard(d),), "scatter_one"))
    return found + (_linear(q, (0, 2)) if op["reduce"] == "add" else [])


# -- externs and collectives -------------------------------------------------------------------------------------------


def _extern(q: Query) -> list[Strategy]:
    """Operators that ATen runs row by row (those of `_ALONG`, whose dimension is the argument at that position), and attention and its
    gradients, which are independent for every sequence and head.
    """
    op = q.op
    if op["target"] in _ATTENTION:
        return [s for d in (0, 1) for p in q.parts if (s := _per_head(q, d, p)) is not None]
    position = _ALONG.get(op["target"])
    if position is None or len(op.operands) != 1:
        return []
    rank = len(shape_of(op.operands[0]))
    d = (op["args"][position] if len(op["args"]) > position else -1) % max(rank, 1)
    return _factors(q, [[None if i == d else f"d{i}" for i in range(rank)]],
                    [[f"one{i}" if i == d else f"d{i}" for i in range(rank)] for _ in op.results])


_ATTENTION = {f"aten._scaled_dot_product_{kind}.default" for name in ("flash_attention", "efficient_attention", "cudnn_attention",
                                                                      "flash_attention_for_cpu") for kind in (name, f"{name}_backward")}
_ALONG = {"aten.topk.default": 2, "aten.sort.default": 1, "aten.sort.stable": 2}


def _per_head(q: Query, d: int, parts: int) -> Strategy | None:
    """Attention cut along dimension `d` of all tensors that have it (0, sequences; 1, heads); states of random numbers stay as they are."""
    def at(v: Value) -> Placement | None:
        shape = shape_of(v)
        if len(shape) < 3 or shape[d] == 1:
            return REPLICATE
        return shard(d, parts) if q.fits(shape[d], parts) else None
    operands, results = [at(v) for v in q.op.operands], [at(r) for r in q.op.results]
    if None in operands or None in results or all(p == REPLICATE for p in operands):
        return None
    return Strategy(tuple(operands), tuple(results))  # type: ignore[arg-type]


def _collective(q: Query) -> list[Strategy]:
    """Collectives of another axis: dimensions that they do not touch, and sums of sums."""
    op = q.op
    touched = {op.attributes[k] for k in ("dim", "split", "concat") if k in op.attributes}
    rank = len(shape_of(op.result))
    dims: Dims = [None if i in touched else f"d{i}" for i in range(rank)]
    kind = op.attributes.get("kind", "sum")
    return _factors(q, [dims], [[f or f"one{i}" for i, f in enumerate(dims)]]) + _linear(q, (0,), op=kind)


RULES: dict[str, Rule] = {
    **{f"graph.{name}": _elementwise for name in (*BY_NAME, "select", "cast", "relu", "silu", "gelu")},
    "graph.reshape": _reshape, "graph.permute": _permute, "graph.expand": _expand, "graph.slice": _slice, "graph.flip": _flip,
    "graph.remap": _remap, "graph.cat": _cat, "graph.pad": _pad,
    "graph.matmul": _matmul, "graph.attention": _attention, "graph.attention_backward": _attention_backward,
    **{f"graph.{name}": _conv for name in ("conv", "conv_transpose", "conv_weight_grad")},
    **{f"graph.{name}": _reduction for name in ("sum", "prod", "amax", "amin", "any", "all", "mean", "argmax", "argmin")},
    "graph.var_mean": _var_mean, "graph.scan": _along, "graph.softmax": _softmax, "graph.log_softmax": _softmax,
    "graph.layer_norm": _norm, "graph.rms_norm": _norm,
    "graph.group_norm": _batch_only, "graph.max_pool": _batch_only, "graph.avg_pool": _batch_only,
    "graph.embedding": _embedding, "graph.gather": _gather, "graph.take": _take, "graph.index": _index,
    "graph.index_put": _index_put, "graph.scatter": _scatter, "graph.extern": _extern,
    **{f"dist.{name}": _collective for name in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "shift", "shard")},
}
"""Op name -> its rule. Ops without a row (constants, iota, random externs, ...) run replicated."""
