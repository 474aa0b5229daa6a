"""Contractions as matrix products on strided memory: what a library can be asked for.

    found = read_product(op)        # op: a contraction (tensor.generic)
    found.sizes, found.a, found.b   # or a text that says why it is none

Each group of dimensions (batch, rows, columns, summed) must be one linear walk in every operand that it touches, and each matrix must be
contiguous along its rows or its columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..ir import Dim, Operation, TensorType
from ..ir.dialects.tensor import fill_of, parallel_dims
from ..ir.expr import product
from ..ir.ranges import simplify, split_linear
from ..ir.types import contiguous_strides
from .structured import space_bounds
from .tiling.roles import roles_of

__all__ = ["Product", "is_linear", "read_product", "walk", "walk_of"]


@dataclass(frozen=True)
class Product:
    """d[b, i, j] = sum over k of a[b, i, k] * b[b, k, j]; sizes and strides in elements.

    `sizes` are (batch, m, n, k); `a` the strides of (batch, row, column), `b` too; `d` those of (batch, row), as its columns are contiguous.
    `left` is the number of the operand that is a; offsets are where a and b begin in their tensors.
    """

    sizes: tuple[Dim, Dim, Dim, Dim]
    a: tuple[Dim, Dim, Dim]
    b: tuple[Dim, Dim, Dim]
    d: tuple[Dim, Dim]
    offset_a: Dim
    offset_b: Dim
    left: int


def read_product(op: Operation, types: Sequence[TensorType] | None = None) -> Product | str:
    """`types` replaces the operands' types (their layouts). The result is taken to be row-major."""
    roles = roles_of(op)
    if roles is None:
        return "it has no columns of its own"
    if any(fill_of(op, i) is not None for i in range(2)):
        return "an operand is padded"
    walks = []
    for i in range(2):
        t = op.operands[i].type if types is None else types[i]
        assert isinstance(t, TensorType)
        found_walk = walk(op, i, t)
        if found_walk is None:
            return f"operand {i} is not read with fixed strides"
        walks.append(found_walk)
    (left, offset_a), (right, offset_b) = walks[roles.left], walks[roles.right]
    parallel = parallel_dims(op)
    out = dict(enumerate(contiguous_strides(parallel)))
    order = sorted(roles.k, key=lambda d: -_key(right[d]))
    dims = op["dims"]
    groups = {
        "batch": _collapse(dims, roles.batch, (left, right, out)),
        "m": _collapse(dims, roles.m, (left, out)),
        "n": _collapse(dims, roles.n, (right, out)),
        "k": _collapse(dims, order, (left, right)),
    }
    for name, text in (("batch", "batch"), ("m", "row"), ("n", "column"), ("k", "summed")):
        if groups[name] is None:
            return f"its {text} dimensions are no single walk through memory"
    (batch, sb), (m, sm), (n, sn), (k, sk) = (groups[x] for x in ("batch", "m", "n", "k"))  # type: ignore[misc]
    if n != 1 and sn[1] != 1:
        return "its result is not contiguous along the columns"
    found = Product((batch, m, n, k), (sb[0], sm[0], sk[0]), (sb[1], sk[1], sn[0]), (sb[2], sm[1]), offset_a, offset_b, roles.left)
    for name, rows, columns, (_, row, column) in (("left", m, k, found.a), ("right", k, n, found.b)):
        if not (_is_matrix(columns, row, column) or _is_matrix(rows, column, row)):
            return f"its {name} operand is contiguous neither along its rows nor along its columns"
    return found


def walk_of(op: Operation, i: int) -> dict[int, Dim] | None:
    """The stride of each dimension in operand i; None if it is not linear."""
    t = op.operands[i].type
    assert isinstance(t, TensorType)
    found = walk(op, i, t)
    return None if found is None else found[0]


def is_linear(dims: Sequence[Dim], group: Sequence[int], strides: dict[int, Dim]) -> bool:
    """Whether the dimensions are one walk through memory."""
    return _collapse(dims, group, (strides,)) is not None


def walk(op: Operation, i: int, t: TensorType) -> tuple[dict[int, Dim], Dim] | None:
    """For an operand of type t: the stride of each dimension in operand i, and where it begins; None if it is not linear."""
    offset: Dim = 0
    for e, stride in zip(op["maps"][i], t.layout, strict=True):
        offset = offset + e * stride
    rest = simplify(offset, space_bounds(op["dims"]))
    strides: dict[int, Dim] = {}
    for d in range(len(op["dims"])):
        split = split_linear(rest, f"d{d}")
        if split is None:
            return None
        strides[d], rest = split
    return strides, rest


def _collapse(dims: Sequence[Dim], group: Sequence[int], operands: Sequence[dict[int, Dim]]) -> tuple[Dim, tuple[Dim, ...]] | None:
    """(size, stride in each operand) of the dimensions as one, outermost first; None if they are not."""
    wide = [d for d in group if dims[d] != 1]
    for outer, inner in pairwise(wide):
        if any(w[outer] != w[inner] * dims[inner] for w in operands):
            return None
    strides = tuple(walk[wide[-1]] if wide else 0 for walk in operands)
    return product(dims[d] for d in wide), strides


def _is_matrix(length: Dim, across: Dim, along: Dim) -> bool:
    """True if lines of `length` elements are contiguous and do not overlap."""
    if length != 1 and along != 1:
        return False
    return not (isinstance(across, int) and isinstance(length, int) and across < length) and across != 0


def _key(stride: Dim) -> int:
    return stride if isinstance(stride, int) else 1 << 40


