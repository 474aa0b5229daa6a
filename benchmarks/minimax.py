"""Where the polynomial coefficients in `backends/llvm/vecmath*.py` come from: weighted minimax fits by Lawson iteration.

`solve` finds the polynomial p of given degree that minimises max |w(x) * (g(x) - p(x))| on [lo, hi], then rounds its
coefficients to the working precision one by one, lowest first, refitting the others after each rounding, so that the
rounded set stays close to optimal.  Sources: Lawson (1961), reweighted least squares; the stepwise rounding is a greedy
form of Brisebarre, Muller and Tisserand, "Computing machine-efficient polynomial approximations", ACM TOMS 32(2), 2006.

Run `python benchmarks/minimax.py [name ...]` to print coefficients (lowest degree first) and the weighted error as log2.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import mpmath as mp
import numpy as np

Real = Callable[[mp.mpf], mp.mpf]
mp.mp.dps = 40


@dataclass(frozen=True)
class Fit:
    """One approximation problem: g on [lo, hi] by a polynomial of `degree`, errors weighted by `weight`.

    `single` rounds the coefficients to float32, otherwise to float64.
    """

    g: Real
    weight: Real
    lo: float
    hi: float
    degree: int
    single: bool = True


@dataclass(frozen=True)
class Rational:
    """f on [-high, high], odd, as x p(x^2) / q(x^2) with polynomials of degree `p` and `q`, by relative error."""

    f: Real
    high: float
    p: int
    q: int


def _evaluate(coefficients: list[mp.mpf], x: mp.mpf) -> mp.mpf:
    total = mp.mpf(0)
    for c in reversed(coefficients):
        total = total * x + c
    return total


def _correction(xs: np.ndarray, ws: np.ndarray, error: np.ndarray, first: int, degree: int) -> np.ndarray:
    """Near-minimax update d of the coefficients first..degree: minimises max |ws * (error - sum d_k xs^k)| (Lawson)."""
    basis, upper = np.linalg.qr(ws[:, None] * xs[:, None] ** np.arange(first, degree + 1))
    target = ws * error
    scale = np.abs(target).max()
    target = target / scale
    lawson = np.full(len(xs), 1.0 / len(xs))
    best, best_error = np.zeros(degree + 1 - first), 1.0
    for _ in range(400):
        root = np.sqrt(lawson)
        solution = np.linalg.lstsq(root[:, None] * basis, root * target, rcond=None)[0]
        residual = np.abs(target - basis @ solution)
        if residual.max() < best_error:
            best, best_error = solution, residual.max()
        lawson = lawson * residual
        lawson /= lawson.sum()
    return np.linalg.solve(upper, best) * scale


def solve(fit: Fit, points: int = 800) -> tuple[list[float], float]:
    """(rounded coefficients, lowest degree first; log2 of the largest weighted error)."""
    lo, hi = mp.mpf(fit.lo), mp.mpf(fit.hi)

    def chebyshev(count: int) -> list[mp.mpf]:
        # Open at both ends: g may be 0/0 there.
        return [lo + (hi - lo) * (1 - mp.cos(mp.pi * (i + mp.mpf(1) / 2) / count)) / 2 for i in range(count)]

    nodes = chebyshev(fit.degree + 1)
    start = mp.lu_solve(mp.matrix([[x**k for k in range(fit.degree + 1)] for x in nodes]), mp.matrix([fit.g(x) for x in nodes]))
    coefficients = [start[k] for k in range(fit.degree + 1)]
    xs = chebyshev(points)
    gs, ws = [fit.g(x) for x in xs], [fit.weight(x) for x in xs]
    grid, weights = np.array(xs, dtype=np.float64), np.array([abs(w) for w in ws], dtype=np.float64)

    def errors() -> np.ndarray:
        return np.array([g - _evaluate(coefficients, x) for x, g in zip(xs, gs)], dtype=np.float64)

    for first in range(fit.degree + 1):
        for k, d in enumerate(_correction(grid, weights, errors(), first, fit.degree)):
            coefficients[first + k] += mp.mpf(d)
        nearest = float(coefficients[first])
        coefficients[first] = mp.mpf(float(np.float32(nearest)) if fit.single else nearest)
    return [float(c) for c in coefficients], float(np.log2(np.max(weights * np.abs(errors()))))


def _erfcx(u: mp.mpf) -> mp.mpf:
    """exp(a^2) erfc(a) at u = 1 / (1 + 0.35 a)."""
    a = (1 / u - 1) / mp.mpf(0.35)
    return mp.exp(a * a) * mp.erfc(a)


def _erfinv_ratio(w: mp.mpf) -> mp.mpf:
    """erfinv(a) / a for the a > 0 with w = -log(1 - a^2), by Halley's iteration on the well-conditioned side."""
    a = mp.sqrt(-mp.expm1(-w))
    z = mp.sqrt(w) * 0.8 + 0.2 if w > 1 else a * 0.886
    for _ in range(60):
        excess = mp.erfc(z) - mp.exp(-w) / (1 + a) if w > 1 else a - mp.erf(z)
        step = excess / (2 / mp.sqrt(mp.pi) * mp.exp(-z * z))
        z += step / (1 + step * z)
        if abs(step) < mp.mpf(10) ** -35:
            break
    return z / a


