"""Index expressions that split and join dimensions, as reshapes do: which dimensions they run through, and their inverse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..ir import Dim, sym
from ..ir.expr import free_symbols, product, substitute
from ..ir.ranges import contiguous_linear, delinearize, simplify, split_linear

__all__ = ["digits_of", "inverted", "matched", "whole_of"]


def digits_of(linear: Dim, sizes: Mapping[str, Dim]) -> list[str] | None:
    """The variables of which `linear` is the row-major number, outermost first: i*6 + j of sizes {i: 5, j: 6} gives [i, j]. Those of size 1 do not
    count. None if it is no such number."""
    rest = substitute(linear, {s: 0 for s in free_symbols(linear) if s in sizes and sizes[s] == 1})
    left = set(free_symbols(rest) & sizes.keys())
    coefficients = {}
    for variable in left:
        split = split_linear(rest, variable)
        if split is None:
            return None
        coefficients[variable], rest = split
    if rest != 0:
        return None
    found: list[str] = []
    step: Dim = 1
    while left:
        name = next((s for s in left if coefficients[s] == step), None)
        if name is None:
            return None
        found.insert(0, name)
        left.discard(name)
        step = step * sizes[name]
    return found


def whole_of(at: Sequence[Dim], shape: Sequence[Dim], sizes: Mapping[str, Dim]) -> set[str] | None:
    """The variables that must run through their `sizes` for `at` to meet each element of `shape` once; None if it does not."""
    digits = digits_of(simplify(contiguous_linear(at, shape), _bounds(sizes)), sizes)
    if digits is None or product(sizes[s] for s in digits) != product(shape):
        return None
    return set(digits)


def inverted(m: Sequence[Dim], dims: Sequence[Dim], at: Sequence[Dim], shape: Sequence[Dim]) -> dict[int, Dim] | None:
    """Where a reader with space `dims` stands when it reads element `at` of `shape` through `m`: an expression per dimension that `m` uses."""
    sizes = {f"d{j}": n for j, n in enumerate(dims)}
    place: dict[int, Dim] = {}
    for e, x, n in zip(m, at, shape, strict=True):
        digits = [str(e)] if str(e) in sizes else digits_of(simplify(e, _bounds(sizes)), sizes)
        if digits is None or product(sizes[d] for d in digits) != n:
            return None
        for d, part in zip(digits, delinearize(x, [sizes[d] for d in digits]), strict=True):
            if place.setdefault(int(d[1:]), part) != part:
                return None
    return place


def matched(m: Sequence[Dim], dims: Sequence[Dim], at: Sequence[Dim], shape: Sequence[Dim], sizes: Mapping[str, Dim]) -> dict[int, Dim] | None:
    """The same where `m` may split dimensions of the reader: both it and `at` (over variables of `sizes`) must run through all of `shape`."""
    own = {f"d{j}": n for j, n in enumerate(dims)}
    mine = digits_of(simplify(contiguous_linear(m, shape), _bounds(own)), own)
    theirs = digits_of(simplify(contiguous_linear(at, shape), _bounds(sizes)), sizes)
    if mine is None or theirs is None:
        return None
    place: dict[int, Dim] = {}
    while mine and theirs:  # from the innermost: groups of equal size
        a, b = [mine.pop()], [theirs.pop()]
        while (size := product(own[d] for d in a)) != (other := product(sizes[f] for f in b)):
            if not isinstance(size, int) or not isinstance(other, int):
                return None
            side, source = (a, mine) if size < other else (b, theirs)
            if not source:
                return None
            side.insert(0, source.pop())
        number = contiguous_linear([sym(f) for f in b], [sizes[f] for f in b])
        for d, part in zip(a, delinearize(number, [own[d] for d in a]), strict=True):
            place[int(d[1:])] = simplify(part, _bounds(sizes))
    return None if mine or theirs else place


def _bounds(sizes: Mapping[str, Dim]) -> dict[str, tuple[Dim, Dim | None]]:
    return {s: (0, n - 1) for s, n in sizes.items()}
