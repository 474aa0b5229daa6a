"""CPU products of one input by several parameters become one product: query, key and value of attention.

    x @ a.T + p, x @ b.T, ...   ->   y = x @ [a; b; ..].T (+ [p; q; ..]),  and what read the first reads y's first columns, and so on

One launch reads the input once and shares out all columns among threads, where keys and values alone are few; the parameters are packed as one (the
joined parameter is a pointwise op that merges into the packing, so there is no further copy). A bias that is added at once is joined too.

A product takes part if all that reads its result (or its sum with the bias) reads elements by a map, which then gets an offset, and if those readers
are not its epilogue: elementwise ops of its own space, which in its own kernel save a pass over memory that is worth more. Results that are
returned stay.
Before: `absorb-views`, so that results are read through maps. After: siblings that pass are one contraction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..ir import Builder, Operation, Value, element_type, sym
from ..ir.dialects.tensor import fill_of, parallel_dims
from ..ir.expr import product, substitute
from ..ir.passes import Pass, PassContext, register
from ..ir.types import i64
from .structured import body_ops, composed_map, constant_values, identity_map, is_contraction, is_pointwise, map_bounds, plain_dims
from .tiling.cpu_tiles import is_depthwise
from .tiling.roles import roles_of

__all__ = ["MergeProducts"]


@dataclass(frozen=True)
class _Member:
    """A product, the sum with its bias if it has one, and the column dimension."""

    op: Operation
    add: Operation | None
    n: int

    @property
    def result(self) -> Value:
        return (self.add or self.op).result

    @property
    def columns(self) -> int:
        return int(self.op["dims"][self.n])  # type: ignore[arg-type]


@register
@dataclass(frozen=True)
class MergeProducts(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "merge-products"

    def run(self, module: Operation, ctx: PassContext) -> None:
        merged = 0
        for func in [f for f in module.body if f.name == "func"]:
            constant = constant_values(func)
            groups: dict[Any, list[_Member]] = {}
            for op in func.body:
                found = _member(op, constant) if is_contraction(op) and not is_depthwise(op) else None
                if found is not None:
                    left = 1 - _parameter(op, constant)
                    rest = tuple(s for d, s in enumerate(op["dims"]) if d != found.n)
                    key = (op.operands[left], op["maps"][left], rest, found.n, element_type(op.result.type), found.add is None,
                           element_type(op.operands[1 - left].type), left)
                    groups.setdefault(key, []).append(found)
            position = {op: i for i, op in enumerate(func.body)}
            for members in groups.values():
                members = [m for m in members if _is_ready(m, members[0], constant, position)]
                if len(members) > 1:
                    _merge(members, constant)
                    merged += len(members)
                    ctx.remark("done", f"{len(members)} products of one input joined", members[0].op.location)
        ctx.remark("done", f"{merged} products merged into fewer")


def _parameter(op: Operation, constant: set[Value]) -> int:
    return 0 if op.operands[0] in constant else 1


def _member(op: Operation, constant: set[Value]) -> _Member | None:
    i = _parameter(op, constant)
    roles = roles_of(op)
    if roles is None or op.operands[i] not in constant or op.operands[1 - i] in constant or op["fills"]:
        return None
    own = roles.n if roles.right == i else roles.m
    if len(own) != 1 or not roles.k or own[0] != len(parallel_dims(op)) - 1 or not isinstance(op["dims"][own[0]], int):
        return None
    if roles.right != i or plain_dims(op["maps"][i]) is None:
        return None
    users = list(op.result.users)
    add = users[0] if len(users) == 1 and _adds_bias(users[0], op, constant) else None
    found = _Member(op, add, own[0])
    return found if _is_read_in_part(found.result) else None


def _adds_bias(op: Operation, maker: Operation, constant: set[Value]) -> bool:
    """op is maker's result plus a parameter, one for each column."""
    if not is_pointwise(op) or len(op.operands) != 2 or len(op.results) != 1 or op["fills"] or op["dims"] != parallel_dims(maker):
        return False
    rank = len(op["dims"])
    bias = 1 if op.operands[0] is maker.result else 0
    return (op.operands[bias] in constant and op["maps"][1 - bias] == identity_map(rank) and op["maps"][bias] == (sym(f"d{rank - 1}"),)
            and [o.name for o in body_ops(op)] == ["arith.add"])


