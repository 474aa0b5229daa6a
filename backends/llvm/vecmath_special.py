"""Error functions, gamma functions and the operations that need exact integer or float64 care, as vector IR.

float32 erf and erfinv are polynomials, erfc one in float64; lgamma and digamma compute in float64 (with the C library's
`lgamma`, or `log` and `tan`, lane by lane) and round once; fmod is exact by a float64 quotient, with a cold loop over
`fmodf` for vectors where a quotient exceeds 2^27.  Coefficients come from `benchmarks/minimax.py`.

Instructions per vector as compiled for AVX2 / AVX-512: erf 42/37, erfc 106/79 and erfinv 63/59, hypot 20, fmod 33/29
(cold loop aside), remainder 40/34, nextafter 15/13.  In float64 halves: erfc, fmod and hypot (two divisions or roots).
"""

from __future__ import annotations

import math

from llvmlite import ir

from .lanes import Lanes
from .vecmath_exp import INF, NAN, exp2_double, exp_normal, log_positive

ERF_SMALL = (0.128379151, -0.376124889, 0.11281731, -0.0267629623, 0.00498734089, -0.000595949823)
ERF_LARGE = (-0.12864849, -0.635151327, -0.106236845, 0.0237620194, -0.0036424296, 0.000322794047, -1.1230034e-05)
ERFC = (
    0.197483018, 0.197152227, 0.187793672, 0.151667178, 0.144716859, 0.0893814042, -0.0304353442, 0.183435664,
    -0.159741029, 0.0385463573,
)  # fmt: skip
ERFINV_CENTRE = (
    1.50140941, 0.24664028, -0.0041776686, -0.00125275564, 0.000218577377, -4.94347387e-06, -3.52364395e-06,
    4.5995219e-07, 2.81835977e-08, -8.2373619e-09,
)  # fmt: skip
ERFINV_TAIL = (
    2.83297682, 1.00167513, 0.00944516994, -0.00763937039, 0.00568654248, -0.00358963269, 0.0014874459,
    -6.82121972e-05, -0.000311806129, 0.000121675934,
)  # fmt: skip


# -- error functions -------------------------------------------------------------------------------------------------


def erf(m: Lanes, x: ir.Value) -> ir.Value:
    """x + x q(x^2) near zero, 1 - exp(p(|x|)) beyond 0.93 (after N. Juffa, erff)."""
    if not m.single:
        return m.libm("erf", x)
    near = m.fma(m.horner(m.mul(x, x), ERF_SMALL), x, x)
    a = m.abs(x)
    t = m.min(a, 3.95)
    s = m.mul(t, t)
    # erf rounds to 1 from 3.92 on.
    far = m.sub(1.0, exp_normal(m, m.fma(m.estrin(t, s, ERF_LARGE), t, m.neg(t))))
    return m.select(m.cmp(">", a, 0.93), m.copysign(far, x), near)


def erfc(m: Lanes, x: ir.Value) -> ir.Value:
    """exp(-a^2) u q(u) with u = 1 / (1 + 0.35 a), a = |x|, in float64; reflected for negative x."""
    if not m.single:
        return m.libm("erfc", x)
    d = m.double()
    a = m.b.fpext(m.min(m.abs(x), 10.1), d.type)
    u = d.div(1.0, d.fma(a, 0.35, 1.0))
    gauss = exp2_double(d, d.mul(d.mul(a, a), -1.0 / math.log(2.0)))
    y = d.mul(d.mul(d.horner(u, ERFC), u), gauss)
    return m.b.fptrunc(d.select(m.cmp("<", x, 0.0), d.sub(2.0, y), y), m.type)


