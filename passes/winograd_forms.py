"""The numbers of Winograd's convolutions along one dimension: F(m, 3) makes m neighbouring outputs of three taps from m + 2 products.

    y = A ((G g) * (B x))        with x[0 .. m+1] the inputs, g the three taps, y[0 .. m-1]

B, G and A come from evaluating polynomials at m + 1 points and at infinity (Toom and Cook; Lavin and Gray, 2016, section 5.1). The points decide the
rounding: F(4, 3) at the usual 0, 1, -1, 2, -2 is 7 to 9 times as far from float64 as eager, at 0 and +-11/16, +-11/8 less than twice (`NOISE`). Both
pairs are exact in binary, and so are B and A; G is applied in double precision.

A row of a matrix has few nonzeros. `Sparse` says how to sum it with as few reads as the fullest row has: read k of row r is at `column(k, r)`,
an affine expression with divisions, and is multiplied by `table[r][k]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

from ..ir import Dim
from ..ir.expr import floordiv

__all__ = ["TAPS", "Form", "Sparse", "form", "noise"]

TAPS = 3
POINTS: dict[int, tuple[Fraction, ...]] = {
    2: (Fraction(0), Fraction(1), Fraction(-1)),
    4: (Fraction(0), Fraction(11, 16), Fraction(-11, 16), Fraction(11, 8), Fraction(-11, 8))}
NOISE = {(2,): 1.0, (4,): 1.8, (2, 2): 0.8, (2, 4): 1.6, (4, 2): 1.6, (4, 4): 2.4}
"""Distance from float64 over eager's (root mean square; 32 channels, where it is largest), by the outputs along each dimension, on AVX2."""
NEARER = 2.4
"""With vectors of 512 bits eager's library (oneDNN, torch 2.11) is nearer to float64, and each form farther from eager by at most this factor."""


def noise(outputs: tuple[int, ...], lanes: int) -> float:
    """Distance from float64 over eager's on a processor with `lanes` float32 numbers in a vector."""
    return NOISE[outputs] * (NEARER if lanes >= 16 else 1)


@dataclass(frozen=True)
class Sparse:
    """A matrix as sums of a few reads: `columns[r][k]` and `table[r][k]`, the number of the column and its factor."""

    columns: tuple[tuple[int, ...], ...]
    table: tuple[tuple[float, ...], ...]

    @property
    def reads(self) -> int:
        return len(self.table[0])

    def column(self, k: int, row: Dim) -> Dim:
        """Which column read k of row `row` is at, for 0 <= row < the number of rows."""
        rows = len(self.columns)
        at: Dim = self.columns[0][k]
        for r in range(1, rows):
            step = self.columns[r][k] - self.columns[r - 1][k]
            at = at + floordiv(row + (rows - r), rows) * step if step else at  # 1 from row r on
        return at


@dataclass(frozen=True)
class Form:
    """F(outputs, 3): the three matrices, `taps` dense."""

    outputs: int
    inputs: Sparse
    taps: tuple[tuple[float, ...], ...]
    results: Sparse

    @property
    def products(self) -> int:
        return self.outputs + TAPS - 1


@cache
def form(outputs: int) -> Form:
    """F(outputs, 3), outputs 2 or 4."""
    points = POINTS[outputs]
    whole = _product([[-p, Fraction(1)] for p in points])
    inputs, taps = [], []
    for i, p in enumerate(points):
        row = [*_product([[-q, Fraction(1)] for j, q in enumerate(points) if j != i]), Fraction(0)]
        scale = Fraction(1)
        for j, q in enumerate(points):
            scale *= p - q if j != i else 1
        size = sum(abs(x) for x in row)
        power = Fraction(1)  # of two: the numbers that are multiplied are about as large as the inputs
        while size / power >= 2:
            power *= 2
        while size / power < 1:
            power /= 2
        inputs.append([x / power for x in row])
        taps.append([p ** k / scale * power for k in range(TAPS)])
    inputs.append(whole)
    taps.append([Fraction(0)] * (TAPS - 1) + [Fraction(1)])
    results = [[p ** r for p in points] + [Fraction(r == outputs - 1)] for r in range(outputs)]
    return Form(outputs, _sparse(inputs), tuple(tuple(map(float, row)) for row in taps), _sparse(results))


def _product(factors: Sequence[list[Fraction]]) -> list[Fraction]:
    """Coefficients of a product of polynomials, the constant one first."""
    result = [Fraction(1)]
    for f in factors:
        longer = [Fraction(0)] * (len(result) + len(f) - 1)
        for i, a in enumerate(result):
            for j, b in enumerate(f):
                longer[i + j] += a * b
        result = longer
    return result


def _sparse(matrix: Sequence[Sequence[Fraction]]) -> Sparse:
    """A column stays at the same read from row to row where it can, so that columns are simple functions of the row."""
    reads = max(sum(x != 0 for x in row) for row in matrix)
    columns: list[list[int]] = []
    for row in matrix:
        wanted = [c for c, x in enumerate(row) if x]
        before = columns[-1] if columns else wanted + wanted[:1] * (reads - len(wanted))
        kept = [c if c in wanted else None for c in before]
        kept = [c if c not in kept[:i] else None for i, c in enumerate(kept)]  # a column that filled an empty place
        missing = [c for c in wanted if c not in kept]
        columns.append([c if c is not None else missing.pop(0) if missing else before[i] for i, c in enumerate(kept)])
    table = []
    for row, at in zip(matrix, columns, strict=True):
        table.append(tuple(float(row[c]) if c not in at[:i] else 0.0 for i, c in enumerate(at)))
    return Sparse(tuple(map(tuple, columns)), tuple(table))
