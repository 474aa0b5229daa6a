"""CPU contractions get their left operand in the type that the multiply-add takes.

A microkernel broadcasts one element (or a few neighbours along K) of the left operand to all lanes, straight from memory. A conversion there costs
several instructions per element and panel, so it is done once, by a pointwise op of its own into which the operand's producer may merge:
  16- or 8-bit factors of a float32 sum, where the target has no product of them      the left operand in float32
  8-bit integers of an int32 sum, form "words": two neighbours along K in 16 bits     the left operand in i16     `vpmaddwd`: exact; x86 with SSE2
                                  form "bytes": four neighbours, unsigned by signed   the left operand in u8      `vpdpbusd` (VNNI)
                                  form "signed bytes": four neighbours                as it is                    `sdot` (Arm), `vpdpbssd`
`vpmaddubsw` is not used: it saturates. Signed bytes x are made unsigned as x + 128, and 128 times the column's sum of the right operand, which is
known once for a parameter, is subtracted from the result: sums of 32 bits wrap around alike, so the result is the same in every case.

The right operand stays narrow: `pack` puts its neighbours side by side, and it is widened as it is loaded, a vector at a time.
Before: layouts are known (`layout`). After: op["_form"] names the form of an integer contraction; `_widened` contractions take in no cast again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from ..ir import DTYPES, Builder, DType, Operation, Target, TensorType, Value, element_type, sym
from ..ir.dialects.tensor import fill_of, parallel_dims
from ..ir.expr import as_int, free_symbols, product, substitute
from ..ir.passes import Pass, PassContext, register
from .exact import factors
from .structured import body_ops, constant_values, identity_map, inline_into, is_contraction, is_pointwise, plain_dims
from .tiling.contraction import GROUPS
from .tiling.cpu_tiles import is_depthwise, multiplies_matrices, multiplies_pairs
from .tiling.roles import Roles, roles_of

__all__ = ["Factors", "integer_form"]

COLUMNS = 16
"""Fewest columns: with fewer an element is hardly used more often than it is converted."""
FEW = 16
"""Most rows of a product that waits for its right operand to come from memory."""
ROWS = 16
"""Fewest rows for which an operand that is no parameter is put into neighbours."""


@register
@dataclass(frozen=True)
class Factors(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "factors"

    def run(self, module: Operation, ctx: PassContext) -> None:
        if ctx.target.is_gpu:
            ctx.remark("note", "tensor cores take narrow factors as they are")
            return
        for func in [f for f in module.body if f.name == "func"]:
            constant = constant_values(func)
            for op in [o for o in func.body if is_contraction(o) and not is_depthwise(o)]:
                roles = roles_of(op)
                if roles is None or not roles.k or not _is_reused(op, roles):
                    continue
                if _stays_narrow(op, roles):
                    op = _absorb_casts(op)
                    roles = roles_of(op)
                    assert roles is not None
                if element_type(op.result.type).name == "i32":
                    _integers(op, roles, constant, ctx)
                elif _is_slow(op, roles, constant, ctx.target):
                    _rewrite(op, roles, DTYPES["f32"], element_type(op.operands[roles.right].type), {"_widened": True})
                    ctx.remark("done", "the left operand is converted to f32 once", op.location)


def _is_reused(op: Operation, roles: Roles) -> bool:
    """Every element of the left operand meets several columns, and most of its tensor is read."""
    n = product(op["dims"][d] for d in roles.n)
    v = op.operands[roles.left]
    assert isinstance(v.type, TensorType)
    read = product(op["dims"][d] for d in (*roles.batch, *roles.m, *roles.k))
    return (not isinstance(n, int) or n >= COLUMNS) and (v.type.numel == read or (
        isinstance(read, int) and isinstance(v.type.numel, int) and v.type.numel <= read))


def _stays_narrow(op: Operation, roles: Roles) -> bool:
    """Operands are read as they are stored: by integer products, and by those of so few rows that they wait for memory."""
    m = product(op["dims"][d] for d in roles.m)
    return element_type(op.result.type).name == "i32" or (isinstance(m, int) and m <= FEW)


def _absorb_casts(op: Operation) -> Operation:
    """Reads what an operand was converted from, where a producer does nothing but widen and turn it: the body converts then."""
    for k, v in enumerate(op.operands):
        maker = v.defining_op
        if maker is None or not is_pointwise(maker) or len(maker.operands) != 1 or len(maker.results) != 1 or fill_of(op, k) is not None:
            continue
        if any(o.name != "arith.cast" for o in body_ops(maker)) or fill_of(maker, 0) is not None or maker["maps"][0] is None:
            continue
        if element_type(maker.operands[0].type).bits < element_type(v.type).bits and plain_dims(maker["maps"][0]) is not None:
            return _absorb_casts(inline_into(op, maker))
    return op


def _is_slow(op: Operation, roles: Roles, constant: set[Value], target: Target) -> bool:
    """A float32 sum whose left factor is narrower, and no instruction of the target multiplies it."""
    narrow, right = element_type(op.operands[roles.left].type), op.operands[roles.right]
    if element_type(op.result.type).name != "f32" or narrow.bits >= 32 or right not in constant or op.operands[roles.left] in constant:
        return False
    last_k = max(roles.k, key=lambda d: any(f"d{d}" in free_symbols(e) for e in op["maps"][roles.left][-1:]))
    return not (multiplies_pairs(op, target) or multiplies_matrices(op, roles, last_k, target))


def integer_form(target: Target, left: DType, right: DType) -> str:
    """How the target multiplies integers of up to 8 bits onto 32: 'signed bytes', 'bytes', 'words', or '' for one by one."""
    on = set(target.features)
    if not (_is_byte(left) and _is_byte(right)):
        return ""
    if target.triple.startswith("aarch64"):
        return "signed bytes" if "dotprod" in on and left.kind == right.kind == "int" else ""
    if not target.triple.startswith("x86_64") or "sse2" not in on:
        return ""
    if right.kind == "int" and left.kind == "int" and "avxvnniint8" in on and target.vector_bits <= 256:
        return "signed bytes"
    if right.kind == "int" and ({"avx512vnni", "avx512vl"} <= on or ("avxvnni" in on and target.vector_bits <= 256)):
        return "bytes"
    return "words" if target.vector_bits <= 256 or "avx512bw" in on else ""


def _stored_type(op: Operation, k: int) -> DType:
    """The narrowest integers that operand k goes through: on its way into the product, or at the end of its producer."""
    maker = op.operands[k].defining_op
    if maker is not None and is_pointwise(maker) and len(maker.results) == 1:
        last = maker.body.terminator.operands[0].defining_op
        if last is not None and last.name == "arith.cast" and _is_byte(element_type(last.operands[0].type)):
            return element_type(last.operands[0].type)
    chain = factors(op)[k]
    return next((t for t in chain if _is_byte(t)), chain[0])


def _is_byte(t: DType) -> bool:
    return t.is_integer and t.bits == 8


def _integers(op: Operation, roles: Roles, constant: set[Value], ctx: PassContext) -> None:
    right, types = op.operands[roles.right], (_stored_type(op, roles.left), _stored_type(op, roles.right))
    m, last = product(op["dims"][d] for d in roles.m), op["dims"][_last_k(op, roles)]
    form = integer_form(ctx.target, *types)
    if form == "bytes" and (fill_of(op, roles.left) is not None or not _divides(last, GROUPS[form])):
        form = "words"
    if not form or not _divides(last, GROUPS[form]) or (right not in constant and not (isinstance(m, int) and m >= ROWS)):
        ctx.remark("declined", f"integers multiplied one by one: {last} steps of K, {types[0]} by {types[1]}", op.location)
        return
    attrs = {"_form": form, "_widened": True}
    wanted = {"signed bytes": types[0], "words": DTYPES["i16"], "bytes": DTYPES["u8"]}[form]
    _rewrite(op, roles, wanted, types[1], attrs, 128 if form == "bytes" and types[0].kind == "int" else 0)
    ctx.remark("done", f"integers multiplied as {form}", op.location)


def _divides(size: Any, by: int) -> bool:
    return isinstance(size, int) and size % by == 0


def _last_k(op: Operation, roles: Roles) -> int:
    """The dimension of K that the left operand's last dimension is read along, as `pack` will take it."""
    innermost = free_symbols(op["maps"][roles.left][-1])
    return next((d for d in roles.k if f"d{d}" in innermost), roles.k[-1])


