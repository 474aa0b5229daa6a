"""Memory layouts: which dimension of each intermediate tensor is contiguous.

Index maps are logical, so a layout is only the strides of a tensor's type. Rules, in program order:
  1. a contraction with a parameter (a convolution, say) puts the parameter's own dimensions innermost: output channels become contiguous, so
     that a vector of them is computed at once from packed weights and stored at once;
     where the parameter has none (a depthwise convolution) the result keeps the order of the other operand, but on CPUs channels are innermost
     (`passes/pack.py` turns an image that lies otherwise);
     a convolution whose taps are no parameter (a gradient's) does the same: the operand that is read with windows is the other one;
  2. an op that reads a value in such a layout, and walks all its dimensions, gives its result the same order;
  3. on GPUs, what a scatter adds to a constant takes the order of what it adds (the gradient of max pooling, channels last), where the contiguous
     dimension is one of the scatter's points;
  4. a value that the function returns gets the strides that eager would have given it, unless it is only saved for the backward pass: then it
     keeps its own if one was chosen for it, and the compiler of the backward pass is told (`compiler/dynamo.py`).
Before: every tensor is row-major except function arguments. After: some types carry strides. No op is added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ir import Dim, Operation, Target, TensorType, Trait, Value, sym
from ..ir.dialects.tensor import parallel_dims
from ..ir.expr import evaluate, free_symbols
from ..ir.passes import Pass, PassContext, register
from ..ir.ranges import simplify, split_linear
from .structured import constant_values, in_order, is_contraction, space_bounds, windowed_operand
from .tiling.cpu_tiles import is_depthwise
from .tiling.ordered import own_dims

__all__ = ["Layout", "channel_of", "set_type", "walk_order"]


@register
@dataclass(frozen=True)
class Layout(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "layout"

    def run(self, module: Operation, ctx: PassContext) -> None:
        changed = 0
        for func in [f for f in module.body if f.name == "func"]:
            constant = constant_values(func)
            for op in func.body:
                if op.name == "tensor.scatter" and ctx.target.is_gpu:
                    changed += _order_scatter(op)
                if op.name != "tensor.generic" or len(parallel_dims(op)) < 3:
                    continue
                order = _contraction_order(op, constant, ctx.target) if is_contraction(op) else _inherited_order(op)
                if order is not None:
                    for r in op.results:
                        assert isinstance(r.type, TensorType)
                        set_type(r, in_order(r.type, order))
                    changed += 1
            _match_outputs(func, free=not ctx.target.is_gpu)
        ctx.remark("done", f"{changed} tensors in another order than row-major")


def set_type(v: Value, t: TensorType) -> None:
    """Changes a value's layout, also where a body receives the tensor whole."""
    v.type = t
    for user, i in v.uses:
        if user.has_trait(Trait.Structured):
            lead = 1 if user.name == "tensor.scatter" else 0
            if i >= lead and user["maps"][i - lead] is None:
                user.body.args[i - lead].type = t


def _contraction_order(op: Operation, constant: set[Value], target: Target) -> list[int] | None:
    """Row-major, but the dimensions that only a parameter has come last (none: the other operand's order, or a window's channels last); None if
    that changes nothing."""
    rank = len(parallel_dims(op))
    reads = [{int(s[1:]) for e in m for s in free_symbols(e) if s[0] == "d" and s[1:].isdigit()} for m in op["maps"]]
    window = windowed_operand(op) if not constant.intersection(op.operands) else None
    for i, v in enumerate(op.operands):
        own = [d for d in range(rank) if d in reads[i] and d not in reads[1 - i]]
        if (v in constant and op.operands[1 - i] not in constant) or window == 1 - i:
            other = op.operands[1 - i].type
            assert isinstance(other, TensorType)
            channel = channel_of(op, i, target) if v in constant else None
            if not own and channel is not None:
                own = [channel]
            order = [d for d in range(rank) if d not in own] + own if own else walk_order(op, other, op["maps"][1 - i])
            return None if order == list(range(rank)) else order
    return None


def channel_of(op: Operation, taps: int, target: Target) -> int | None:
    """The dimension of a depthwise convolution's channels, if a CPU computes it best with those innermost: at least a vector of them, each with an
    image of its own that operand `taps` gives a window for."""
    if target.is_gpu or not is_depthwise(op):
        return None
    rank, image = len(parallel_dims(op)), op["maps"][1 - taps]
    of_taps = {int(s[1:]) for e in op["maps"][taps] for s in free_symbols(e) if s[0] == "d" and s[1:].isdigit() and int(s[1:]) < rank}
    if len(of_taps) != 1:
        return None
    (d,) = of_taps
    size = op["dims"][d]
    return d if image.count(sym(f"d{d}")) == 1 and isinstance(size, int) and size >= target.lanes(32) else None


