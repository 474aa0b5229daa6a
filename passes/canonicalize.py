"""Algebraic identities, at the graph level and inside bodies, and the normal form of generics.

Identities hold bit for bit in IEEE arithmetic: x + (-0.0), x - 0.0, x * 1, x / 1, but not x + 0.0 (it turns -0.0 into 0.0) nor x * 0.
With `relax_casts`, a value rounded to 16 bits and widened again keeps its precision (torch.compile's default; `emulate_precision_casts`
turns it off).
After: no op of the module matches a pattern of this file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..ir import DTYPES, Builder, Dim, DType, Operation, TensorType, Trait, Value, element_type, sym
from ..ir.dialects.tensor import fill_of, parallel_dims
from ..ir.expr import substitute
from ..ir.interpreter.context import TORCH_DTYPES
from ..ir.passes import Pass, PassContext, register
from ..ir.rewriter import Pattern, Rewriter, rewrite_greedily
from .masks import compare_bits, scale_mask
from .structured import identity_map, identity_of, is_identity_view, rebuild


@register
@dataclass(frozen=True)
class Canonicalize(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "canonicalize"
    relax_casts: bool = True

    def run(self, module: Operation, ctx: PassContext) -> None:
        patterns = {**_PATTERNS, "arith.cast": [*_PATTERNS["arith.cast"], *([_drop_rounding, _widen_select] if self.relax_casts else [])]}
        changed = rewrite_greedily(module, patterns)
        ctx.remark("done" if changed else "note", "identities applied" if changed else "nothing to do")


def constant_value(v: Value) -> Any:
    """The Python number of a scalar or splat constant; None if `v` is not one."""
    op = v.defining_op
    if op is None or op.name not in ("arith.constant", "graph.full"):
        return None
    return op["value"]


def _same(a: Any, b: Any) -> bool:
    return a is not None and a == b and math.copysign(1, a) == math.copysign(1, b)


def _is_one(v: Value) -> bool:
    return _same(constant_value(v), 1) and not isinstance(constant_value(v), bool)


def _neutral_of_add(v: Value) -> bool:
    return _same(constant_value(v), -0.0 if element_type(v.type).is_float else 0) and element_type(v.type).kind != "bool"


def _zero(v: Value) -> bool:
    return _same(constant_value(v), 0) and element_type(v.type).kind != "bool"


def _replace(op: Operation, rewriter: Rewriter, value: Value) -> None:
    if value.type == op.result.type:
        rewriter.replace(op, [value])


def _right_identity(neutral: Callable[[Value], bool], commutative: bool) -> Pattern:
    def pattern(op: Operation, rewriter: Rewriter) -> None:
        a, b = op.operands
        if neutral(b):
            _replace(op, rewriter, a)
        elif commutative and neutral(a):
            _replace(op, rewriter, b)
    return pattern


def _involution(op: Operation, rewriter: Rewriter) -> None:
    inner = op.operands[0].defining_op
    if inner is not None and inner.name == op.name:
        _replace(op, rewriter, inner.operands[0])


def _idempotent_pair(op: Operation, rewriter: Rewriter) -> None:
    if op.operands[0] is op.operands[1]:
        _replace(op, rewriter, op.operands[0])


def _select(op: Operation, rewriter: Rewriter) -> None:
    cond, a, b = op.operands
    known = constant_value(cond)
    if a is b or known is True:
        _replace(op, rewriter, a)
    elif known is False:
        _replace(op, rewriter, b)
    elif cond.type == op.result.type and constant_value(a) is True and constant_value(b) is False:
        _replace(op, rewriter, cond)


def _cast(op: Operation, rewriter: Rewriter) -> None:
    """A cast to the type it has; a cast of a lossless widening."""
    x = op.operands[0]
    if x.type == op.result.type:
        rewriter.replace(op, [x])
        return
    inner = x.defining_op
    if inner is not None and inner.name == op.name and _lossless(element_type(inner.operands[0].type), element_type(x.type)):
        source = inner.operands[0]
        if source.type == op.result.type:
            rewriter.replace(op, [source])
        else:
            op.set_operand(0, source)
            rewriter.modified(op)


def _drop_rounding(op: Operation, rewriter: Rewriter) -> None:
    """f32 -> bf16 -> f32 inside one body is the identity when intermediate rounding is not asked for; so is widening a number."""
    inner = op.operands[0].defining_op
    if inner is None:
        return
    if inner.name == "arith.constant" and element_type(op.result.type).name == "f32" and element_type(inner.result.type).name in ("bf16", "f16"):
        value = _in_memory(inner["value"], element_type(inner.result.type))
        rewriter.replace(op, [rewriter.builder(op).constant(value, element_type(op.result.type))])
        return
    if inner.name != "arith.cast":
        return
    source, middle, result = inner.operands[0], element_type(inner.result.type), element_type(op.result.type)
    if element_type(source.type) == result and result.name == "f32" and middle.name in ("bf16", "f16") and not _compared(op.result):
        rewriter.replace(op, [source])


def _compared(v: Value) -> bool:
    """Whether it is asked what equals this: the gradient of a maximum looks for that, rounded when it was stored, among numbers computed again."""
    return any(user.name in ("arith.eq", "arith.ne") and all(o.defining_op is None or o.defining_op.name != "arith.constant" for o in user.operands)
               for user in v.users)


def _in_memory(x: float, dtype: DType) -> float:
    """The number that a constant `x` of a float type stands for: rounded, infinite where it is too large."""
    return float(torch.tensor(x, dtype=TORCH_DTYPES[dtype.name]))


def _widen_select(op: Operation, rewriter: Rewriter) -> None:
    """f32(select(c, constant, bf16(x))) -> select(c, constant, x): a mask between two roundings does not keep them apart."""
    choice = op.operands[0].defining_op
    if op.opdef.dialect != "arith" or choice is None or choice.name != "arith.select" or element_type(op.result.type).name != "f32" or (
            element_type(choice.result.type).name not in ("bf16", "f16")):
        return
    sides = [v.defining_op for v in choice.operands[1:]]
    rounded = [s is not None and s.name == "arith.cast" and element_type(s.operands[0].type).name == "f32" for s in sides]
    if not any(rounded) or not all(r or (s is not None and s.name == "arith.constant") for s, r in zip(sides, rounded, strict=True)):
        return
    b, narrow = rewriter.builder(op), element_type(choice.result.type)
    wide = [s.operands[0] if r else b.constant(_in_memory(s["value"], narrow), element_type(op.result.type))  # type: ignore[union-attr,index]
            for s, r in zip(sides, rounded, strict=True)]
    rewriter.replace(op, [b.arith("select", choice.operands[0], *wide)])


def _divide_by_power_of_two(op: Operation, rewriter: Rewriter) -> None:
    """x / 2^n -> x * 2^-n, which rounds the same number."""
    value = constant_value(op.operands[1])
    if isinstance(value, float) and value and math.isfinite(value) and abs(math.frexp(value)[0]) == 0.5 and 2.0**-14 <= abs(value) <= 2.0**14:
        b = rewriter.builder(op)
        divisor = op.operands[1].defining_op
        assert divisor is not None
        inverse = b.op(divisor.name, type=divisor.result.type, value=1.0 / value)
        rewriter.replace(op, [b.op(op.name.replace(".div", ".mul"), op.operands[0], inverse, type=op.result.type)])


def _lossless(narrow: DType, wide: DType) -> bool:
    if narrow.is_float and wide.is_float:
        return wide.bits > narrow.bits and (narrow.name, wide.name) != ("bf16", "f16")
    if narrow.kind == "bool":
        return wide.kind != "bool"
    return narrow.kind == wide.kind and wide.bits > narrow.bits


def _splat(v: Value) -> Any:
    """`constant_value`, through expansion."""
    while v.defining_op is not None and v.defining_op.name in ("graph.expand", "graph.reshape"):
        v = v.defining_op.operands[0]
    return constant_value(v)


def _scatter_of_numbers(op: Operation, rewriter: Rewriter) -> None:
    """One number per row written into a tensor that holds one number (the gradient of a loss over classes): a comparison of positions, which
    fuses with its readers. An index out of range makes the call fail, as in the scatter."""
    x, index, src = op.operands
    t, d = x.type, op["dim"]
    assert isinstance(t, TensorType) and isinstance(index.type, TensorType)
    single = index.type.shape == tuple(1 if i == d else s for i, s in enumerate(t.shape))
    if op["reduce"] != "set" or not single or not t.dtype.is_float or _splat(x) is None or _splat(src) is None:
        return
    b, row, number = rewriter.builder(op), tuple(t.shape[d] if i == d else 1 for i in range(t.rank)), TensorType((), t.dtype)
    places = b.op("graph.iota", type=TensorType((t.shape[d],), index.type.dtype))
    places = b.op("graph.reshape", places, type=TensorType(row, index.type.dtype)) if t.rank > 1 else places
    here = b.op("graph.eq", places, _within(b, index, t.shape[d]), type=TensorType(t.shape, DTYPES["i1"]))
    values = [b.op("graph.full", type=number, value=_splat(v)) for v in (src, x)]
    rewriter.replace(op, [b.op("graph.select", here, *values, type=t)])


def _sum_with_scattered(op: Operation, rewriter: Rewriter) -> None:
    """x + (values added up in a tensor of zeros) adds the values to x: the gradient of an embedding that is the output layer's weight as well."""
    for x, made in (op.operands, reversed(op.operands)):
        put = made.defining_op
        if put is None or put.name != "graph.index_put" or not put["accumulate"] or len(made.uses) != 1 or x is made:
            continue
        if x.type == made.type == op.result.type and _splat(put.operands[0]) == 0:
            sums = rewriter.builder(op).op(put.name, x, *put.operands[1:], type=op.result.type, dims=put["dims"], accumulate=True)
            rewriter.replace(op, [sums])
            return


