"""float32 trigonometry and its inverses, as inlined vector IR.  float64 lanes go to the C library.

sin, cos, tan: x = n pi/2 + r by three fused multiply-adds (Cody and Waite), which keeps r good to an ulp for
|x| <= 1e5; a vector that holds a larger finite lane branches to a cold loop over `sinf`, `cosf`, `tanf`, whose
results replace those lanes only.  Coefficients come from `benchmarks/minimax.py`.

Instructions per vector as compiled for AVX2 / AVX-512, cold loop aside: sin 28/26, cos 29/26, tan 26/23, asin 25/21,
acos 26/23, atan 25/20, atan2 35/32.  tan, atan and atan2 include one division, asin and acos a square root.
"""

from __future__ import annotations

import math

from llvmlite import ir

from .lanes import Lanes, split_single

MAGIC = 12582912.0
SIGN_BIT = 0x80000000
LARGE = 1.0e5

PI_2 = math.pi / 2
PI_2_HI, _REST = split_single(PI_2)
PI_2_MID, _ = split_single(_REST)
# pi/2 - PI_2_HI - PI_2_MID, whose digits are beyond float64's pi.
PI_2_LO = -1.7151245100059e-15
# c + c * PI_TAIL is a float32 multiple c of PI_2_HI corrected to that multiple of pi/2.
PI_TAIL = _REST / PI_2_HI

SIN = (-0.166666538, 0.00833209511, -0.0001950554)
COS = (0.0416666418, -0.00138871302, 2.44120856e-05)
TAN = (0.333331048, 0.133401617, 0.0532978028, 0.0248364247, 0.00246731145, 0.00977170933)
ATAN = (
    -0.333331525, 0.199937671, -0.142110035, 0.106657863, -0.0755172893, 0.0432059728, -0.0163642373, 0.00291975634,
)  # fmt: skip
ASIN = (0.166667521, 0.0749530643, 0.0454697721, 0.0241807755, 0.0421664044)


def _reduce_pi_2(m: Lanes, a: ir.Value) -> tuple[ir.Value, ir.Value]:
    """(r, z): a = n pi/2 + r, the integer n in the low bits of z, for 0 <= a <= LARGE."""
    z = m.fma(a, 1.0 / PI_2, MAGIC)
    n = m.sub(z, MAGIC)
    return m.fma(n, -PI_2_LO, m.fma(n, -PI_2_MID, m.fma(n, -PI_2_HI, a))), z


def _sin_poly(m: Lanes, r: ir.Value, r2: ir.Value) -> ir.Value:
    return m.fma(m.mul(r, r2), m.horner(r2, SIN), r)


def _cos_poly(m: Lanes, r2: ir.Value) -> ir.Value:
    return m.horner(r2, (1.0, -0.5, *COS))


def _flip_sign(m: Lanes, y: ir.Value, sign: ir.Value) -> ir.Value:
    """y negated where the integer `sign` has its top bit set."""
    return m.from_bits(m.ixor(m.bits(y), m.iand(sign, SIGN_BIT)))


def sin(m: Lanes, x: ir.Value) -> ir.Value:
    """Sine of x radians, any finite x; NaN at infinities."""
    if not m.single:
        return m.libm("sin", x)
    a = m.abs(x)
    r, z = _reduce_pi_2(m, a)
    n, r2 = m.bits(z), m.mul(r, r)
    y = m.select(m.is_set(n, 1), _cos_poly(m, r2), _sin_poly(m, r, r2))
    y = _flip_sign(m, y, m.ixor(m.shl(n, 30), m.bits(x)))
    return m.patch_lanes(m.cmp(">", a, LARGE), y, "sinf", x)


def cos(m: Lanes, x: ir.Value) -> ir.Value:
    """Cosine of x radians, any finite x; NaN at infinities."""
    if not m.single:
        return m.libm("cos", x)
    a = m.abs(x)
    r, z = _reduce_pi_2(m, a)
    n, r2 = m.bits(z), m.mul(r, r)
    y = m.select(m.is_set(n, 1), _sin_poly(m, r, r2), _cos_poly(m, r2))
    y = _flip_sign(m, y, m.shl(m.iadd(n, 1), 30))
    return m.patch_lanes(m.cmp(">", a, LARGE), y, "cosf", x)