def _order_scatter(op: Operation) -> bool:
    """Gives the result, and the fill that it starts from, the contiguous dimension of what is read."""
    fill, t = op.operands[0].defining_op, op.result.type
    assert isinstance(t, TensorType)
    if fill is None or fill.name != "tensor.generic" or fill.operands or len(fill.results) != 1 or len(fill.result.uses) != 1:
        return False
    read = [(v.type.numel, v.type, m) for v, m in zip(op.operands[1:], op["maps"], strict=True)
            if m is not None and isinstance(v.type, TensorType) and isinstance(v.type.numel, int)]
    if not read or t.strides is not None:
        return False
    _, largest, m = max(read, key=lambda r: r[0])
    bounds = space_bounds(op["dims"])
    offset = simplify(sum((e * stride for e, stride in zip(m, largest.layout, strict=True)), 0), bounds)
    for j, d in own_dims(op).items():
        linear = split_linear(offset, f"d{d}")
        if linear is not None and linear[0] == 1 and op["dims"][d] != 1 and j != t.rank - 1:
            order = [*(i for i in range(t.rank) if i != j), j]
            set_type(fill.result, in_order(t, order))
            set_type(op.result, in_order(t, order))
            return True
    return False


def _inherited_order(op: Operation) -> list[int] | None:
    """The order in which the largest operand with a layout of its own is walked."""
    best: tuple[int, list[int]] | None = None
    for v, m in zip(op.operands, op["maps"], strict=True):
        t = v.type
        if m is None or not isinstance(t, TensorType):
            continue
        order = walk_order(op, t, m, folded=True)
        if order is not None and (best is None or t.rank > best[0]):
            best = (t.rank, order)
            if t.strides is None:
                return None  # a row-major operand of the same space: stay row-major
    return best[1] if best is not None and best[1] != list(range(len(best[1]))) else None


def walk_order(op: Operation, t: TensorType, m: tuple[Dim, ...], folded: bool = False) -> list[int] | None:
    """Parallel dimensions from the one with the largest stride in `t` to the smallest; None unless every one has a known stride. `folded`: of a
    dimension that is divided (read at d1 // 2, say) the stride on average counts."""
    offset: Dim = 0
    for e, stride in zip(m, t.layout, strict=True):
        offset = offset + e * stride
    offset = simplify(offset, space_bounds(op["dims"]))
    strides: dict[int, int] = {}
    for d, size in enumerate(parallel_dims(op)):
        if size == 1:
            strides[d] = 0
            continue
        split = split_linear(offset, f"d{d}")
        if split is None and folded and isinstance(size, int):
            ends = [evaluate(offset, {**dict.fromkeys(free_symbols(offset), 0), f"d{d}": at}) for at in (0, size - 1)]
            split = (max(1, int(ends[1] - ends[0]) // (size - 1)), 0)
        if split is None or split[0] == 0:
            return None
        value = split[0] if isinstance(split[0], int) else _estimate(split[0])
        strides[d] = value
    wide = sorted((d for d in strides if strides[d]), key=lambda d: (-strides[d], d))
    return [d for d in strides if not strides[d]] + wide


def _estimate(e: Dim) -> int:
    """A symbolic stride with every size taken as 64: only its order among others matters."""
    return int(evaluate(e, dict.fromkeys(free_symbols(e), 64)))


def _match_outputs(func: Operation, free: bool) -> None:
    """Returned values take eager's strides when these describe a dense tensor; `free`: but for those that are only saved and have a layout
    that was chosen for them, which keep it."""
    attrs = list(func["result_attrs"])
    if not attrs:
        return
    tensors = [i for i, a in enumerate(attrs) if a.get("kind", "tensor") in ("tensor", "int")]  # those with an operand
    operands = func.body.terminator.operands
    seen = {v for v, i in zip(operands, tensors, strict=True) if not attrs[i].get("saved")}
    for v, i in zip(operands, tensors, strict=True):
        op, wanted = v.defining_op, attrs[i].get("strides")
        if op is None or op.name not in ("tensor.generic", "tensor.scatter", "tensor.scan") or not isinstance(v.type, TensorType):
            continue
        chosen = v.type.strides is not None and _is_known(v.type) and op.name == "tensor.generic" and "view" not in attrs[i]
        if free and chosen and attrs[i].get("saved") and v not in seen:
            attrs[i] = {**attrs[i], "strides": v.type.layout}
            continue
        if wanted is None:
            continue
        order = _dense_order(v.type.shape, tuple(wanted))
        if order is not None:
            set_type(v, v.type.with_strides(tuple(wanted)))
    func.attributes["result_attrs"] = tuple(attrs)


def _is_known(t: TensorType) -> bool:
    return all(isinstance(n, int) for n in (*t.shape, *t.layout))


def _dense_order(shape: tuple[Dim, ...], strides: tuple[Dim, ...]) -> list[int] | None:
    """The order of dimensions for which `strides` are dense; None if there is none."""
    if len(shape) != len(strides):
        return None
    left = [d for d in range(len(shape)) if shape[d] != 1]
    order: list[int] = []
    step: Dim = 1
    while left:
        d = next((d for d in left if strides[d] == step), None)
        if d is None:
            return None
        order.insert(0, d)
        left.remove(d)
        step = step * shape[d]
    return order