HALF_LN2 = 0.34657
SQRT_HALF, SQRT_TWO = 0.70710, 1.41422
QUARTER_PI = 0.7854

FITS: dict[str, Fit] = {
    # exp(r) = 1 + r + r^2 q(r)
    "exp": Fit(lambda r: (mp.expm1(r) - r) / r**2, lambda r: r**2 / mp.exp(r), -HALF_LN2, HALF_LN2 + 0.0001, 4),
    "expm1": Fit(lambda r: (mp.expm1(r) - r) / r**2, lambda r: r**2 / mp.expm1(r), -HALF_LN2, HALF_LN2 + 0.0001, 5),
    # 2^r = 1 + r q(r)
    "exp2": Fit(lambda r: mp.expm1(r * mp.log(2)) / r, lambda r: r / mp.power(2, r), -0.5, 0.5001, 5),
    # sinh(r) = r + r^3 q(r^2), cosh(r) = 1 + r^2 q(r^2)
    "sinh": Fit(
        lambda s: (mp.sinh(mp.sqrt(s)) / mp.sqrt(s) - 1) / s, lambda s: s * mp.sqrt(s) / mp.sinh(mp.sqrt(s)), 0, 0.1203, 2
    ),
    "cosh": Fit(lambda s: (mp.cosh(mp.sqrt(s)) - 1) / s, lambda s: s / mp.cosh(mp.sqrt(s)), 0, 0.1203, 2),
    # log(1 + f) = f - f^2/2 + f^3 q(f)
    "log": Fit(
        lambda f: (mp.log1p(f) - f + f**2 / 2) / f**3, lambda f: f**3 / mp.log1p(f), SQRT_HALF - 1, SQRT_TWO - 1, 8
    ),
    # sin(r) = r + r^3 q(r^2), cos(r) = 1 - r^2/2 + r^4 q(r^2), tan(r) = r + r^3 q(r^2)
    "sin": Fit(
        lambda s: (mp.sin(mp.sqrt(s)) / mp.sqrt(s) - 1) / s, lambda s: s * mp.sqrt(s) / mp.sin(mp.sqrt(s)), 0, 0.64, 2
    ),
    "cos": Fit(lambda s: (mp.cos(mp.sqrt(s)) - 1 + s / 2) / s**2, lambda s: s**2 / mp.cos(mp.sqrt(s)), 0, 0.64, 2),
    "tan": Fit(
        lambda s: (mp.tan(mp.sqrt(s)) / mp.sqrt(s) - 1) / s, lambda s: s * mp.sqrt(s) / mp.tan(mp.sqrt(s)), 0, 0.64, 5
    ),
    # atan(t) = t + t^3 q(t^2), t in [0, 1]; asin(t) = t + t^3 q(t^2), t in [0, 1/2]
    "atan": Fit(
        lambda s: (mp.atan(mp.sqrt(s)) / mp.sqrt(s) - 1) / s, lambda s: s * mp.sqrt(s) / mp.atan(mp.sqrt(s)), 0, 1, 7
    ),
    "asin": Fit(
        lambda s: (mp.asin(mp.sqrt(s)) / mp.sqrt(s) - 1) / s, lambda s: s * mp.sqrt(s) / mp.asin(mp.sqrt(s)), 0, 0.2501, 4
    ),
    # erf(x) = x + x q(x^2) for |x| < 0.93; erf(t) = 1 - exp(-t + t q(t)) above
    "erf_small": Fit(
        lambda s: mp.erf(mp.sqrt(s)) / mp.sqrt(s) - 1, lambda s: mp.sqrt(s) / mp.erf(mp.sqrt(s)), 0, 0.8650, 5
    ),
    "erf_large": Fit(
        lambda t: (mp.log(mp.erfc(t)) + t) / t, lambda t: t * mp.erfc(t) / mp.erf(t), 0.92, 3.95, 6
    ),
    # erfc(a) = exp(-a^2) u q(u), u = 1 / (1 + 0.35 a)
    "erfc": Fit(lambda u: _erfcx(u) / u, lambda u: u / _erfcx(u), 1 / (1 + 0.35 * 10.1), 1.0, 9),
    # erfinv(x) = x q(w - 2.5) for w = -log(1 - x^2) < 5, x q(sqrt(w) - 3) above
    "erfinv_centre": Fit(lambda w: _erfinv_ratio(w + 2.5), lambda w: 1 / _erfinv_ratio(w + 2.5), -2.5, 2.5, 9),
    "erfinv_tail": Fit(lambda s: _erfinv_ratio((s + 3) ** 2), lambda s: 1 / _erfinv_ratio((s + 3) ** 2), -0.764, 1.05, 9),
    # float64 log2(1 + f) = f q(f) and 2^r, for float32 pow
    "pow_log2": Fit(
        lambda f: mp.log1p(f) / mp.log(2) / f, lambda f: f / mp.log1p(f), SQRT_HALF - 1, SQRT_TWO - 1, 12, single=False
    ),
    "pow_exp2": Fit(lambda r: mp.power(2, r), lambda r: 1 / mp.power(2, r), -0.5, 0.5, 6, single=False),
    # vecmath_fast.py: the same forms with fewer terms
    "fast_exp": Fit(lambda r: (mp.expm1(r) - r) / r**2, lambda r: r**2 / mp.exp(r), -HALF_LN2, HALF_LN2 + 0.0001, 3),
    "fast_exp2": Fit(lambda r: mp.expm1(r * mp.log(2)) / r, lambda r: r / mp.power(2, r), -0.5, 0.5001, 4),
    "fast_log": Fit(
        lambda f: (mp.log1p(f) - f + f**2 / 2) / f**3, lambda f: f**3 / mp.log1p(f), SQRT_HALF - 1, SQRT_TWO - 1, 6
    ),
}

