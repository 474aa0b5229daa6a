"""A norm of one row is computed by whoever reads it: each program of a matrix-vector product normalises the vector as it loads it.

    h = x * rsqrt(mean(x^2)) * g;   y = W h      ->      y_n = rsqrt(mean(x^2)) * sum_k W_nk (x_k g_k),    mean(x^2) computed for each n

In decoding, norms are kernels of one program between products that use the whole device: their time is all launch and latency. The vector is
read by every program of the product in any case; squaring it as well costs little beside its row of the weight. But the norm's own weight, and
a residual that is added before, are then read once more for every row of the weight: with many rows that takes longer than the kernel that is
saved (a head of 32000 rows behind a residual: 59 us against 38 and a norm of 1.7; query, key and value of 4096 rows: 8.8 against 6.5 and 1.7).
The row's factor comes out of the sum, so both sums run in one pass (they are independent); rounding the normalised vector to 16 bits, which
eager does, falls away.

Only where the product is a plain reduction (`plain_reductions.py`), and where every reader of the vector is one: else the norm's kernel stays and
nothing is gained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..ir import Builder, Dim, Operation, Value, element_type, sym
from ..ir.dialects.tensor import fill_of, parallel_dims
from ..ir.expr import as_int, product, substitute
from ..ir.passes import Pass, PassContext, register
from ..ir.ranges import simplify
from .structured import PLAIN, body_ops, identity_map, inline_into, is_pointwise, space_bounds

__all__ = ["SpreadNorms"]

LONGEST = 1 << 14
"""Elements of a vector that every program may square again: they come from the caches."""

SAVED, RELOADED = 1.7e-6, 8e12
"""Seconds of a norm's own kernel, and bytes/s at which vectors come again from the caches (H200)."""
DEPTH = 6
"""Pointwise ops between the sum and the vector."""