def erfinv(m: Lanes, x: ir.Value) -> ir.Value:
    """Inverse of erf on [-1, 1]: x times a polynomial in w = -log(1 - x^2) or its root (after M. Giles, 2010).

    float64 refines a coarser start by three steps of Halley's iteration.
    """
    if not m.single:
        return _erfinv_double(m, x)
    a = m.abs(x)
    w = m.neg(log_positive(m, m.fma(m.neg(x), x, 1.0)))
    centre = m.horner(m.sub(w, 2.5), ERFINV_CENTRE)
    tail = m.horner(m.sub(m.sqrt(w), 3.0), ERFINV_TAIL)
    y = m.mul(x, m.select(m.cmp("<", w, 5.0), centre, tail))
    return _erfinv_ends(m, x, a, y)


def _erfinv_ends(m: Lanes, x: ir.Value, a: ir.Value, y: ir.Value) -> ir.Value:
    """y inside (-1, 1), +-inf at the ends, NaN beyond."""
    return m.select(m.cmp("<", a, 1.0), y, m.copysign(m.select(m.cmp("==", a, 1.0), INF, NAN), x))


def _erfinv_double(m: Lanes, x: ir.Value) -> ir.Value:
    a = m.abs(x)
    tail_mass = m.sub(1.0, a)
    w = m.neg(m.libm("log", m.mul(tail_mass, m.add(a, 1.0))))
    # Tail start: erfc(z) ~ exp(-z^2) / (z sqrt(pi)) solved for z once.
    far = m.sqrt(m.add(m.sub(w, m.mul(m.libm("log", m.max(w, 1.0)), 0.5)), math.log(2.0 / math.sqrt(math.pi))))
    z = m.select(m.cmp("<", w, 5.0), m.mul(a, m.horner(m.sub(w, 2.5), ERFINV_CENTRE)), far)
    small = m.cmp("<", a, 0.5)
    for _ in range(3):
        excess = m.select(small, m.sub(a, m.libm("erf", z)), m.sub(m.libm("erfc", z), tail_mass))
        step = m.mul(excess, m.mul(m.libm("exp", m.mul(z, z)), math.sqrt(math.pi) / 2))
        z = m.add(z, m.div(step, m.fma(step, z, 1.0)))
    return _erfinv_ends(m, x, a, m.copysign(z, x))


# -- gamma functions -------------------------------------------------------------------------------------------------


def lgamma(m: Lanes, x: ir.Value) -> ir.Value:
    """log|Gamma(x)|, by the C library's float64 function."""
    if not m.single:
        return m.libm("lgamma", x)
    d = m.double()
    return m.b.fptrunc(d.libm("lgamma", m.b.fpext(x, d.type)), m.type)


def _rising_factorial(terms: int) -> tuple[float, ...]:
    """Coefficients of y (y + 1) ... (y + terms - 1), lowest first."""
    coefficients = [1.0]
    for k in range(terms):
        coefficients = [
            k * low + high for low, high in zip([*coefficients, 0.0], [0.0, *coefficients])
        ]
    return tuple(coefficients)


SHIFT = 10
RISING = _rising_factorial(SHIFT)
RISING_DERIVATIVE = tuple(k * c for k, c in enumerate(RISING))[1:]
# B_2k / 2k of psi(z) ~ log z - 1/(2z) - sum B_2k / (2k z^2k).
BERNOULLI = (1 / 12, -1 / 120, 1 / 252, -1 / 240, 1 / 132, -691 / 32760, 1 / 12)


