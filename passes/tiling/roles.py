"""Who reads which dimension of a contraction: batch (both operands), M (the left one), N (the right one), K (summed)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...ir import Dim, Operation, TensorType
from ...ir.dialects.tensor import parallel_dims
from ...ir.expr import evaluate, free_symbols
from ...ir.ranges import simplify, split_linear
from ..structured import space_bounds

__all__ = ["EXCHANGED", "Roles", "exchanged", "is_row_major", "roles_of", "stride_along"]


@dataclass(frozen=True)
class Roles:
    """Dimension numbers of a contraction: batch, m, n (parallel) and k (reduced); `left` and `right` are operand numbers."""

    batch: tuple[int, ...]
    m: tuple[int, ...]
    n: tuple[int, ...]
    k: tuple[int, ...]
    left: int
    right: int


def roles_of(op: Operation) -> Roles | None:
    """The roles, with the right operand chosen so that N holds the result's contiguous dimension, or what `passes/pack.py` has chosen for N;
    None if an operand reads no own dimension."""
    parallel = len(parallel_dims(op))
    reads = [{int(s[1:]) for e in m for s in free_symbols(e) if s[0] == "d" and s[1:].isdigit()} for m in op["maps"]]
    columns: tuple[int, ...] | None = op.attributes.get("_columns")  # type: ignore[assignment]
    if columns is not None:
        right = 0 if columns[0] in reads[0] else 1
        rows = tuple(d for d in range(parallel) if d in reads[1 - right])
        return Roles((), rows, columns, tuple(range(parallel, len(op["dims"]))), 1 - right, right)
    result = op.result.type
    assert isinstance(result, TensorType)
    innermost = min((d for d in range(parallel) if result.shape[d] != 1), key=lambda d: _stride_key(result.layout[d]), default=parallel - 1)
    right = 0 if innermost in reads[0] and innermost not in reads[1] else 1
    left = 1 - right
    batch = tuple(d for d in range(parallel) if d in reads[0] and d in reads[1])
    n = tuple(d for d in range(parallel) if d in reads[right] and d not in reads[left])
    m = tuple(d for d in range(parallel) if d not in batch and d not in n)
    if not n:
        return None
    found = Roles(batch, m, n, tuple(range(parallel, len(op["dims"]))), left, right)
    return exchanged(found) if op.attributes.get(EXCHANGED) else found


EXCHANGED = "_exchanged"
"""The attribute of a product that computes the transpose of its result: see `passes/pack.py`."""


def exchanged(roles: Roles) -> Roles:
    """Those of the transpose of the result."""
    return replace(roles, m=roles.n, n=roles.m, left=roles.right, right=roles.left)


def stride_along(op: Operation, i: int, d: int) -> int:
    """The distance in operand i between steps of dimension d; sizes unknown at compile time count as 64."""
    v = op.operands[i]
    assert isinstance(v.type, TensorType)
    offset: Dim = 0
    for e, stride in zip(op["maps"][i], v.type.layout, strict=True):
        offset = offset + e * stride
    split = split_linear(simplify(offset, space_bounds(op["dims"])), f"d{d}")
    return 0 if split is None else int(evaluate(split[0], dict.fromkeys(free_symbols(split[0]), 64)))


def is_row_major(op: Operation, roles: Roles) -> bool:
    """The right operand is contiguous along N, and not along K."""
    along_n, along_k = (any(stride_along(op, roles.right, d) == 1 for d in dims) for dims in (roles.n, roles.k))
    return along_n and not along_k


def _stride_key(stride: Dim) -> int:
    return stride if isinstance(stride, int) else 1 << 40