RATIONALS: dict[str, Rational] = {
    # f(x) = x p(x^2) / q(x^2) with q(0) = 1, up to where f rounds to 1
    "fast_tanh": Rational(mp.tanh, 8.0, 5, 3),
    "fast_erf": Rational(mp.erf, 3.83, 5, 5),
}


def solve_rational(r: Rational, points: int = 3000, rounds: int = 600) -> tuple[list[float], list[float], float]:
    """(p, q, largest relative error): linearised least squares, weighted by the last denominator and by Lawson's rule."""
    x = np.abs(r.high * np.cos(np.pi * (np.arange(points) + 0.5) / points))
    x = x[x > 1e-3]
    ratio = np.array([float(r.f(mp.mpf(v)) / mp.mpf(v)) for v in x])
    u = (x / r.high) ** 2
    numerator, denominator = u[:, None] ** np.arange(r.p + 1), u[:, None] ** np.arange(1, r.q + 1)
    weights, last = np.ones(len(x)), np.ones(len(x))
    best: tuple[np.ndarray, np.ndarray, float] = (np.zeros(0), np.zeros(0), np.inf)
    for _ in range(rounds):
        scale = np.sqrt(weights) / (ratio * last)
        matrix = np.hstack([numerator, -ratio[:, None] * denominator]) * scale[:, None]
        norms = np.linalg.norm(matrix, axis=0)
        found = np.linalg.lstsq(matrix / norms, ratio * scale, rcond=None)[0] / norms
        p, q = found[: r.p + 1], np.concatenate([[1.0], found[r.p + 1 :]])
        last = np.abs(np.polyval(q[::-1], u))
        error = np.abs(np.polyval(p[::-1], u) / np.polyval(q[::-1], u) / ratio - 1)
        if error.max() < best[2]:
            best = p / r.high ** (2.0 * np.arange(len(p))), q / r.high ** (2.0 * np.arange(len(q))), float(error.max())
        weights = weights * (error / error.max() + 1e-3) ** 0.7
        weights /= weights.mean()
    return [float(c) for c in best[0]], [float(c) for c in best[1]], best[2]


def main(names: list[str]) -> None:
    for name in [n for n in names or RATIONALS if n in RATIONALS]:
        p, q, error = solve_rational(RATIONALS[name])
        print(f"{name}: relative error 2^{np.log2(error):.2f}")
        for part in (p, q):
            print("    (" + ", ".join(f"{c:.9g}" for c in part) + ")")
    for name in [n for n in names or FITS if n in FITS]:
        coefficients, error = solve(FITS[name])
        print(f"{name}: error 2^{error:.2f}")
        print("    (" + ", ".join(repr(c) if not FITS[name].single else f"{c:.9g}" for c in coefficients) + ")")


if __name__ == "__main__":
    main(sys.argv[1:])