def digamma(m: Lanes, x: ir.Value) -> ir.Value:
    """psi(x) = Gamma'(x) / Gamma(x); -inf at +0, +inf at -0, NaN at negative integers, as torch.

    The asymptotic series at z >= 10, reached from below by psi(y) = psi(y + 10) - D'(y) / D(y), D the rising factorial;
    reflection psi(x) = psi(1 - x) - pi / tan(pi x) for negative x.
    """
    if m.single:
        d = m.double()
        return m.b.fptrunc(digamma(d, m.b.fpext(x, d.type)), m.type)
    negative = m.cmp("<", x, 0.0)
    y = m.select(negative, m.sub(1.0, x), x)
    shifted = m.cmp("<", y, float(SHIFT))
    z = m.select(shifted, m.add(y, float(SHIFT)), y)
    inverse = m.div(1.0, z)
    inverse2 = m.mul(inverse, inverse)
    series = m.fma(inverse2, m.horner(inverse2, BERNOULLI), m.mul(inverse, 0.5))
    psi = m.sub(m.libm("log", z), series)
    psi = m.sub(psi, m.select(shifted, m.div(m.horner(y, RISING_DERIVATIVE), m.horner(y, RISING)), 0.0))
    fraction = m.sub(x, m.intrinsic("rint", x))
    reflected = m.sub(psi, m.div(math.pi, m.libm("tan", m.mul(fraction, math.pi))))
    reflected = m.select(m.cmp("==", fraction, 0.0), NAN, reflected)
    psi = m.select(negative, reflected, psi)
    return m.select(m.cmp("==", x, 0.0), m.copysign(INF, m.neg(x)), psi)


# -- remainders, hypot, nextafter ------------------------------------------------------------------------------------


def fmod(m: Lanes, x: ir.Value, y: ir.Value) -> ir.Value:
    """x - y trunc(x / y), exact, with the sign of x; NaN for y = 0 and for infinite x."""
    if not m.single:
        return m.libm("fmod", x, y)
    d = m.double()
    ax, ay = m.abs(x), m.abs(y)
    dx, dy = m.b.fpext(ax, d.type), m.b.fpext(ay, d.type)
    quotient = d.intrinsic("trunc", d.div(dx, dy))
    rest = d.fma(d.neg(quotient), dy, dx)
    # The float64 division may have rounded up to the next integer.
    rest = d.select(d.cmp("<", rest, 0.0), d.add(rest, dy), rest)
    r = m.select(m.cmp("<", ax, ay), ax, m.b.fptrunc(rest, m.type))
    return m.patch_lanes(d.cmp(">", quotient, 2.0**27), m.copysign(r, x), "fmodf", x, y)


def remainder(m: Lanes, x: ir.Value, y: ir.Value) -> ir.Value:
    """fmod moved by y where its sign is not that of y: Python's %, as torch.remainder."""
    r = fmod(m, x, y)
    opposite = m.b.xor(m.cmp("<", r, 0.0), m.cmp("<", y, 0.0))
    moved = m.b.and_(opposite, m.b.fcmp_unordered("!=", r, m.f(0.0)))
    return m.select(moved, m.add(r, y), r)


def hypot(m: Lanes, x: ir.Value, y: ir.Value) -> ir.Value:
    """sqrt(x^2 + y^2) without overflow; inf if either is infinite, even beside a NaN."""
    if not m.single:
        return m.libm("hypot", x, y)
    d = m.double()
    dx, dy = m.b.fpext(x, d.type), m.b.fpext(y, d.type)
    r = m.b.fptrunc(d.sqrt(d.fma(dx, dx, d.mul(dy, dy))), m.type)
    infinite = m.b.or_(m.cmp("==", m.abs(x), INF), m.cmp("==", m.abs(y), INF))
    return m.select(infinite, INF, r)


def nextafter(m: Lanes, x: ir.Value, y: ir.Value) -> ir.Value:
    """The neighbour of x in the direction of y; y itself if they are equal, NaN if either is."""
    bits = m.bits(x)
    # Bit patterns grow with magnitude: away from zero adds one.
    outward = m.b.xor(m.cmp("<", x, y), m.cmp("<", x, 0.0))
    stepped = m.from_bits(m.b.select(outward, m.iadd(bits, 1), m.isub(bits, 1)))
    smallest = 2.0**-149 if m.single else 2.0**-1074
    r = m.select(m.cmp("==", x, 0.0), m.copysign(smallest, y), stepped)
    r = m.select(m.cmp("==", x, y), y, r)
    return m.select(m.b.fcmp_unordered("uno", x, y), m.add(x, y), r)
