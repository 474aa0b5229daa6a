"""What a loop slices and stacks is what is there: nothing reversed, repeated or unread.

Before: operands that a `loop` slices may be flipped along dimension 0 or the same in every slice, all readers of a stacked result may flip
it, or there are none (the loop of a backward pass is so). After: a loop walks such operands and results backwards
(`reversed_operands`, `reversed_results`), what does not change is invariant, unread results are not stacked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ir import Builder, Operation, TensorType, Value, sym
from ..ir.expr import free_symbols, substitute
from ..ir.passes import Pass, PassContext, register
from .structured import identity_map, is_identity_view

__all__ = ["SimplifyLoops"]


@register
@dataclass(frozen=True)
class SimplifyLoops(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "simplify-loops"

    def run(self, module: Operation, ctx: PassContext) -> None:
        count = 0
        functions = {f["sym_name"]: f for f in module.body if f.name == "func"}
        for func in functions.values():
            for op in [op for op in func.body if op.name == "loop"]:
                count += _operands(op) + _results(op) + _narrow(op, functions[op["body"].name])
        ctx.remark("done", f"{count} operands and results of loops simplified")


def _flipped(v: Value) -> Value | None:
    """What `v` is the reverse of along dimension 0."""
    op = v.defining_op
    if op is None or not is_identity_view(op) or op["fills"]:
        return None
    source = op.operands[0]
    t = source.type
    if not isinstance(t, TensorType) or t.shape != op["dims"] or not t.rank:
        return None
    return source if op["maps"][0] == (t.shape[0] - 1 - sym("d0"), *identity_map(t.rank)[1:]) else None


def _operands(loop: Operation) -> int:
    backwards = set(loop["reversed_operands"])
    count = 0
    for j in range(loop["sliced"]):
        i = loop["carried"] + j
        source = _flipped(loop.operands[i])
        if source is not None:
            view = loop.operands[i].defining_op
            loop.set_operand(i, source)
            backwards ^= {j}
            count += 1
            if view is not None and not view.result.uses:
                view.erase()
    _set(loop, "reversed_operands", backwards)
    return count


def _results(loop: Operation) -> int:
    backwards = set(loop["reversed_results"])
    count = 0
    for j, r in enumerate(loop.results[loop["carried"]:]):
        if not r.uses or not all(len(user.results) == 1 and _flipped(user.results[0]) is r for user in r.users):
            continue
        for user in list(r.users):
            user.results[0].replace_all_uses_with(r)
            user.erase()
        backwards ^= {j}
        count += 1
    _set(loop, "reversed_results", backwards)
    return count


def _is_repeated(v: Value) -> bool:
    """Whether `v` is a view that has the same in every slice along dimension 0."""
    op = v.defining_op
    return op is not None and is_identity_view(op) and not op["fills"] and not any("d0" in free_symbols(e) for e in op["maps"][0])


def _narrow(loop: Operation, body: Operation) -> int:
    """Replaces the loop by one that has neither repeated operands among the sliced nor unread results among the stacked."""
    n, m = loop["carried"], loop["sliced"]
    repeated = [j for j in range(m) if _is_repeated(loop.operands[n + j])]
    if len(repeated) == m:  # something must say how many trips there are
        repeated.pop()
    unread = [j for j, r in enumerate(loop.results[n:]) if not r.uses]
    if not repeated and not unread:
        return 0
    b = Builder.before_op(loop)
    sliced = [j for j in range(m) if j not in repeated]
    stacked = [j for j in range(len(loop.results) - n) if j not in unread]
    slices = [_slice(b, loop.operands[n + j]) for j in repeated]
    args = body.body.args
    for j in repeated:  # the arguments move to the invariant ones
        args[n + j].replace_all_uses_with(body.body.add_arg(args[n + j].type, args[n + j].name))
    for j in reversed(repeated):
        body.body.erase_arg(n + j)
    if body["arg_attrs"]:
        kept = [a for i, a in enumerate(body["arg_attrs"]) if i - n not in repeated]
        body.attributes["arg_attrs"] = (*kept, *({"kind": "param"},) * len(repeated))
    end = body.body.terminator
    end.set_operands([*end.operands[:n], *(end.operands[n + j] for j in stacked)])
    attrs = {**loop.attributes, "sliced": len(sliced)}
    operands = [*loop.operands[:n], *(loop.operands[n + j] for j in sliced), *loop.operands[n + m:], *slices]
    kept_results = [*loop.results[:n], *(loop.results[n + j] for j in stacked)]
    new = b.create("loop", operands, attrs, [r.type for r in kept_results])
    _set(new, "reversed_operands", {sliced.index(j) for j in loop["reversed_operands"] if j in sliced})
    _set(new, "reversed_results", {stacked.index(j) for j in loop["reversed_results"] if j in stacked})
    for old, made in zip(kept_results, new.results, strict=True):
        made.name = old.name
        old.replace_all_uses_with(made)
    loop.erase()
    return len(repeated) + len(unread)


def _slice(b: Builder, v: Value) -> Value:
    """Slice 0 of a view that has the same in every slice."""
    view = v.defining_op
    assert view is not None and isinstance(v.type, TensorType)
    m = tuple(substitute(e, {f"d{i}": sym(f"d{i - 1}") for i in range(1, v.type.rank)}) for e in view["maps"][0])
    return b.generic([view.operands[0]], [m], list(v.type.shape[1:]), lambda bb, x: x, name=v.name).result


def _set(loop: Operation, key: str, numbers: set[int]) -> None:
    loop.attributes.pop(key, None)
    if numbers:
        loop.attributes[key] = tuple(sorted(numbers))