def _rewrite(op: Operation, roles: Roles, left: DType, right: DType, attrs: dict[str, Any], offset: int = 0) -> None:
    """The contraction with its operands in other types, the left one plus `offset`; what that adds to the result is subtracted."""
    b = Builder.before_op(op)
    operands = list(op.operands)

    def converted(i: Builder, x: Value) -> Value:
        x = _converted(i, op, roles.left, x, DTYPES["i16"] if offset else left)
        return i.cast(i.arith("add", x, offset), left) if offset else x
    operands[roles.left] = _made(b, operands[roles.left], left, converted, f"{operands[roles.left].name or 'x'}_wide")
    operands[roles.right] = _made(b, operands[roles.right], right, lambda i, x: _converted(i, op, roles.right, x, right), operands[roles.right].name)
    total = element_type(op.result.type)

    def multiply(i: Builder, *args: Value) -> Value:
        x, y = (i.cast(args[k], total) if k == roles.left else _converted(i, op, k, args[k], total) for k in (0, 1))
        return i.arith("mul", x, y)
    new = b.generic(operands, op["maps"], op["dims"], multiply, reductions=op["reductions"], combine=op["combine"], fills=op["fills"] or (),
                    name=op.result.name)
    new.result.type = op.result.type
    new.attributes.update({k: v for k, v in op.attributes.items() if k not in new.attributes} | attrs)
    result = _without_offset(b, op, roles, operands[roles.right], new.result, offset) if offset else new.result
    op.result.replace_all_uses_with(result)
    op.erase()


