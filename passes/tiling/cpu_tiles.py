"""How a contraction is computed on a CPU: by which products, in register tiles of which size.

`gemm_tile` models the cycles of a tile; packing (`passes/pack.py`) and tiling ask the same functions and so agree about the form of operands.
"""

from __future__ import annotations

from functools import lru_cache

from ...ir import Dim, Operation, Target, element_type, sym
from ...ir.dialects.tensor import fill_of, parallel_dims
from ...ir.expr import free_symbols, product
from ...ir.ranges import delinearize, split_linear
from ..structured import space_bounds
from .columns import WINDOW
from .contraction import MATRIX, offset_of
from .roles import EXCHANGED, Roles

__all__ = ["contraction_tile", "fits_registers", "gemm_tile", "is_depthwise", "multiplies_matrices", "multiplies_pairs", "square_tile"]


def is_depthwise(op: Operation) -> bool:
    """Each element of one operand meets a window of the other: a contraction with no dimension to share a loaded element along, few steps of K."""
    reads = [{int(s[1:]) for e in m for s in free_symbols(e) if s[0] == "d" and s[1:].isdigit()} for m in op["maps"]]
    parallel = {d for d in range(len(parallel_dims(op))) if op["dims"][d] != 1}
    k = product(op["dims"][len(parallel_dims(op)):])
    shared, alone = parallel & reads[0] & reads[1], [parallel & (reads[i] - reads[1 - i]) for i in (0, 1)]
    return bool(shared) and not all(alone) and isinstance(k, int) and k <= WINDOW


def multiplies_pairs(op: Operation, target: Target) -> bool:
    """The target has an instruction that sums two products of bf16 in f32, and the op is made of those.

    Processors with a matrix unit have that instruction too, at a fraction of its speed.
    """
    if target.is_gpu or "avx512bf16" not in target.features or "amx-bf16" in target.features or target.vector_bits < 512:
        return False
    return element_type(op.result.type).name == "f32" and all(element_type(v.type).name == "bf16" for v in op.operands)


