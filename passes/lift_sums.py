"""A sum that a loop carries is taken after the loop, over all trips at once.

Before: the body of a `loop` may carry c' = c + sum over k of f(a[k], b[k]), and use c for nothing else: the gradient of a weight, say, which
would be read and written in every trip. After: the loop stacks what f reads of each trip, and behind it stands c + sum over t and k of
f(a[t, k], b[t, k]): one large product. Sums whose operands take more memory per trip than the accumulator stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..ir import Builder, Dim, Operation, TensorType, Value, sym
from ..ir.dialects.tensor import fill_of, parallel_dims
from ..ir.expr import substitute
from ..ir.passes import Pass, PassContext, register
from ..ir.ranges import known_nonnegative
from .structured import body_ops, identity_map, is_pointwise, rebuild, uses_dims

__all__ = ["LiftSums"]


@register
@dataclass(frozen=True)
class LiftSums(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "lift-sums"

    def run(self, module: Operation, ctx: PassContext) -> None:
        functions = {op["sym_name"]: op for op in module.body if op.name == "func"}
        count = 0
        for func in functions.values():
            for op in [op for op in func.body if op.name == "loop"]:
                loop = op
                for k in reversed(range(op["carried"])):
                    lifted = _lift(loop, functions[loop["body"].name], k)
                    if lifted is not None:
                        loop, count = lifted, count + 1
        ctx.remark("done", f"{count} sums taken after their loops")


def _lift(loop: Operation, body: Operation, k: int) -> Operation | None:
    """The loop without its carried value k, which is summed behind it; None if it is no such sum."""
    term = _term(body, k)
    if term is None or not _pays(loop, body, term, body.body.args[k]):
        return None
    n, m = loop["carried"], loop["sliced"]
    returned = list(body.body.terminator.operands)
    stacked = returned[n:]
    first_invariant = body.body.args[n + m:]
    sources: list[tuple[str, int]] = []  # of each operand of the sum: "sliced", "invariant" or "stacked", and which
    for v in term.operands:
        args = body.body.args
        if v.defining_op is None and v in first_invariant:
            sources.append(("invariant", args.index(v)))  # type: ignore[arg-type]
        elif v.defining_op is None and n <= args.index(v) < n + m:  # type: ignore[arg-type]
            sources.append(("sliced", args.index(v) - n))  # type: ignore[arg-type]
        else:
            if v not in stacked:
                stacked.append(v)
            sources.append(("stacked", stacked.index(v)))
    adder = returned[k].defining_op
    assert adder is not None
    start, trips = loop.operands[k], loop.operands[n].type.shape[0]  # type: ignore[attr-defined]
    new = _without(loop, body, k, stacked, trips)
    b = Builder(new.parent, new.next, term.location)  # type: ignore[arg-type]
    total = _after(b, new, term, sources, trips)
    read = next(m for v, m in zip(adder.operands, adder["maps"], strict=True) if v is term.result)
    made = b.generic([start, total], [identity_map(len(adder["dims"])), read], adder["dims"], lambda bb, x, y: bb.arith("add", x, y))
    loop.results[k].replace_all_uses_with(made.result)
    loop.erase()
    adder.erase()
    term.erase()
    body.body.erase_arg(k)
    if body["arg_attrs"]:
        body.attributes["arg_attrs"] = tuple(a for i, a in enumerate(body["arg_attrs"]) if i != k)
    return new


def _term(body: Operation, k: int) -> Operation | None:
    """The reduction that is added to carried value k in every trip."""
    carried, after = body.body.args[k], body.body.terminator.operands[k]
    adder = after.defining_op
    if adder is None or len(carried.uses) != 1 or len(after.uses) != 1 or not is_pointwise(adder) or len(adder.operands) != 2:
        return None
    ops = body_ops(adder)
    if carried not in adder.operands or len(ops) != 1 or ops[0].name != "arith.add" or set(ops[0].operands) != set(adder.body.args):
        return None
    if adder["fills"] or any(v is carried and m != identity_map(len(adder["dims"])) for v, m in zip(adder.operands, adder["maps"], strict=True)):
        return None
    v = next((v for v in adder.operands if v is not carried), None)
    term = v.defining_op if v is not None else None
    if term is None or term.name != "tensor.generic" or not term["reductions"] or term["combine"] != ("sum",) or len(v.uses) != 1:  # type: ignore[union-attr]
        return None
    return None if uses_dims(term) or any(m is None for m in term["maps"]) else term


def _pays(loop: Operation, body: Operation, term: Operation, accumulator: Value) -> bool:
    known = {*body.body.args, *body.body.terminator.operands[loop["carried"]:]}
    extra: Dim = 0
    for v in dict.fromkeys(term.operands):
        if v not in known or v in body.body.args[:loop["carried"]]:
            extra = extra + v.type.numel  # type: ignore[attr-defined]
    return known_nonnegative(2 * accumulator.type.numel - extra)  # type: ignore[attr-defined]


def _without(loop: Operation, body: Operation, k: int, stacked: Sequence[Value], trips: Dim) -> Operation:
    """A loop in front of `loop` that does not carry value k, and stacks `stacked`; takes over the other results."""
    n = loop["carried"]
    end = body.body.terminator
    kept = [v for i, v in enumerate(end.operands[:n]) if i != k]
    end.set_operands([*kept, *stacked])
    types: list[Any] = [r.type for i, r in enumerate(loop.results[:n]) if i != k]
    types += [TensorType((trips, *v.type.shape), v.type.dtype) for v in stacked]  # type: ignore[attr-defined]
    new = Builder.before_op(loop).create("loop", [v for i, v in enumerate(loop.operands) if i != k],
                                         {**loop.attributes, "carried": n - 1}, types)
    for old, made in zip([r for i, r in enumerate(loop.results) if i != k], new.results, strict=False):
        made.name = old.name
        old.replace_all_uses_with(made)
    return new


def _after(b: Builder, loop: Operation, term: Operation, sources: Sequence[tuple[str, int]], trips: Dim) -> Value:
    """The reduction over trips too: its dimension comes first among the reduced ones."""
    n = loop["carried"]
    p, rank = len(parallel_dims(term)), len(term["dims"])
    moved: dict[str, Dim] = {f"d{j}": sym(f"d{j + 1}") for j in range(p, rank)}
    operands, maps, fills = [], [], []
    for i, (kind, j) in enumerate(sources):
        m = tuple(substitute(e, moved) for e in term["maps"][i])
        backwards = kind != "invariant" and j in loop["reversed_operands" if kind == "sliced" else "reversed_results"]
        t: Dim = trips - 1 - sym(f"d{p}") if backwards else sym(f"d{p}")
        operands.append(loop.operands[j - 1] if kind == "invariant" else loop.operands[n + j] if kind == "sliced" else loop.results[n + j])
        maps.append(m if kind == "invariant" else (t, *m))
        fills.append(fill_of(term, i))
    dims = [*term["dims"][:p], trips, *term["dims"][p:]]
    return rebuild(term, b, operands, maps, fills, dims, reductions=term["reductions"] + 1).result