def tan(m: Lanes, x: ir.Value) -> ir.Value:
    """Tangent of x radians, any finite x: tan(r), or -1/tan(r) in odd quadrants."""
    if not m.single:
        return m.libm("tan", x)
    a = m.abs(x)
    r, z = _reduce_pi_2(m, a)
    n, r2 = m.bits(z), m.mul(r, r)
    t = m.fma(m.mul(r, r2), m.horner(r2, TAN), r)
    y = m.select(m.is_set(n, 1), m.div(-1.0, t), t)
    y = _flip_sign(m, y, m.bits(x))
    return m.patch_lanes(m.cmp(">", a, LARGE), y, "tanf", x)


def _plus_multiple_of_pi_2(m: Lanes, c: ir.Value, p: ir.Value) -> ir.Value:
    """p plus the multiple of pi/2 whose rounded value (a multiple of PI_2_HI) is c."""
    return m.add(c, m.fma(c, PI_TAIL, p))


def _atan_poly(m: Lanes, t: ir.Value) -> ir.Value:
    """atan(t) for |t| <= 1."""
    t2 = m.mul(t, t)
    return m.fma(m.mul(t, t2), m.estrin(t2, m.mul(t2, t2), ATAN), t)


def atan(m: Lanes, x: ir.Value) -> ir.Value:
    """Arc tangent: pi/2 + atan(-1/|x|) above one."""
    if not m.single:
        return m.libm("atan", x)
    a = m.abs(x)
    steep = m.cmp(">", a, 1.0)
    p = _atan_poly(m, m.select(steep, m.div(-1.0, a), a))
    return m.copysign(_plus_multiple_of_pi_2(m, m.select(steep, PI_2_HI, 0.0), p), x)


def atan2(m: Lanes, y: ir.Value, x: ir.Value) -> ir.Value:
    """The angle of the point (x, y) in [-pi, pi]; zeros and infinities as C99."""
    if not m.single:
        return m.libm("atan2", y, x)
    ax, ay = m.abs(x), m.abs(y)
    steep = m.cmp(">", ay, ax)
    larger, smaller = m.select(steep, ay, ax), m.select(steep, ax, ay)
    # 0/0 counts as 0 and inf/inf as 1.
    tie = m.select(m.cmp("==", ax, 0.0), 0.0, 1.0)
    p = _atan_poly(m, m.select(m.cmp("==", ax, ay), tie, m.div(smaller, larger)))
    left = m.signbit(x)
    p = m.select(m.b.xor(steep, left), m.neg(p), p)
    c = m.select(steep, PI_2_HI, m.select(left, 2 * PI_2_HI, 0.0))
    return m.copysign(_plus_multiple_of_pi_2(m, c, p), y)


def _asin_parts(m: Lanes, a: ir.Value) -> tuple[ir.Value, ir.Value]:
    """(near one, p): asin(a) = p for a <= 1/2, pi/2 - p where `near one` (p = 2 asin(sqrt((1 - a) / 2)))."""
    near_one = m.cmp(">", a, 0.5)
    square = m.select(near_one, m.fma(a, -0.5, 0.5), m.mul(a, a))
    s = m.select(near_one, m.sqrt(square), a)
    p = m.fma(m.mul(s, square), m.horner(square, ASIN), s)
    return near_one, m.select(near_one, m.add(p, p), p)


def asin(m: Lanes, x: ir.Value) -> ir.Value:
    """Arc sine; NaN outside [-1, 1]."""
    if not m.single:
        return m.libm("asin", x)
    near_one, p = _asin_parts(m, m.abs(x))
    c = m.select(near_one, PI_2_HI, 0.0)
    return m.copysign(_plus_multiple_of_pi_2(m, c, m.select(near_one, m.neg(p), p)), x)


def acos(m: Lanes, x: ir.Value) -> ir.Value:
    """Arc cosine; NaN outside [-1, 1]."""
    if not m.single:
        return m.libm("acos", x)
    near_one, p = _asin_parts(m, m.abs(x))
    left = m.signbit(x)
    c = m.select(near_one, m.select(left, 2 * PI_2_HI, 0.0), PI_2_HI)
    # Right of 1/2: p.  Left of -1/2: pi - p.  Between: pi/2 - p or, for negative x, pi/2 + p.
    positive = m.b.xor(near_one, left)
    return _plus_multiple_of_pi_2(m, c, m.select(positive, p, m.neg(p)))