def _within(b: Builder, index: Value, size: Dim) -> Value:
    """`index`, checked to be from 0 to `size` - 1."""
    t = index.type
    assert isinstance(t, TensorType)
    flags, number = TensorType(t.shape, DTYPES["i1"]), TensorType((), t.dtype)
    least, end = b.op("graph.full", type=number, value=0), b.op("graph.sym", type=number, expr=size)
    inside = b.op("graph.and", b.op("graph.ge", index, least, type=flags), b.op("graph.lt", index, end, type=flags), type=flags)
    return b.op("graph.require", inside, index, type=t, message="scatter: an index is out of range")


def _identity_view(op: Operation, rewriter: Rewriter) -> None:
    if op.operands[0].type == op.result.type and _moves_nothing(op):
        rewriter.replace(op, [op.operands[0]])


def _moves_nothing(op: Operation) -> bool:
    match op.name:
        case "graph.reshape" | "graph.expand":
            return True
        case "graph.permute":
            return op["perm"] == tuple(range(len(op["perm"])))
        case "graph.slice":
            return all(s == 0 for s in op["starts"]) and all(s == 1 for s in op["steps"])
        case "graph.flip":
            return not op["dims"]
    return False


def _view_of_view(op: Operation, rewriter: Rewriter) -> None:
    inner = op.operands[0].defining_op
    if inner is None or inner.name != op.name:
        return
    if op.name == "graph.permute":
        op.attributes["perm"] = tuple(inner["perm"][p] for p in op["perm"])
    op.set_operand(0, inner.operands[0])
    rewriter.modified(op)


