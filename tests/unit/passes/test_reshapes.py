"""Index expressions of reshapes: the dimensions that they run through and their inverse, by trying every point."""

from __future__ import annotations

import itertools

from aicc.ir import Dim, sym
from aicc.ir.expr import evaluate, floordiv, mod
from aicc.ir.ranges import delinearize
from aicc.passes.reshapes import digits_of, inverted, matched, whole_of

D = [sym(f"d{k}") for k in range(4)]
F, G, H = sym("f"), sym("g"), sym("h")


def points(*sizes: int) -> list[tuple[int, ...]]:
    return list(itertools.product(*(range(n) for n in sizes)))


def test_digits() -> None:
    sizes: dict[str, Dim] = {"f": 3, "g": 4, "h": 1}
    assert digits_of(F * 4 + G, sizes) == ["f", "g"]
    assert digits_of(G * 3 + F + H * 12, sizes) == ["g", "f"]
    assert digits_of(F * 5 + G, sizes) is None and digits_of(F * 4 + G + 1, sizes) is None


def test_whole() -> None:
    sizes: dict[str, Dim] = {"f": 6, "g": 4}
    assert whole_of([floordiv(F, 3), mod(F, 3), G], [2, 3, 4], sizes) == {"f", "g"}
    assert whole_of([floordiv(F, 3), G], [2, 4], sizes) is None
    assert whole_of([F, G], [7, 4], sizes) is None
    n = sym("s0")
    assert whole_of([F, G], [6, n], {"f": 6, "g": n}) == {"f", "g"}


def test_inverse_of_a_joining_read() -> None:
    """A reader of [2, 3, 4] sees [6, 4] through d0 * 3 + d1."""
    place = inverted([D[0] * 3 + D[1], D[2]], [2, 3, 4], [F, G], [6, 4])
    assert place is not None
    for f, g in points(6, 4):
        a, b, c = (evaluate(place[d], {"f": f, "g": g}) for d in range(3))
        assert (a * 3 + b, c) == (f, g)
    assert inverted([D[0] * 3 + D[1], D[2]], [2, 2, 4], [F, G], [6, 4]) is None


def test_matching_a_splitting_read() -> None:
    """A reader of [6, 4] sees [2, 3, 4] through d0 // 3, d0 % 3; the value stands at (f, g // 4, g % 4)."""
    sizes: dict[str, Dim] = {"f": 2, "g": 12}
    at = [F, floordiv(G, 4), mod(G, 4)]
    for m, dims in (([floordiv(D[0], 3), mod(D[0], 3), D[1]], [6, 4]), ([D[0], *delinearize(D[1], [3, 4])], [2, 12]), (D[:3], [2, 3, 4])):
        place = matched(m, dims, at, [2, 3, 4], sizes)
        assert place is not None
        for f, g in points(2, 12):
            values = {"f": f, "g": g}
            d = {f"d{k}": evaluate(e, values) for k, e in place.items()}
            assert [evaluate(e, d) for e in m] == [evaluate(e, values) for e in at]
    assert matched([D[0], D[1]], [6, 4], at[:2], [2, 3], sizes) is None