@register
@dataclass(frozen=True)
class SpreadNorms(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "spread-norms"

    def run(self, module: Operation, ctx: PassContext) -> None:
        spread = 0
        for func in [f for f in module.body if f.name == "func"]:
            for op in list(func.body):
                if is_pointwise(op) and len(op.results) == 1 and op.result.users and all(_is_product(u, op.result) for u in op.result.users):
                    whole = _merged(op)
                    norm = _norm_of(whole)
                    if norm is not None and _pays(op, whole, norm[0]) and all(_sums_alike(u, norm[0]) for u in op.result.users):
                        for user in list(op.result.users):
                            _spread(op.result, whole, user, *norm)
                        spread += 1
                    whole.erase()
        ctx.remark("done", f"{spread} norms are computed by the products that read them")


def _is_product(user: Operation, v: Value) -> bool:
    """A matrix-vector product as a plain reduction, of which `v` is the vector."""
    if not user.attributes.get(PLAIN) or list(user.operands).count(v) != 1:
        return False
    i = user.operands.index(v)
    first = len(parallel_dims(user))
    reads = {str(e) for e in user["maps"][i] if not isinstance(e, int)}
    wide = {f"d{j}" for j in range(first) if user["dims"][j] != 1}
    return fill_of(user, i) is None and not reads & wide and {f"d{j}" for j in range(first, len(user["dims"]))} <= reads


def _pays(op: Operation, whole: Operation, made: Operation) -> bool:
    """Whether what each row of the products reads beside the vector takes less time than the norm's kernel."""
    read = {v: v.type.numel * v.type.dtype.bytes for x in (whole, made) for v in x.operands}  # type: ignore[attr-defined]
    extra = sum(n for n in read.values() if isinstance(n, int)) - op.result.type.numel * op.result.type.dtype.bytes  # type: ignore[attr-defined]
    rows = sum(product(parallel_dims(u)) for u in op.result.users)
    return not isinstance(rows, int) or rows * max(0, extra) <= SAVED * RELOADED


def _sums_alike(user: Operation, made: Operation) -> bool:
    return tuple(user["dims"][len(parallel_dims(user)):]) == tuple(made["dims"][len(parallel_dims(made)):])


def _merged(op: Operation) -> Operation:
    """A copy of a pointwise op with the pointwise ops merged into it that lead from a sum to it."""
    made = Builder.before_op(op).insert(op.clone({}))
    for _ in range(DEPTH):
        producer = next((v.defining_op for i, v in enumerate(made.operands) if made["maps"][i] is not None and fill_of(made, i) is None
                         and _leads_from_sum(v)), None)
        if producer is None:
            break
        made = inline_into(made, producer)
    return made


def _leads_from_sum(v: Value, depth: int = 4) -> bool:
    op = v.defining_op
    if op is None or not is_pointwise(op) or depth == 0 or len(op.results) != 1:
        return False
    makers = [x.defining_op for x in op.operands if x.defining_op is not None and x.defining_op.name == "tensor.generic"]
    return any(m["reductions"] > 0 or _leads_from_sum(m.results[0], depth - 1) for m in makers)


def _norm_of(op: Operation) -> tuple[Operation, int, list[Value]] | None:
    """(the sum, which operand of `op` it is, factors of op's body that depend on it alone); None if op is no vector times such factors."""
    sums = [(i, v.defining_op) for i, v in enumerate(op.operands) if v.defining_op is not None and v.defining_op.name == "tensor.generic"
            and v.defining_op["reductions"] and op["maps"][i] is not None]
    if len(sums) != 1 or not all(isinstance(n, int) for n in op["dims"]):
        return None
    (i, made), = sums
    assert made is not None
    if len(made.results) != 1 or made["combine"] != ("sum",) or as_int(product(parallel_dims(made))) != 1 or fill_of(op, i) is not None:
        return None
    if not isinstance(product(made["dims"]), int) or as_int(product(made["dims"])) > LONGEST or product(made["dims"]) != product(op["dims"]):
        return None
    arg = op.body.args[i]
    factors = _factors(op.body.terminator.operands[0], arg)
    inside = set().union(set(), *(_needed(f) for f in factors or ()))
    if not factors or any(user not in inside for user in arg.users) or any(x is not arg for f in factors for x in _leaves(f)):
        return None
    return made, i, factors


def _factors(x: Value, arg: Value) -> list[Value] | None:
    """The scalars by which the product x is multiplied that are made from `arg`; None if `arg` is in it in another way."""
    op = x.defining_op
    if op is None or arg not in _leaves(x):
        return None if x is arg else []
    if op.name == "arith.cast" and all(element_type(v.type).is_float for v in (x, op.operands[0])):
        return _factors(op.operands[0], arg)
    if op.name != "arith.mul":
        return None
    found: list[Value] = []
    for v in op.operands:
        if _leaves(v) == {arg}:
            found.append(v)
            continue
        more = _factors(v, arg)
        if more is None:
            return None
        found += more
    return found


def _leaves(x: Value) -> set[Value]:
    """Arguments and positions that a scalar is made from."""
    op = x.defining_op
    if op is None:
        return {x}
    if op.name in ("tensor.index", "tensor.sym"):
        return {x}
    return set().union(set(), *(_leaves(v) for v in op.operands))


def _needed(x: Value) -> set[Operation]:
    op = x.defining_op
    return set() if op is None else {op}.union(*(_needed(v) for v in op.operands))


def _spread(vector: Value, op: Operation, user: Operation, made: Operation, i: int, factors: list[Value]) -> None:
    """Lets the product `user` sum what `op` computes, but for the factors, instead of `vector`, and beside it what `made` sums; then multiplies."""
    b = Builder.before_op(user)
    space, dims = parallel_dims(user), user["dims"]
    bare = _without(b.insert(op.clone({})), op, i, factors)
    # both sums as one op: one pass over the vector
    bounds = space_bounds(dims)
    outer = len(parallel_dims(made))
    env: dict[str, Dim] = {f"d{j}": 0 if j < outer else sym(f"d{len(space) + j - outer}") for j in range(len(made["dims"]))}
    maps = [None if m is None else tuple(simplify(substitute(e, env), bounds) for e in m) for m in made["maps"]]
    count = len(user.operands)

    def both(inner: Builder, *args: Value) -> tuple[Value, Value]:
        return _copied(inner, user, args[:count]), _copied(inner, made, args[count:])

    sums = b.generic([*(bare.result if v is vector else v for v in user.operands), *made.operands], [*user["maps"], *maps], dims, both,
                     reductions=user["reductions"], combine=("sum", "sum"),
                     fills=[fill_of(x, k) for x in (user, made) for k in range(len(x.operands))])
    sums = inline_into(sums, bare)
    bare.erase()

    def scaled(inner: Builder, y: Value, s: Value) -> Value:
        known: dict[Value, Value] = {op.body.args[i]: s}
        for o in body_ops(op):
            if any(o in _needed(f) for f in factors):
                known[o.result] = inner.insert(o.clone(known)).result
        for f in factors:
            y = inner.arith("mul", y, inner.cast(known[f], element_type(y.type)))
        return y

    at = identity_map(len(space))
    out = b.generic(list(sums.results), [at, at], list(space), scaled, name=user.result.name)
    out.result.type = user.result.type
    user.result.replace_all_uses_with(out.result)
    user.erase()


def _without(bare: Operation, op: Operation, i: int, factors: list[Value]) -> Operation:
    """`bare`, a copy of `op`, without the factors in its product."""
    copies = dict(zip(body_ops(op), body_ops(bare), strict=True))
    for f in factors:
        factor = bare.body.args[i] if f.defining_op is None else copies[f.defining_op].result
        for x in list(factor.users):
            if x.name == "arith.mul":
                x.result.replace_all_uses_with(x.operands[1] if x.operands[0] is factor else x.operands[0])
                x.erase()
    return bare


def _copied(b: Builder, op: Operation, args: Sequence[Value]) -> Value:
    """The scalar that op's body yields, of these arguments."""
    known: dict[Value, Value] = dict(zip(op.body.args, args, strict=True))
    for o in body_ops(op):
        b.insert(o.clone(known))
    return known[op.body.terminator.operands[0]]
