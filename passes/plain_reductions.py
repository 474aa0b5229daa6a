"""Products of a matrix with a vector that are reductions like any other: on GPUs, those of a computed matrix that others read too, and those of a
matrix in memory that is contiguous along the sum; on CPUs, those of a matrix that is contiguous along the sum and no parameter.

A norm's backward sums dy * weight along each row, beside other sums along the same rows: as a matrix product that would be a kernel of its own
which reads dy once more; as a reduction it shares the others' pass over memory. A computed matrix that only the product reads stays a product.
A weight times one row (decoding) is bound by memory: plain loads keep more of it under way than tiles for matrix units, of whose 16 rows 15 would be
empty (2048x5632: 8.7 us against 13.1; 2048x2048: 4.4 against 6.4; 4096x11008: 23.7 against 26.6).
On CPUs a product's lanes are columns, and the columns of such a matrix (a layer with one output, whose rows are the batch) lie far apart: it would
be gathered element by element. As a reduction the lanes are the sum's (256x512 by a vector: 20 us against 330). Parameters are packed instead.
The same of batches of arguments, where no stream could want the product.
After: such ops carry `_plain`, and `is_contraction` says no.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

from ..ir import Operation, TensorType, Trait, Value, element_type
from ..ir.expr import free_symbols, product
from ..ir.passes import Pass, PassContext, register
from .structured import EXPENSIVE, PLAIN, body_ops, constant_values, is_contraction, is_pointwise
from .tiling.roles import is_row_major, roles_of, stride_along

__all__ = ["PlainReductions"]

LEAST = 256
"""Elements of a row from which loads of whole rows are long enough."""
LANES = 32
"""The same on CPUs."""


@register
@dataclass(frozen=True)
class PlainReductions(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "plain-reductions"

    def run(self, module: Operation, ctx: PassContext) -> None:
        found = 0
        for func in [f for f in module.body if f.name == "func"]:
            constant = set() if ctx.target.is_gpu else constant_values(func)
            for op in func.body:
                if is_contraction(op) and (_shares_its_matrix(op) or _is_one_row(op) if ctx.target.is_gpu else _is_gathered(op, constant)):
                    op.attributes[PLAIN] = True
                    found += 1
        ctx.remark("done", f"{found} products with a vector are reductions")


def _is_one_row(op: Operation) -> bool:
    """A matrix in memory, of floats and contiguous along the sum, times a vector."""
    roles = roles_of(op)
    if roles is None or product(op["dims"][d] for d in (*roles.batch, *roles.m)) != 1:
        return False
    matrix, k = op.operands[roles.right], product(op["dims"][d] for d in roles.k)
    dtype = element_type(matrix.type)
    if matrix.defining_op is not None or not dtype.is_float or dtype.bytes < 2 or not isinstance(k, int) or k < LEAST:
        return False
    return not is_row_major(op, roles)


def _is_gathered(op: Operation, constant: Collection[Value]) -> bool:
    """A matrix that is contiguous along the sum, made in each call, times a vector."""
    roles = roles_of(op)
    if roles is None or len(roles.k) != 1 or product(op["dims"][d] for d in roles.m) != 1:
        return False
    if product(op["dims"][d] for d in roles.batch) != 1 and not _stands_alone(op):
        return False
    matrix, k = op.operands[roles.right], op["dims"][roles.k[0]]
    if matrix in constant or not element_type(matrix.type).is_float or not isinstance(k, int) or k < LANES:
        return False
    return stride_along(op, roles.right, roles.k[0]) == 1 and all(stride_along(op, roles.right, d) != 1 for d in roles.n)


def _stands_alone(op: Operation) -> bool:
    """Of arguments, and followed by nothing but pointwise ops: no part of a stream (attention of one query), which looks for its products."""
    seen, work = {op}, [op]
    while work:
        for user in {u for r in work.pop().results for u in r.users} - seen:
            if user.has_trait(Trait.Structured) and not is_pointwise(user):
                return False
            seen.add(user)
            if is_pointwise(user):
                work.append(user)
    return all(v.defining_op is None for v in op.operands)


def _shares_its_matrix(op: Operation) -> bool:
    rank = len(op["dims"]) - op["reductions"]
    wide = {f"d{i}" for i in range(rank) if op["dims"][i] != 1}
    for i in (0, 1):
        vector, matrix = op.operands[i], op.operands[1 - i]
        reads = {s for e in op["maps"][i] for s in free_symbols(e)}
        if not reads & wide and matrix is not vector and matrix.defining_op is not None and _has_other_readers(matrix, op):
            return True
    return False


def _has_other_readers(v: Value, op: Operation) -> bool:
    """Something beside `op` reads v, or the one matrix that v is made from by cheap arithmetic."""
    while True:
        if any(user is not op for user in v.users):
            return True
        maker = v.defining_op
        if maker is None or not is_pointwise(maker) or any(o.name in EXPENSIVE for o in body_ops(maker)):
            return False
        large = [x for x in maker.operands if isinstance(x.type, TensorType) and x.type.numel == v.type.numel]  # type: ignore[attr-defined]
        if len(large) != 1:
            return False
        v, op = large[0], maker
