"""Which pointwise ops a contraction computes while it loads an operand, on GPUs: those that unpack it.

Weights of 8 or 4 bits with scales are a quarter to half of the bytes of the 16-bit numbers that are multiplied. Where few rows of tiles read
them, unpacking in the product's own kernel moves the packed bytes only; with many rows each of which would unpack again, a kernel
that unpacks once is better, and the product may then be a library's.
"""

from __future__ import annotations

from ..ir import Operation, Target, TensorType, element_type
from ..ir.expr import as_int, ceildiv, product
from .exact import matrix_unit_type
from .structured import EXPENSIVE, body_ops, is_pointwise
from .tiling.contraction import roles_of
from .tiling.gpu_tiles import gemm_tile_gpu, product_bytes

__all__ = ["unpacks"]

REPEATS = 2
"""Most rows (or columns) of tiles that unpack the same elements."""


def unpacks(maker: Operation, contraction: Operation, target: Target) -> bool:
    """`maker` makes an operand for `contraction` alone, from fewer bytes, and is best computed inside of it."""
    if not target.is_gpu or not is_pointwise(maker) or len(maker.results) != 1 or any(m is None for m in maker["maps"]):
        return False
    out = maker.result
    if out.users != [contraction] or len(out.uses) != 1 or matrix_unit_type(contraction) is None:
        return False
    if any(o.name in EXPENSIVE for o in body_ops(maker)) or not isinstance(out.type, TensorType):
        return False
    sizes = [v.type.numel for v in (*maker.operands, out) if isinstance(v.type, TensorType)]
    roles = roles_of(contraction)
    if roles is None or not all(isinstance(n, int) for n in (*sizes, *contraction["dims"])):
        return False
    read = sum(as_int(v.type.numel) * element_type(v.type).bytes for v in maker.operands if isinstance(v.type, TensorType))
    made = as_int(out.type.numel) * element_type(out.type).bytes
    batch, m, n, k = (product(contraction["dims"][d] for d in r) for r in (roles.batch, roles.m, roles.n, roles.k))
    tile = gemm_tile_gpu(target, batch, m, n, k, product_bytes(contraction))
    repeats = as_int(ceildiv(m, tile.rows) if contraction.operands[roles.right] is out else ceildiv(n, tile.columns))
    return read < made and repeats <= REPEATS
