"""Reference semantics of the tensor level: structured ops by index arithmetic over their whole iteration space.

A value inside a body is a torch tensor with one dimension per dimension of the space, of size 1 where the value does not depend
on it: a product of a row and a column stays small until something needs it whole. A sum over a product of two such values is a
contraction and goes through einsum (matmul, convolution, attention in one rule), so that real models can be interpreted.
Spaces above `LIMIT` points are cut into boxes along the first parallel dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..core import IRError, Operation, Value
from ..expr import Dim, free_symbols
from . import arith, graph
from .context import WIDENED, Context, Handler, affine_index, flat_take, to_tensor
from .extern import extern

Tensor = torch.Tensor

__all__ = ["HANDLERS", "LIMIT", "combine", "scatter_into"]

LIMIT = 1 << 23
"""Points of an iteration space that are evaluated at once."""

_UNSIGNED_UFUNCS: dict[str, np.ufunc] = {
    "sum": np.add, "add": np.add, "prod": np.multiply, "mul": np.multiply, "max": np.maximum, "min": np.minimum,
}


@dataclass(frozen=True)
class _Space:
    """A box of an iteration space: per dimension, the range of positions in it."""

    ranges: tuple[range, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(len, self.ranges))

    def grid(self, k: int) -> Tensor:
        """The positions along dimension k, shaped to broadcast over the box."""
        r = self.ranges[k]
        return torch.arange(r.start, r.stop).reshape([-1 if j == k else 1 for j in range(len(self.ranges))])

    def grids(self) -> dict[str, Tensor]:
        return {f"d{k}": self.grid(k) for k in range(len(self.ranges))}


def _boxes(sizes: Sequence[int], inner: int) -> Iterator[tuple[range, ...]]:
    """Boxes that cover dimensions of `sizes` in row-major order, each of at most LIMIT points when `inner` lie under each."""
    total = math.prod(sizes) * inner
    if total <= LIMIT or not sizes:
        yield tuple(map(range, sizes))
        return
    below = max(1, total // sizes[0])
    step = max(1, LIMIT // below)
    for start in range(0, sizes[0], step):
        head = range(start, min(start + step, sizes[0]))
        for tail in _boxes(sizes[1:], inner * len(head)):
            yield (head, *tail)


# -- reading operands -------------------------------------------------------------------------------------------------

def _dim_number(e: Dim) -> int | None:
    """k when `e` is exactly dk."""
    text = "" if isinstance(e, int) else str(e)
    return int(text[1:]) if text[:1] == "d" and text[1:].isdigit() else None


def _read_view(x: Tensor, index: Sequence[Dim], space: _Space) -> Tensor | None:
    """The operand as a view, when its map consists of distinct plain dimensions and constants; None otherwise."""
    found: list[int] = []
    for j in reversed(range(x.dim())):
        e, k = index[j], _dim_number(index[j])
        if k is not None and k not in found and space.ranges[k].stop <= x.shape[j]:
            x = x.narrow(j, space.ranges[k].start, len(space.ranges[k]))
            found.insert(0, k)
        elif isinstance(e, int) and 0 <= e < x.shape[j]:
            x = x.select(j, e)
        else:
            return None
    x = x.permute(sorted(range(len(found)), key=found.__getitem__))
    return x.reshape([len(r) if k in found else 1 for k, r in enumerate(space.ranges)])


def _read(ctx: Context, op: Operation, i: int, x: Tensor, space: _Space) -> Tensor:
    """Operand i of a structured op (`i` counts the mapped operands) over the points of `space`."""
    index, fill = op["maps"][i], op["fills"][i] if op["fills"] else None
    if index is None:
        return x
    view = _read_view(x, index, space)
    if view is not None:
        return view
    flat, inside = affine_index(ctx, index, space.grids(), x.shape)
    flat, inside = (v.reshape((1,) * (len(space.ranges) - v.dim()) + v.shape) for v in (flat, inside))
    everywhere = bool(inside.all())
    if fill is None:
        if not everywhere:
            raise IRError(f"map {i} [{', '.join(map(str, index))}] reads outside of shape {list(x.shape)} "
                          f"within dims {list(space.shape)}, and has no fill")
        return flat_take(x.reshape(-1), flat)
    if x.numel() == 0:
        return torch.full(flat.shape, fill, dtype=x.dtype)
    got = flat_take(x.reshape(-1), flat)
    return got if everywhere else arith.select(inside, got, torch.tensor(fill, dtype=x.dtype))


# -- bodies -----------------------------------------------------------------------------------------------------------

def _extract(ctx: Context, op: Operation, xs: list[Any]) -> list[Any]:
    source, *indices = xs
    flat, inside = torch.tensor(0), torch.tensor(True)
    for j, (i, n) in enumerate(zip(indices, source.shape, strict=True)):
        i = i.to(torch.int64)
        here = (i >= 0) & (i < n)
        if not bool(here.all()):
            bad = i[~here].flatten()[0].item()
            error = IndexError if op["check"] else IRError
            raise error(f"index {bad} is out of bounds for dimension {j} with size {n}")
        flat = flat * n + i
        inside = inside & here
    return [flat_take(source.reshape(-1), flat)]


_IN_BODIES: dict[str, Handler] = {**arith.HANDLERS, "tensor.extract": _extract, "tensor.require": arith.require}


class _Body:
    """The body of a structured op, evaluated over one box. Values are computed on demand, each once."""

    def __init__(self, ctx: Context, op: Operation, operands: Sequence[Tensor], space: _Space):
        self.ctx, self.space = ctx, space
        self.values: dict[Value, Tensor] = {
            a: _read(ctx, op, i, x, space) for i, (a, x) in enumerate(zip(op.body.args, operands, strict=True)) if a.uses}

    def value(self, v: Value) -> Tensor:
        """The value of `v`, of full rank and broadcastable over the box."""
        if v not in self.values:
            # in block order rather than by recursion: bodies can be long chains
            assert v.defining_op is not None and v.defining_op.parent is not None
            needed = _slice_of(v)
            for op in v.defining_op.parent:
                if op in needed and op.result not in self.values:
                    self.values[op.result] = self._evaluate(op)
        return self.values[v]

    def _evaluate(self, op: Operation) -> Tensor:
        rank = len(self.space.ranges)
        if op.name == "tensor.index":
            return self.space.grid(op["dim"])
        if op.name == "tensor.sym":
            got = torch.tensor(self.ctx.dim(op["expr"]))
        else:
            handler = _IN_BODIES.get(op.name)
            if handler is None:
                raise IRError(f"'{op.name}' cannot stand in the body of a structured op")
            (got,) = handler(self.ctx, op, [self.values[v] for v in op.operands])
        return got.reshape((1,) * (rank - got.dim()) + got.shape)

    def whole(self, v: Value) -> Tensor:
        """The value of `v` at every point of the box."""
        return self.value(v).expand(self.space.shape)


def _slice_of(v: Value) -> set[Operation]:
    """The ops of the block that `v` depends on."""
    found: set[Operation] = set()
    work = [v]
    while work:
        op = work.pop().defining_op
        if op is not None and op not in found:
            found.add(op)
            work.extend(op.operands)
    return found


# -- combining --------------------------------------------------------------------------------------------------------

def _identity(kind: str, dtype: torch.dtype) -> Tensor:
    if dtype == torch.bool:
        return torch.tensor(kind == "min")
    if dtype.is_floating_point:
        return torch.tensor(-math.inf if kind == "max" else math.inf, dtype=dtype)
    info = torch.iinfo(dtype)
    return torch.tensor(info.min if kind == "max" else info.max, dtype=dtype)


def _extreme(kind: str, function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x, -1) if x.shape[-1] else _identity(kind, x.dtype).expand(x.shape[:-1])


def _arg(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x.to(torch.uint8) if x.dtype == torch.bool else x, -1)


_COMBINE: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.sum(-1), "prod": lambda x: x.prod(-1), "max": _extreme("max", torch.amax),
    "min": _extreme("min", torch.amin), "any": lambda x: x.any(-1), "all": lambda x: x.all(-1), "argmax": _arg(torch.argmax),
    "argmin": _arg(torch.argmin),
}


def combine(kind: str, x: Tensor, parallel: int) -> Tensor:
    """`x` combined over all dimensions from `parallel` on; sums of narrow floats are accumulated in f32."""
    x = x.reshape(*x.shape[:parallel], math.prod(x.shape[parallel:]))
    dtype = x.dtype
    if dtype in arith.WIDE_UNSIGNED:
        array = x.numpy()
        if kind in ("argmax", "argmin"):
            return torch.from_numpy(np.asarray((np.argmax if kind == "argmax" else np.argmin)(array, -1)))
        if kind in _UNSIGNED_UFUNCS:
            return torch.from_numpy(np.asarray(_UNSIGNED_UFUNCS[kind].reduce(array, -1, dtype=array.dtype)))
    if dtype in WIDENED:
        x = x.to(torch.float32)
    got = _COMBINE[kind](x)
    return got if kind in ("argmax", "argmin") else got.to(dtype)


# -- tensor.generic ---------------------------------------------------------------------------------------------------

def _contraction(op: Operation) -> Operation | None:
    """The multiplication whose products a single-result generic sums; None if it is anything else."""
    if tuple(op["combine"]) != ("sum",):
        return None
    product = op.body.terminator.operands[0].defining_op
    if product is None or product.name != "arith.mul":
        return None
    dtype = product.result.type.dtype  # type: ignore[attr-defined]
    # products of narrow floats round before they are summed: not einsum's semantics; products of i1 are conjunctions
    return product if dtype.kind in ("int", "float", "index") and (not dtype.is_float or dtype.bits >= 32) else None


def _used_dims(op: Operation, v: Value) -> set[str]:
    """The dimensions of the space that the value `v` of the body depends on."""
    used: set[str] = set()
    args = [v] if v.defining_op is None else []
    for inner in _slice_of(v):
        args.extend(x for x in inner.operands if x.defining_op is None)
        if inner.name == "tensor.index":
            used.add(f"d{inner['dim']}")
    for a in args:
        index = op["maps"][a.index]  # type: ignore[attr-defined]
        if index is not None:
            used.update(s for e in index for s in free_symbols(e) if s[0] == "d")
    return used


def _contract(u: Tensor, v: Tensor, space: _Space, parallel: int) -> Tensor:
    """The sum over the dimensions from `parallel` on of u * v, over the points of `space`."""
    rank = len(space.ranges)
    letters = [[k for k in range(rank) if x.shape[k] != 1] for x in (u, v)]
    out = [k for k in range(parallel) if k in letters[0] or k in letters[1]]
    u, v = (x.reshape([x.shape[k] for k in ks]) for x, ks in zip((u, v), letters))
    got = torch.einsum(u, letters[0], v, letters[1], out)
    unused = math.prod(n for k, n in enumerate(space.shape) if k >= parallel and k not in letters[0] and k not in letters[1])
    shape = space.shape[:parallel]
    got = got.reshape([n if k in out else 1 for k, n in enumerate(shape)])
    return (got if unused == 1 else got * unused).expand(shape)


def _generic(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Tensor]:
    sizes = ctx.dims(op["dims"])
    parallel = len(sizes) - op["reductions"]
    product = _contraction(op)
    if product is not None:
        at = {f"d{k}": n for k, n in enumerate(sizes)}
        points = max(math.prod(at[d] for d in _used_dims(op, v)) for v in product.operands)
        inner = max(1, points // max(1, math.prod(sizes[:parallel])))
    else:
        inner = math.prod(sizes[parallel:])
    yielded, kinds = op.body.terminator.operands, tuple(op["combine"]) or ("none",) * len(op.results)
    outputs = [torch.empty(ctx.shape(r.type), dtype=ctx.dtype(r.type)) for r in op.results]
    for box in _boxes(sizes[:parallel], inner):
        space = _Space((*box, *map(range, sizes[parallel:])))
        body = _Body(ctx, op, xs, space)
        here = tuple(slice(r.start, r.stop) for r in box)
        if product is not None:
            a, b = (body.value(v) for v in product.operands)
            outputs[0][here] = _contract(a, b, space, parallel)
            continue
        for out, v, kind in zip(outputs, yielded, kinds, strict=True):
            out[here] = body.whole(v) if kind == "none" else combine(kind, body.whole(v), parallel)
    return outputs


# -- scan and scatter -------------------------------------------------------------------------------------------------

def _running(kind: str, x: Tensor) -> Tensor:
    if x.dtype in arith.WIDE_UNSIGNED:
        array = x.numpy()
        return torch.from_numpy(_UNSIGNED_UFUNCS[kind].accumulate(array, -1, dtype=array.dtype))
    return graph.SCANS[kind](x.to(torch.float32) if x.dtype in WIDENED else x, -1).to(x.dtype)


def _scan(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Tensor]:
    sizes = ctx.dims(op["dims"])
    out = torch.empty(sizes, dtype=ctx.dtype(op.result.type))
    for box in _boxes(sizes[:-1], sizes[-1]):
        body = _Body(ctx, op, xs, _Space((*box, range(sizes[-1]))))
        out[tuple(slice(r.start, r.stop) for r in box)] = _running(op["kind"], body.whole(op.body.terminator.operands[0]))
    return [out]


def _sort(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Tensor]:
    sizes = ctx.dims(op["dims"])
    body = _Body(ctx, op, xs, _Space(tuple(range(n) for n in sizes)))
    values, places = graph.first_of(body.whole(op.body.terminator.operands[0]), ctx.dim(op["keep"]), op["largest"], op["pick"])
    return [ctx.to_type(values, op.results[0].type), places]


def _segments(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Tensor]:
    columns, positions = ctx.dims(op["dims"])
    body = _Body(ctx, op, xs, _Space((range(columns), range(positions))))
    value, *counts = op.body.terminator.operands
    used = body.whole(counts[0])[0] if counts and columns else None
    made = graph.segments(op["combine"], body.whole(value).t(), used, xs[0], int(ctx.shape(op.result.type)[0]))
    return [ctx.to_type(made, op.result.type)]


_REDUCE = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def scatter_into(kind: str, target: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """`target` (1-d) with values[j] combined at index[j], for j in order."""
    dtype = target.dtype
    if not index.numel():
        return target
    if kind == "set":  # the last writer of each element
        last = torch.full(target.shape, -1).scatter_reduce_(0, index, torch.arange(index.numel()), "amax")
        return arith.select(last >= 0, flat_take(values, last.clamp(min=0)), target)
    if dtype in arith.WIDE_UNSIGNED:
        array = target.numpy()
        _UNSIGNED_UFUNCS[kind].at(array, index.numpy(), values.numpy())
        return torch.from_numpy(array)
    wide = torch.float32 if dtype in WIDENED else torch.int64 if dtype == torch.bool else dtype
    got = target.to(wide).scatter_reduce(0, index, values.to(wide), _REDUCE[kind], include_self=True)
    return got != 0 if dtype == torch.bool else got.to(dtype)


def _scatter(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Tensor]:
    """One combination per point, in row-major order: the last 'set' wins. Narrow floats accumulate in f32 within a box."""
    init, *inputs = xs
    sizes = ctx.dims(op["dims"])
    target = ctx.to_type(init, op.result.type).reshape(-1).clone()
    value, *where = op.body.terminator.operands
    for box in _boxes(sizes, 1):
        body = _Body(ctx, op, inputs, _Space(box))
        flat = torch.tensor(0)
        for j, (v, n) in enumerate(zip(where, init.shape, strict=True)):
            i = body.value(v).to(torch.int64)
            if not bool(((i >= 0) & (i < n)).all()):
                raise IndexError(f"the scatter index [{int(i.min())}, {int(i.max())}] leaves dimension {j} of size {n}")
            flat = flat * n + i
        target = scatter_into(op["combine"], target, flat.expand(body.space.shape).reshape(-1), body.whole(value).reshape(-1))
    return [target.reshape(init.shape)]


# -- the rest ---------------------------------------------------------------------------------------------------------

def _fused(ctx: Context, op: Operation, xs: list[Any]) -> list[Any]:
    made = ctx.run_block(op.body, dict(zip(op.body.args, xs, strict=True)))
    return [x if tuple(x.shape) == (shape := tuple(ctx.shape(r.type))) else x.reshape(shape) for x, r in zip(made, op.results, strict=True)]  # type: ignore[arg-type]


def _constant(ctx: Context, op: Operation, xs: list[Any]) -> list[Any]:
    return [ctx.to_type(to_tensor(op["value"]), op.result.type)]


def _sym(ctx: Context, op: Operation, xs: list[Any]) -> list[Any]:
    return [torch.tensor(ctx.dim(op["expr"]))]


HANDLERS: dict[str, Handler] = {
    "tensor.generic": _generic, "tensor.scan": _scan, "tensor.sort": _sort, "tensor.segments": _segments,
    "tensor.scatter": _scatter, "tensor.fused": _fused, "tensor.library": _fused,
    "tensor.sym": _sym, "tensor.alias": graph.HANDLERS["graph.remap"], "tensor.extract": _extract, "tensor.constant": _constant,
    "tensor.assign": graph.HANDLERS["graph.assign"], "tensor.extern": extern,
}
