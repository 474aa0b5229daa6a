"""Reductions of a product's result, part by part in the product's own kernel (CPUs).

    y = f(x @ w)                      y = f(x @ w)
    m = max over n of y       ->      m_p = max over the columns of part p;           m = max over p of m_p
    s = sum over n of exp(y - m)      s_p = sum over those of exp(y - m_p);           s = sum over p of s_p * exp(m_p - m)

A part is what one program makes: some 256 columns of its rows (or, where rows are summed, a block of rows of its columns). The partial ops join
the product's kernel as an epilogue (`fuse`), which folds each tile of the result in while it is in registers; where nothing else reads y, it is
never stored: the log-sum-exp of logits, a sum or maximum of a layer's outputs, the gradient of a bias. The sums that depend on a maximum are
those that `rescale.py` knows to rescale.

Not where an op of the result's size reads what is reduced (softmax, norms): a kernel of rows then reads the result once for both.
After: partial reductions have `_partial` = ("columns" | "rows", elements), and their last parallel (or first) dimension counts the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from ..ir import Builder, Dim, Operation, Target, Value, element_type, sym
from ..ir.dialects.tensor import fill_of, parallel_dims
from ..ir.expr import as_int, ceildiv, free_symbols, product, substitute
from ..ir.passes import Pass, PassContext, register
from ..ir.ranges import delinearize, simplify
from .rescale import Declined, Dependence, Factor
from .structured import PARTIAL, identity_map, identity_of, index_value, inline_into, is_contraction, is_pointwise, plain_dims, rebuild, space_bounds
from .tiling.contraction import COLUMNS, K_BLOCK, ROWS, rows_in_block
from .tiling.cpu_tiles import contraction_tile, is_depthwise
from .tiling.roles import EXCHANGED, Roles, roles_of

__all__ = ["TileReductions"]

DEEP = 64
"""Fewest steps of K: with fewer, folding a tile costs as much as making it."""
LARGE = 1 << 15
"""Fewest elements of the result: fewer are read again from the first-level cache."""


@register
@dataclass(frozen=True)
class TileReductions(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "tile-reductions"

    def run(self, module: Operation, ctx: PassContext) -> None:
        if ctx.target.is_gpu:
            ctx.remark("note", "reductions of products are kernels of their own")
            return
        for func in [f for f in module.body if f.name == "func"]:
            for c in [o for o in func.body if is_contraction(o) and not is_depthwise(o)]:
                roles = roles_of(c)
                if roles is not None and not c.attributes.get(EXCHANGED) and _is_large(c, roles):
                    for kind in ("columns", "rows"):
                        _take_in(func, c, roles, kind, ctx)


def _is_large(c: Operation, roles: Roles) -> bool:
    m, n, k = (product(c["dims"][d] for d in r) for r in (roles.m, roles.n, roles.k))
    if not isinstance(n, int) or not isinstance(k, int) or k < DEEP or not all(isinstance(c["dims"][d], int) for d in roles.k):
        return False
    return element_type(c.result.type).name == "f32" and (not isinstance(m, int) or m * n >= LARGE)


def _take_in(func: Operation, c: Operation, roles: Roles, kind: str, ctx: PassContext) -> None:
    """Parts for all reductions of the kind, if they are worth it: over all columns, or over all rows, of what is made from `c`."""
    space = _space_of(c)
    reduced = roles.n if kind == "columns" else roles.m
    found = [op for op in func.body if _is_reduction(op) and (at := _place(op, space)) is not None and _reduces(op, at, c, reduced)]
    while found:
        rules = Dependence(_kinds(space, found), infinite=True)
        factors = {op: f for op in found if (f := _dependence(rules, op)) is not None}
        tops = {op: f.value.defining_op if f.value is not None else None for op, f in factors.items()}
        kept = [op for op, top in tops.items() if top is None or top in factors]
        if len(kept) == len(found):
            break
        found = kept
    if not found or _read_again(func, space, found):
        return
    size = _part_size(c, roles, kind, ctx.target)
    if size is None:
        return
    rewriter = _Rewriter(kind, size)
    for op in found:
        ctx.remark("done", f"{op['combine'][0]} over the {kind} of a product in parts of {size}, in its kernel", op.location)
        rewriter.replace(op, [as_int(c["dims"][d]) for d in reduced], factors[op])


def _part_size(c: Operation, roles: Roles, kind: str, target: Target) -> int | None:
    """Columns or rows that one program of the product's kernel makes."""
    mr, nr, _ = contraction_tile(c, roles, target)
    if kind == "columns":
        panels = -(-as_int(product(c["dims"][d] for d in roles.n)) // nr)
        return nr * -(-panels // -(-panels // max(1, COLUMNS // nr)))  # equal parts
    m, k = product(c["dims"][d] for d in roles.m), as_int(product(c["dims"][d] for d in roles.k))
    if not isinstance(m, int):
        return None
    step = element_type(c.operands[roles.left].type).bytes
    return rows_in_block(m, mr, min(ROWS, target.l2 // 2 // (step * min(k, K_BLOCK))))


# -- what may be taken in --------------------------------------------------------------------------------------------------------

Space = dict[Operation, dict[int, int]]
"""Ops of the result's space: for each of their dimensions, that of the contraction."""


def _space_of(c: Operation) -> Space:
    """The contraction, and the pointwise ops that read nothing of its size but what is made from it."""
    rank = len(parallel_dims(c))
    space: Space = {c: {d: d for d in range(rank)}}
    pending = [c]
    while pending:
        for v in pending.pop().results:
            for user in v.users:
                if user not in space and is_pointwise(user) and (place := _place(user, space)) is not None and _is_whole(c, place):
                    space[user] = place
                    pending.append(user)
    return space


def _place(op: Operation, space: Space) -> dict[int, int] | None:
    """The contraction's dimension for each of the op's, by what it reads of the space; None where it reads it at other points than its own."""
    place: dict[int, int] = {}
    for i, v in enumerate(op.operands):
        made = v.defining_op
        if made not in space:
            continue
        dims = plain_dims(op["maps"][i]) if op["maps"][i] is not None and fill_of(op, i) is None else None
        own = space[made]  # type: ignore[index]  # without dimensions of size one, which need not be the contraction's
        if dims is None or any(place.setdefault(d, own[j]) != own[j] for j, d in enumerate(dims) if j in own):
            return None
    whole = all(d in place or size == 1 for d, size in enumerate(op["dims"])) and len(set(place.values())) == len(place)
    return place if whole and place and all(fill_of(op, i) is None for i in range(len(op.operands))) else None


def _is_whole(c: Operation, place: dict[int, int]) -> bool:
    return set(place.values()) >= {d for d, size in enumerate(parallel_dims(c)) if size != 1}


def _is_reduction(op: Operation) -> bool:
    return (op.name == "tensor.generic" and op["reductions"] > 0 and len(op.results) == 1 and op["combine"][0] in ("sum", "max", "min")
            and not is_contraction(op) and PARTIAL not in op.attributes and all(m is not None for m in op["maps"])
            and element_type(op.result.type).name == "f32" and element_type(op.body.terminator.operands[0].type).name == "f32")


def _reduces(op: Operation, at: dict[int, int], c: Operation, wanted: tuple[int, ...]) -> bool:
    """Over exactly the dimensions `wanted` of the contraction, in their order."""
    first = len(parallel_dims(op))
    reduced = tuple(at.get(d, -1) for d in range(first, len(op["dims"])))
    return reduced == wanted and _is_whole(c, at) and all(op["dims"][d] == c["dims"][at[d]] for d in at)


def _kinds(space: Space, found: list[Operation]) -> Callable[[Value], str]:
    def kind_of(v: Value) -> str:
        op = v.defining_op
        if op in space:
            return "full" if not is_contraction(op) else ""
        if op in found:
            return "reduction"
        return "row" if op is not None and is_pointwise(op) and any(w.defining_op in found for w in op.operands) else ""
    return kind_of


def _dependence(rules: Dependence, op: Operation) -> Factor | None:
    """How the reduction depends on the others; None where parts cannot be merged."""
    try:
        f = rules.of(op, op.body.terminator.operands[0])
    except Declined:
        return None
    if f.kind == "free":
        return f
    of = f.value.defining_op if f.value is not None else None
    shifts = f.kind == "product" and not f.scales and op["combine"] == ("sum",) and of is not None and _is_reduction(of) and of["combine"] == ("max",)
    return f if shifts and rules.of(of, of.body.terminator.operands[0]).kind == "free" else None  # type: ignore[union-attr, arg-type]


def _read_again(func: Operation, space: Space, found: list[Operation]) -> bool:
    """Some op reads the result, and (by whatever way) what is reduced of it."""
    depends: set[Value] = {op.result for op in found}
    for op in func.body:
        inside = {v for o in op.walk() for v in o.operands}
        if op in found or not inside & depends:
            continue
        depends.update(op.results)
        if any(v.defining_op in space for v in inside):
            return True
    return any(op in space and any(v in depends for v in op.operands) for op in space)


# -- the rewriting ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Parts:
    """Where the parts of a reduction stand: the iteration space of the partial op, and its reads of what the whole op reads."""

    kind: str
    size: int
    total: int
    dims: list[Dim]
    place: dict[int, Dim]
    position: Dim

    @staticmethod
    def of(op: Operation, sizes: list[int], kind: str, size: int) -> _Parts:
        first, total = len(parallel_dims(op)), as_int(product(sizes))
        columns = kind == "columns"
        position = sym(f"d{first if columns else 0}") * size + sym(f"d{first + 1}")
        outer: list[Dim] = [*op["dims"][:first], ceildiv(total, size)] if columns else [ceildiv(total, size), *op["dims"][:first]]
        place: dict[int, Dim] = {d: sym(f"d{d if columns else d + 1}") for d in range(first)}
        place |= dict(enumerate(delinearize(position, sizes), first))
        return _Parts(kind, size, total, [*outer, size], place, position)

    @property
    def is_ragged(self) -> bool:
        return self.total % self.size != 0

    def read(self, m: Sequence[Dim]) -> tuple[Dim, ...]:
        env = {f"d{d}": e for d, e in self.place.items()}
        return tuple(simplify(substitute(e, env), space_bounds(self.dims)) for e in m)

    def fill(self, m: Sequence[Dim]) -> int | None:
        """What stands for elements past the last: they are left out of the reduction, but may be read."""
        return 0 if self.is_ragged and f"d{len(self.dims) - 1}" in {s for e in m for s in free_symbols(e)} else None

    def of_part(self, read: Sequence[Dim], part: Dim) -> tuple[Dim, ...]:
        """The read of another partial reduction, of which the whole one is read at `read`."""
        return (*read, part) if self.kind == "columns" else (part, *read)

    @property
    def number(self) -> Dim:
        """That of the part, in the space of the partial op."""
        return sym(f"d{len(self.dims) - 2}") if self.kind == "columns" else sym("d0")

    @property
    def outer(self) -> tuple[list[Dim], Dim]:
        """The space of the whole reduction's result, and how many parts there are."""
        return (self.dims[:-2], self.dims[-2]) if self.kind == "columns" else (self.dims[1:-1], self.dims[0])


@dataclass
class _Rewriter:
    """Replaces reductions of one product by their parts, in the order of the function."""

    kind: str
    size: int
    partial: dict[Value, Value] = field(default_factory=dict)
    whole: dict[Value, Value] = field(default_factory=dict)

    def replace(self, op: Operation, sizes: list[int], factor: Factor) -> None:
        original, top = op.result, factor.value
        if top is not None and self.whole[top] not in op.operands:  # by way of a row op: -inf made finite
            op = inline_into(op, next(v.defining_op for v in op.operands  # type: ignore[arg-type]
                                      if v.defining_op is not None and self.whole[top] in v.defining_op.operands))
        parts = _Parts.of(op, sizes, self.kind, self.size)
        operands, maps = list(op.operands), [parts.read(m) for m in op["maps"]]
        fills: list[int | None] = [parts.fill(m) for m in maps]
        shifts = [] if top is None else [i for i, v in enumerate(operands) if v is self.whole[top]]
        reads = [op["maps"][i] for i in shifts]
        for i in shifts:
            operands[i], maps[i], fills[i] = self.partial[top], parts.of_part(maps[i], parts.number), None  # type: ignore[index]
        b = Builder.before_op(op)
        made = rebuild(op, b, operands, maps, fills, parts.dims, parts.place, 1)
        made.attributes["combine"], made.attributes[PARTIAL] = op["combine"], (self.kind, self.size)
        if parts.is_ragged:
            _leave_out(made, parts, op["combine"][0])
        for i in shifts:
            _make_finite(made, made.body.args[i])
        merged = self._merged(b, op, made.result, parts, factor, reads[0] if reads else ())
        merged.name, merged.type = op.result.name, op.result.type
        self.partial[original], self.whole[original] = made.result, merged
        op.result.replace_all_uses_with(merged)
        op.erase()

    def _merged(self, b: Builder, op: Operation, part: Value, parts: _Parts, factor: Factor, read: Sequence[Dim]) -> Value:
        """The parts as one value; `read` is how the whole op reads the maximum by which it is shifted."""
        dims, count = parts.outer
        number: Dim = 0 if count == 1 else sym(f"d{len(dims)}")
        several = [] if count == 1 else [count]
        of_part = parts.of_part(identity_map(len(dims)), number)
        if factor.value is None:
            return b.generic([part], [of_part], [*dims, *several], lambda _, x: x, reductions=len(several),
                             combine=op["combine"][:len(several)]).result

        def rescaled(i: Builder, x: Value, own: Value, highest: Value) -> Value:
            own = i.arith("select", i.arith("eq", own, float("inf")), 0, own)
            if factor.guarded:
                highest = i.arith("select", i.arith("isinf", highest), 0, highest)
            return i.arith("mul", x, i.arith("exp", i.arith("sub", own, highest)))

        tops, maps = [self.partial[factor.value], self.whole[factor.value]], [of_part, parts.of_part(read, number), tuple(read)]
        return b.generic([part, *tops], maps, [*dims, *several], rescaled, reductions=len(several), combine=("sum",) * len(several)).result


def _leave_out(made: Operation, parts: _Parts, combine: str) -> None:
    """Positions past the last give the neutral element."""
    end = made.body.terminator
    b, y = Builder.before_op(end), end.operands[0]
    inside = b.arith("lt", index_value(b, parts.position, made), parts.total)
    end.set_operand(0, b.arith("select", inside, y, identity_of(combine, element_type(y.type))))


def _make_finite(made: Operation, arg: Value) -> None:
    """Reads 0 for a maximum of -inf: the exponent of another -inf is -inf then, and not NaN."""
    b = Builder.before_op(next(iter(made.body)))
    test = b.arith("eq", arg, float("-inf"))
    finite = b.arith("select", test, 0, arg)
    arg.replace_uses_if(finite, lambda user: user not in (test.defining_op, finite.defining_op))