def _is_read_in_part(v: Value) -> bool:
    """All readers take elements through maps, and they are more than elementwise ops of the same space."""
    epilogue = True
    for user, k in v.uses:
        if user.name != "tensor.generic" or user["maps"][k] is None or fill_of(user, k) is not None:
            return False
        epilogue &= is_pointwise(user) and product(user["dims"]) == v.type.numel  # type: ignore[attr-defined]
    return bool(v.uses) and not epilogue


def _is_ready(m: _Member, first: _Member, constant: set[Value], position: dict[Operation, int]) -> bool:
    """What the member takes in is there where the first one stands."""
    taken = [v for op in (m.op, m.add) if op is not None for v in op.operands if v in constant]
    return all(v.defining_op is None or position.get(v.defining_op, len(position)) < position[first.op] for v in taken)


def _joined(b: Builder, parts: Sequence[Value], maps: Sequence[Sequence[Any]], sizes: Sequence[int], dims: list[Any], name: str) -> Value:
    """A tensor over `dims` whose first dimension runs through the parts, each read through its map, one after the other."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    shifted = [tuple(substitute(e, {"d0": sym("d0") - start}) for e in m) for m, start in zip(maps, starts, strict=True)]

    def body(i: Builder, *xs: Value) -> Value:
        at, result = i.op("tensor.index", type=i64, dim=0), xs[-1]
        for x, end in reversed(list(zip(xs[:-1], starts[1:], strict=True))):
            result = i.arith("select", i.arith("lt", at, end), x, result)
        return result
    return b.generic(parts, shifted, dims, body, fills=[0] * len(parts), name=name).result


def _merge(members: Sequence[_Member], constant: set[Value]) -> None:
    first = members[0]
    op, i = first.op, _parameter(first.op, constant)
    sizes, total = [m.columns for m in members], sum(m.columns for m in members)
    b = Builder.before_op(op)
    order = plain_dims(op["maps"][i]) or []
    inner = [first.n, *(d for d in order if d != first.n)]
    names = {f"d{d}": sym(f"d{j}") for j, d in enumerate(inner)}
    weights = _joined(b, [m.op.operands[i] for m in members], [tuple(substitute(e, names) for e in m.op["maps"][i]) for m in members], sizes,
                      [total, *(op["dims"][d] for d in inner[1:])], f"{op.operands[i].name or 'w'}_joined")
    dims = [total if d == first.n else s for d, s in enumerate(op["dims"])]
    operands, maps = list(op.operands), list(op["maps"])
    operands[i], maps[i] = weights, tuple(sym(f"d{d}") for d in inner)

    def multiply(inside: Builder, *args: Value) -> Value:
        local: dict[Value, Value] = dict(zip(op.body.args, args, strict=True))
        for o in body_ops(op):
            local[o.result] = inside.insert(o.clone(local)).result
        return local[op.body.terminator.operands[0]]
    made = b.generic(operands, maps, dims, multiply, reductions=op["reductions"], combine=op["combine"], name=op.result.name)
    result = made.result
    if first.add is not None:
        bias = [m.add.operands[1 if m.add.operands[0] is m.op.result else 0] for m in members if m.add is not None]
        joined = _joined(b, bias, [(sym("d0"),)] * len(bias), sizes, [total], f"{bias[0].name or 'b'}_joined")
        space = parallel_dims(made)
        result = b.generic([result, joined], [identity_map(len(space)), (sym(f"d{len(space) - 1}"),)], space,
                           lambda inside, x, y: inside.arith("add", x, y), name=first.result.name).result
    start = 0
    for m in members:
        shift = tuple(sym(f"d{d}") + (start if d == first.n else 0) for d in range(len(parallel_dims(op))))
        for user, k in list(m.result.uses):
            user.attributes["maps"] = tuple(composed_map(e, shift, map_bounds(user)) if j == k else e for j, e in enumerate(user["maps"]))
            user.set_operand(k, result)
        start += m.columns
        for dead in (m.add, m.op):
            if dead is not None:
                dead.erase()