def _empty_result(op: Operation, rewriter: Rewriter) -> None:
    """A graph op whose results have no elements: nothing to compute, and no size 0 to divide by further down."""
    types = [r.type for r in op.results]
    if op.opdef.dialect != "graph" or not op.has_trait(Trait.Pure) or op.has_trait(Trait.ConstantLike) or not types or not all(
            isinstance(t, TensorType) and t.numel == 0 and t.dtype.kind != "complex" for t in types):
        return
    b = rewriter.builder(op)
    convert: dict[str, Any] = {"float": float, "bool": bool}
    rewriter.replace(op, [b.op("graph.full", type=t, value=convert.get(element_type(t).kind, int)(0)) for t in types])


def _empty_space(op: Operation, rewriter: Rewriter) -> None:
    """A structured op over no points gives what it starts from: neutral elements, or a scatter's initial tensor."""
    if 0 not in op["dims"] or not op.operands or any(element_type(r.type).kind == "complex" for r in op.results):
        return
    b = rewriter.builder(op)
    dims = op.results[0].type.shape if op.name != "tensor.generic" else parallel_dims(op)  # type: ignore[attr-defined]
    if op.name == "tensor.scatter":
        made = b.generic([op.operands[0]], [identity_map(len(dims))], dims, lambda _, x: x)
    else:
        kinds = op["combine"] if op.name == "tensor.generic" and op["reductions"] else ("sum",) * len(op.results)
        dtypes = [element_type(r.type) for r in op.results]
        made = b.generic([], [], dims, lambda i: [i.constant(identity_of(kind.removeprefix("arg"), dtype), dtype)
                                                  for kind, dtype in zip(kinds, dtypes, strict=True)])
    rewriter.touch(made)
    for old, new in zip(op.results, made.results, strict=True):
        new.name = old.name
    rewriter.replace(op, made.results)


