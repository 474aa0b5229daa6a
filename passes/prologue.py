"""Which pointwise ops a contraction's kernel computes: on GPUs those that unpack an operand, while it is loaded; on CPUs those that make its rows.

Weights of 8 or 4 bits with scales are a quarter to half of the bytes of the 16-bit numbers that are multiplied. Where few rows of tiles read
them, unpacking in the product's own kernel moves the packed bytes only; with many rows each of which would unpack again, a kernel
that unpacks once is better, and the product may then be a library's.

A CPU's kernel makes the rows of the left operand that a program works on before it multiplies them (`tiling/rows.py`): rows picked from a table,
scaled, dequantised, or joined from several tensors. Each program, of some 256 columns, makes them again: so few columns or few rows pay, and
cheap ops only.
"""

from __future__ import annotations

from ..ir import Operation, Target, TensorType, element_type
from ..ir.expr import as_int, ceildiv, product
from .exact import matrix_unit_type
from .structured import EXPENSIVE, body_ops, is_pointwise, plain_dims
from .tiling.contraction import ROWS
from .tiling.gpu_tiles import gemm_tile_gpu, product_bytes
from .tiling.roles import roles_of
from .unpack import UNPACKS

__all__ = ["makes_rows", "unpacks"]

REPEATS = 2
"""Most rows (or columns) of tiles that unpack the same elements."""


OPS = 8
"""Most ops that make an element in each program."""
FEW = 16
"""Rows of a product that waits for its weights: what each program makes again is done meanwhile."""
COLUMNS, MORE = 256, 1024
"""Most columns, of one program: nothing is made twice; and of four programs, where the rows are so few that the saved launch pays."""


def makes_rows(maker: Operation, contraction: Operation, target: Target) -> bool:
    """`maker` makes the left operand of `contraction` alone, and is best computed in a CPU's kernel of the product."""
    if target.is_gpu or not is_pointwise(maker) or len(maker.results) != 1 or contraction["fills"]:
        return False
    out, roles = maker.result, roles_of(contraction)
    real = [o for o in body_ops(maker) if o.name not in ("arith.cast", "arith.constant", "tensor.index", "tensor.sym")]
    if roles is None or out.users != [contraction] or len(out.uses) != 1 or contraction.operands[roles.left] is not out:
        return False
    if len(real) > OPS or any(o.name in EXPENSIVE for o in real) or any(contraction["dims"][d] != 1 for d in roles.batch) or len(roles.k) != 1:
        return False
    if contraction.attributes.get("_packed") is not True or not isinstance(out.type, TensorType):
        return False  # the kernel's steps of K are single elements, of a panel
    m, n, k = (product(contraction["dims"][d] for d in r) for r in (roles.m, roles.n, roles.k))
    wide = [e for e, size in zip(contraction["maps"][roles.left], out.type.shape, strict=True) if size != 1]
    wanted = [*(d for d in roles.m if contraction["dims"][d] != 1), *roles.k]
    if plain_dims(wide) != wanted or out.type.shape[-1] != k or not all(isinstance(x, int) for x in (m, n, k)):
        return False
    rows = min(as_int(m), ROWS)
    pays = as_int(m) <= FEW or as_int(n) <= COLUMNS or (as_int(m) <= ROWS and as_int(n) <= MORE)
    return pays and as_int(k) >= target.lanes(32) and rows * as_int(k) * element_type(out.type).bytes <= target.l2 // 2


def unpacks(maker: Operation, contraction: Operation, target: Target) -> bool:
    """`maker` makes an operand for `contraction` alone, from fewer bytes, and is best computed inside of it."""
    if not target.is_gpu and maker.attributes.get(UNPACKS):
        return True
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
    rows, columns = gemm_tile_gpu(target, batch, m, n, k, product_bytes(contraction)).result
    repeats = as_int(ceildiv(m, rows) if contraction.operands[roles.right] is out else ceildiv(n, columns))
    return read < made and repeats <= REPEATS