def _made(b: Builder, v: Value, dtype: DType, body: Callable[[Builder, Value], Value], name: str) -> Value:
    """The tensor in another element type, laid out alike."""
    t = v.type
    assert isinstance(t, TensorType)
    if t.dtype == dtype:
        return v
    made = b.generic([v], [identity_map(t.rank)], t.shape, body, name=name).result
    assert isinstance(made.type, TensorType)
    made.type = made.type.with_strides(_dense(t))
    return made


def _converted(i: Builder, op: Operation, k: int, x: Value, dtype: DType) -> Value:
    """Operand k as the body of `op` converts it, and then as `dtype`."""
    user = next(iter(op.body.args[k].uses))[0]
    while user.name == "arith.cast":
        x = i.cast(x, element_type(user.result.type))
        user = next(iter(user.result.uses))[0]
    return i.cast(x, dtype)


def _dense(t: TensorType) -> Any:
    """The strides of a tensor that lies densely in memory, in whatever order of dimensions; None, for row-major, else."""
    if t.strides is None or not all(isinstance(s, int) for s in (*t.strides, *t.shape)):
        return None
    step = 1
    for stride, size in sorted((as_int(s), as_int(n)) for n, s in zip(t.shape, t.strides, strict=True) if n != 1):
        if stride != step:
            return None
        step *= size
    return t.strides


def _without_offset(b: Builder, op: Operation, roles: Roles, right: Value, result: Value, offset: int) -> Value:
    """result - offset * (sum of the right operand over K), for each column."""
    parallel = parallel_dims(op)
    own = [d for d in range(len(parallel)) if any(f"d{d}" in free_symbols(e) for e in op["maps"][roles.right])]
    dims = [*(parallel[d] for d in own), *op["dims"][len(parallel):]]
    order = [*own, *range(len(parallel), len(op["dims"]))]
    renamed = {f"d{d}": sym(f"d{j}") for j, d in enumerate(order)}
    total = element_type(op.result.type)
    sums = b.generic([right], [tuple(substitute(e, renamed) for e in op["maps"][roles.right])], dims,
                     lambda i, x: i.cast(x, total), reductions=op["reductions"], combine=("sum",), fills=(fill_of(op, roles.right),),
                     name=f"{right.name or 'b'}_sums")
    read = tuple(sym(f"d{d}") for d in own)
    made = b.generic([result, sums.result], [identity_map(len(parallel)), read], parallel,
                     lambda i, r, s: i.arith("sub", r, i.arith("mul", s, offset)), name=result.name)
    made.result.type = op.result.type
    return made.result