def _unit_reduction(op: Operation, rewriter: Rewriter) -> None:
    """Reducing dimensions of size 1 alone is pointwise: fusion relies on a reduction having something to loop over."""
    n = len(parallel_dims(op))
    dims = op["dims"]
    if not op["reductions"] or any(size != 1 for size in dims[n:]):
        return
    b = rewriter.builder(op)
    at: dict[str, Dim] = {f"d{d}": 0 for d in range(n, len(dims))}
    maps = [None if m is None else tuple(substitute(e, at) for e in m) for m in op["maps"]]
    index_map: dict[int, Dim] = {d: sym(f"d{d}") if d < n else 0 for d in range(len(dims))}
    fills = [fill_of(op, i) for i in range(len(op.operands))]
    made = rebuild(op, b, op.operands, maps, fills, dims[:n], index_map, reductions=0)
    made.attributes.pop("combine")
    end = made.body.terminator
    for k, kind in enumerate(op["combine"]):
        if kind in ("argmax", "argmin"):
            end.set_operand(k, Builder.before_op(end).constant(0, element_type(op.results[k].type)))
    rewriter.touch(made)
    rewriter.replace(op, made.results)


def _generic(op: Operation, rewriter: Rewriter) -> None:
    """Drops unused arguments, merges equal reads, removes views that move nothing, and erases dead body ops."""
    for inner in op.body.reversed():
        if inner.name != "tensor.yield" and not any(r.uses for r in inner.results):
            rewriter.erase(inner)
    if is_identity_view(op) and op["maps"][0] == identity_map(len(op["dims"])) and not op["fills"] and op.operands[0].type == op.result.type:
        rewriter.replace(op, [op.operands[0]])
        return
    seen: dict[Any, int] = {}
    keep: list[int] = []
    fills = op["fills"] or (None,) * len(op.operands)
    for i, (v, m, arg) in enumerate(zip(op.operands, op["maps"], op.body.args, strict=True)):
        key = (id(v), m, repr(fills[i]))
        if key in seen:
            arg.replace_all_uses_with(op.body.args[seen[key]])
        elif arg.uses:
            seen[key] = i
            keep.append(i)
    if len(keep) == len(op.operands):
        return
    _keep_operands(op, keep, rewriter)


def _keep_operands(op: Operation, keep: list[int], rewriter: Rewriter) -> None:
    fills = op["fills"]
    operands = [op.operands[i] for i in keep]
    for v in op.operands:
        if v.defining_op is not None:
            rewriter.touch(v.defining_op)
    op.set_operands(operands)
    op.attributes["maps"] = tuple(op["maps"][i] for i in keep)
    if fills:
        kept = tuple(fills[i] for i in keep)
        if any(f is not None for f in kept):
            op.attributes["fills"] = kept
        else:
            del op.attributes["fills"]
    for i in reversed(range(len(op.body.args))):
        if i not in keep:
            op.body.erase_arg(i)
    rewriter.modified(op)


def _compare_bits(op: Operation, rewriter: Rewriter) -> None:
    compare_bits(op, rewriter, constant_value)


def _scale_mask(op: Operation, rewriter: Rewriter) -> None:
    scale_mask(op, rewriter, constant_value)


def _both(name: str, *patterns: Pattern) -> dict[str, list[Pattern]]:
    return {f"arith.{name}": list(patterns), f"graph.{name}": list(patterns)}


_PATTERNS: dict[str, list[Pattern]] = {
    "arith.add": [_right_identity(_neutral_of_add, True)], "graph.add": [_right_identity(_neutral_of_add, True), _sum_with_scattered],
    **_both("sub", _right_identity(_zero, False)),
    **_both("mul", _right_identity(_is_one, True)), **_both("div", _right_identity(_is_one, False), _divide_by_power_of_two),
    "arith.mul": [_right_identity(_is_one, True), _scale_mask], "arith.ge": [_compare_bits], "arith.lt": [_compare_bits],
    **_both("floordiv", _right_identity(lambda v: _is_one(v) and not element_type(v.type).is_float, False)),
    **_both("neg", _involution), **_both("bitnot", _involution),
    **_both("max", _idempotent_pair), **_both("min", _idempotent_pair), **_both("and", _idempotent_pair), **_both("or", _idempotent_pair),
    **_both("select", _select), **_both("cast", _cast),
    **{f"graph.{n}": [_identity_view] for n in ("expand", "slice", "flip")},
    "graph.scatter": [_scatter_of_numbers],
    "graph.reshape": [_view_of_view, _identity_view], "graph.permute": [_view_of_view, _identity_view],
    "tensor.generic": [_empty_space, _unit_reduction, _generic], "tensor.scan": [_empty_space], "tensor.scatter": [_empty_space],
    "*": [_empty_result],
}

__all__ = ["Canonicalize", "constant_value"]
