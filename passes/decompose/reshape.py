"""The index map of a reshape, with as few divisions as the sizes allow.

Both shapes are split, from the right, into common factors: [B*S, N] -> [B, S, N] has the factors B, S, N, and every index is a
sum or a quotient of factor indices. Only where neither of two sizes divides the other (2x6 -> 3x4) is the position
linearised over the result's dimensions and split again by the source's, and that just for the dimensions concerned.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...ir import Dim, Expr
from ...ir.expr import floordiv, mod, product
from .common import Map, d, simplified

__all__ = ["exact_quotient", "reshape_map"]


def exact_quotient(a: Dim, b: Dim) -> Dim | None:
    """`q` with a == q*b as polynomials with integer coefficients; None if there is none. b must not be 0."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if a % b == 0 else None
    if isinstance(b, int) or isinstance(a, int):
        whole = isinstance(a, Expr) and isinstance(b, int) and a.const % b == 0 and all(c % b == 0 for _, c in a.terms)
        return floordiv(a, b) if whole else None
    # Long division by the leading term; the order (degree, then atoms) is compatible with multiplication.
    quotient: Dim = 0
    lead_b, coefficient_b = _leading(b)
    while a != 0:
        lead_a, coefficient_a = _leading(a)
        rest = list(lead_a)
        for atom in lead_b:
            if atom not in rest:
                return None
            rest.remove(atom)
        if coefficient_a % coefficient_b:
            return None
        factor = coefficient_a // coefficient_b
        term: Dim = Expr(((tuple(rest), factor),), 0) if rest else factor
        quotient = quotient + term
        a = a - term * b
    return quotient


def _leading(e: Dim) -> tuple[tuple, int]:
    if isinstance(e, int):
        return (), e
    return max(e.terms, key=lambda t: (len(t[0]), tuple(a.key for a in t[0])))


class _Side:
    """One shape, consumed from the right: how much of the current dimension is left, and the stride already taken from it."""

    def __init__(self, shape: Sequence[Dim]):
        self.shape = [(i, size) for i, size in enumerate(shape) if size != 1]
        self.left: Dim = 1
        self.stride: Dim = 1
        self.dim = -1
        self.advance()

    def advance(self) -> None:
        """Goes on to the next dimension once the current one is used up."""
        if self.left == 1 and self.shape:
            self.dim, self.left = self.shape.pop()
            self.stride = 1

    @property
    def done(self) -> bool:
        return self.left == 1 and not self.shape

    def take(self, size: Dim, rest: Dim) -> tuple[int, Dim, bool]:
        """Takes a factor: its dimension, its stride there, and whether it is the leftmost of that dimension."""
        taken = self.dim, self.stride, rest == 1
        self.stride, self.left = self.stride * size, rest
        self.advance()
        return taken

    def pieces(self) -> list[Dim]:
        """All that is left, right to left."""
        return [self.left, *(size for _, size in reversed(self.shape))]


def reshape_map(source: tuple[Dim, ...], result: tuple[Dim, ...]) -> Map:
    """For each dimension of `source` the index read by result element d0, d1, ... of a row-major reshape."""
    if any(size == 0 for size in (*source, *result)):  # nothing is read: any map does, if it says so
        return (d(result.index(0)) if 0 in result else 0,) * len(source)
    out: list[Dim] = [0] * len(source)
    src, dst = _Side(source), _Side(result)

    def read(size: Dim, rest: Dim) -> Dim:
        dim, stride, leftmost = dst.take(size, rest)
        high = floordiv(d(dim), stride)
        return high if leftmost else mod(high, size)

    def write(position: Dim, size: Dim, rest: Dim) -> None:
        dim, stride, _ = src.take(size, rest)
        out[dim] = out[dim] + position * stride

    while not (src.done or dst.done):
        a, b = src.left, dst.left
        if (rest := exact_quotient(a, b)) is not None:
            write(read(b, 1), b, rest)
        elif (rest := exact_quotient(b, a)) is not None:
            write(read(a, rest), a, 1)
        else:
            ours, theirs = _matching(src.pieces(), dst.pieces())
            linear: Dim = 0
            stride: Dim = 1
            for size in theirs:
                linear = linear + read(size, 1) * stride
                stride = stride * size
            for i, size in enumerate(ours):
                position = linear if i == len(ours) - 1 else mod(linear, size)
                linear = floordiv(linear, size)
                write(position, size, 1)
    return simplified(out, result)


def _matching(a: list[Dim], b: list[Dim]) -> tuple[list[Dim], list[Dim]]:
    """The shortest non-empty prefixes of equal product; everything if no products are provably equal."""
    products = {product(b[:j]): j for j in range(len(b), 0, -1)}
    for i in range(1, len(a) + 1):
        j = products.get(product(a[:i]))
        if j is not None:
            return a[:i], b[:j]
    return a, b