def multiplies_matrices(op: Operation, roles: Roles, last_k: int, target: Target) -> bool:
    """The target has a matrix unit for bf16 that can read the left operand as it lies: rows of contiguous elements along `last_k`, 16 at least."""
    m, k, v = product(op["dims"][d] for d in roles.m), op["dims"][last_k], op.operands[roles.left]
    if target.is_gpu or not {"amx-bf16", "amx-tile"} <= set(target.features) or element_type(op.result.type).name != "f32":
        return False
    if any(element_type(x.type).name != "bf16" for x in op.operands) or fill_of(op, roles.left) is not None:
        return False
    if not isinstance(m, int) or not isinstance(k, int) or m <= 0 or m % (MATRIX[0] // 2) or k % MATRIX[2]:
        return False
    row = sym("row")
    at = dict(zip([f"d{d}" for d in roles.m], delinearize(row, [op["dims"][d] for d in roles.m]), strict=True))
    bounds = {**space_bounds(op["dims"]), "row": (0, m - 1)}
    offset = offset_of(v, op["maps"][roles.left], at, bounds)
    down, along = split_linear(offset, "row"), split_linear(offset, f"d{last_k}")
    return down is not None and isinstance(down[0], int) and along is not None and along[0] == 1


def contraction_tile(op: Operation, roles: Roles, target: Target) -> tuple[int, int, int]:
    """The tile that an op is computed by, after its operands were packed."""
    if op.attributes.get("_packed") == "matrices":
        m = product(op["dims"][d] for d in roles.m)
        return (MATRIX[0] if m % MATRIX[0] == 0 else MATRIX[0] // 2), MATRIX[1], 1
    if op.attributes.get("_streams"):
        return *square_tile(target, product(op["dims"][d] for d in roles.m), WIDE), 1
    dtype = element_type(op.result.type)
    if op.attributes.get(EXCHANGED):
        return target.lanes(dtype.bits), target.lanes(dtype.bits), 1
    m, n, k = (product(op["dims"][d] for d in dims) for dims in (roles.m, roles.n, roles.k))
    rows, columns, depth = gemm_tile(target, m, n, k, bits=dtype.bits)
    if isinstance(n, int) and n < columns and all(element_type(v.type) == dtype and dtype.is_float for v in op.operands):
        columns = _without_half(n, columns, target.lanes(dtype.bits))
    return rows, columns, depth


def _without_half(n: int, columns: int, lanes: int) -> int:
    """The columns of the only panel: exactly `n` where those fill half of the last vector or less. Half of a vector of 512 bits takes half as long
    where the multiply-adds are two of 256 bits each."""
    rest = n % lanes
    return n if lanes >= HALVED and n > lanes and 0 < rest <= lanes // 2 and rest & (rest - 1) == 0 else columns


HALVED = 16
"""Lanes from which on a narrower last vector pays."""


WIDE = 1 << 20
"""Columns enough for whole panels: a stream's are all of one width."""


def gemm_tile(target: Target, m: Dim, n: Dim, k: Dim, *, bits: int = 32) -> tuple[int, int, int]:
    """(rows, columns, K step) of one register tile of a CPU; `bits` are those of an accumulator."""
    lanes = max(1, target.lanes(bits))
    rows, vectors = _register_tile(target.vector_registers, lanes, m if isinstance(m, int) else None, n if isinstance(n, int) else None)
    if isinstance(n, int) and n <= lanes // 2:
        return rows, max(1, 1 << (n - 1).bit_length()), 1
    return rows, vectors * lanes, 1


def fits_registers(target: Target, rows: int, columns: int, bits: int = 32) -> bool:
    """Accumulators, a row of B and one broadcast element of A fit the registers."""
    vectors = -(-columns // max(1, target.lanes(bits)))
    return rows * vectors + vectors + 1 <= target.vector_registers


MULTIPLY_ADDS, LATENCY = 2, 5
"""Vector multiply-adds that start per cycle, and cycles until the next one of the same sum starts (4, and one that scheduling loses)."""
LOAD_CYCLES = 0.15
"""What a load in the inner loop costs beside the multiply-adds: 10 for 24 of them (a tile of 6 x 4 vectors) some 5 % less than 14 (12 x 2)."""


@lru_cache(maxsize=256)
def _register_tile(registers: int, lanes: int, m: int | None, n: int | None) -> tuple[int, int]:
    """(rows, vectors) of the tile that takes fewest cycles per K for the whole product, partial tiles counted as whole ones.

    Accumulators, a row of B and one broadcast element of A fit the registers. Few rows that are done in one pass take wide tiles: such a
    product waits for memory or, with few accumulators, for its own multiply-adds.
    """
    best: tuple[float, float, tuple[int, int]] = (float("inf"), 0, (1, 1))
    four = lanes == 4 and registers >= 32  # Arm's multiply-add takes an element of a register: LLVM loads a row's four steps of K at once
    for rows in range(1, (14 if registers >= 32 else 6) + 1):
        for vectors in range(1, 9):
            wide = vectors > 4 and (m is None or m > rows)
            full = rows * vectors + vectors + (rows if four else 1) >= registers
            if full or wide or (n is not None and vectors > 1 and (vectors - 1) * lanes >= n):
                continue
            cycles = max(rows * vectors / MULTIPLY_ADDS, LATENCY) + LOAD_CYCLES * (rows + vectors)
            down = 1 / rows if m is None else -(-m // rows)
            across = 1 / vectors if n is None else -(-n // (vectors * lanes))
            best = min(best, (round(down * across * cycles, 9), down, (rows, vectors)))  # of equals, that which passes a panel least often
    return best[2]


def square_tile(target: Target, m: Dim, n: Dim) -> tuple[int, int]:
    """(rows, columns) of a tile for products that are used at once, as rows and as columns: attention's, say."""
    lanes = target.lanes(32)
    if target.vector_registers >= 32:
        rows, columns = (12, 2 * lanes) if target.vector_bits >= 512 else (8, 3 * lanes)
    else:
        rows, columns = 6, 2 * lanes
    if isinstance(n, int) and n < columns:
        columns = max(1, -(-n // lanes)) * lanes if n > lanes // 2 else max(1, 1 << (n - 1).bit_length())
    if isinstance(m, int):
        passes = -(-m // rows)
        rows = max(1, -(-m // passes))  # even tiles: 16 rows are two of 8, not 12 and 4
    return rows, columns
