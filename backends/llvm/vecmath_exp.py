"""float32 exponentials, logarithms and what is built from them, as inlined vector IR.  float64 lanes go to the C library.

Method.  Exponentials: x = n ln2 + r with |r| <= ln2/2 (Cody and Waite, two-term ln2, exact under FMA), a minimax
polynomial in r, then scaling by 2^n.  The integer n is the low mantissa bits of z = x log2(e) + 1.5 * 2^23, so no
conversion instruction is needed.  Logarithms: x = 2^k m with m in [sqrt(1/2), sqrt(2)), then a polynomial in m - 1.
Coefficients come from `benchmarks/minimax.py`.

Instructions per vector as compiled for AVX2 / AVX-512 with its `features` (moves of constants not counted):
exp 23/14, exp2 20/12, expm1 25/23, sigmoid 31/22, tanh 26/23, sinh 32/29, cosh 27/25, log 32, log2 33, log10 34,
log1p 32/31, asinh 42/37, acosh 39/36, atanh 37/33, pow 184/133 (it works on float64 halves).  sigmoid, tanh and atanh
include one division, acosh a square root, asinh both.
"""

from __future__ import annotations

import math

from llvmlite import ir

from .lanes import Lanes, split_single

INF, NAN = math.inf, math.nan

# Adding MAGIC rounds to an integer and leaves it, two's complement, in the low mantissa bits.
MAGIC = 12582912.0
ONE_BITS = 0x3F800000
EXPONENT_FIELD = 0xFF800000
MIN_NORMAL = 2.0**-126
LOG2_E = 1.0 / math.log(2.0)
LN2_HI, LN2_LO = split_single(math.log(2.0))

EXP = (1.0, 1.0, 0.49999994, 0.166665211, 0.0416682549, 0.00836866815, 0.0013821678)
EXPM1 = (0.5, 0.166666657, 0.0416664928, 0.00833354704, 0.00139323133, 0.000197611269)
EXP2 = (1.0, 0.693147182, 0.240226477, 0.0555035993, 0.0096185049, 0.00133908109, 0.000153269517)
SINH = (0.166666672, 0.00833317544, 0.000199740869)
COSH = (0.5, 0.0416664593, 0.00139354519)
LOG = (
    -0.5, 0.333333135, -0.250000089, 0.200020716, -0.166679889, 0.142203584, -0.124062344, 0.118835509, -0.116700917,
    0.0674924999,
)  # fmt: skip
# float64 2^r on [-1/2, 1/2] and log2(1 + f) / f on [sqrt(1/2) - 1, sqrt(2) - 1]: 2^-29 and 2^-35, enough for float32 pow.
POW_EXP2 = (
    1.000000000554167, 0.6931472057372665, 0.24022646890630578, 0.05550328777028588, 0.009618488960680101,
    0.0013399931190530739, 0.0001534581048161903,
)  # fmt: skip
POW_LOG2 = (
    1.442695040868699, -0.7213475208688047, 0.48089836139925707, -0.36067367482294177, 0.288537293111085,
    -0.24045316545072287, 0.2061753713563546, -0.1803006181023053, 0.15876964690073062, -0.1431561138394782,
    0.14474902860532712, -0.14284142350125886, 0.07737175737172355,
)  # fmt: skip


# -- scaling by powers of two ----------------------------------------------------------------------------------------


def _power_of_two(m: Lanes, z: ir.Value) -> ir.Value:
    """2^n for n = z - MAGIC in [-126, 127]."""
    return m.from_bits(m.iadd(m.shl(m.bits(z), 23), ONE_BITS))


def _scale(m: Lanes, x: ir.Value, z: ir.Value, n: ir.Value) -> ir.Value:
    """x * 2^n for n = z - MAGIC in [-252, 254], rounded once: the factor is split into 2^floor(n/2) and the rest."""
    scaled = m.ldexp(x, n)
    if scaled is not None:
        return scaled
    bits = m.bits(z)
    half = m.iand(m.shl(bits, 22), EXPONENT_FIELD)
    rest = m.isub(m.shl(bits, 23), half)
    x = m.mul(x, m.from_bits(m.iadd(half, ONE_BITS)))
    return m.mul(x, m.from_bits(m.iadd(rest, ONE_BITS)))


def _reduce_ln2(m: Lanes, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """(r, z, n): x = n ln2 + r, n = z - MAGIC, |r| <= ln2/2; needs |x| below 2^21."""
    z = m.fma(x, LOG2_E, MAGIC)
    n = m.sub(z, MAGIC)
    return m.fma(n, -LN2_LO, m.fma(n, -LN2_HI, x)), z, n


# -- exponentials ----------------------------------------------------------------------------------------------------


def exp_clamped(m: Lanes, x: ir.Value) -> ir.Value:
    """exp(x) for float32 x in [-104, 89] (or NaN); denormal results are rounded once."""
    r, z, n = _reduce_ln2(m, x)
    return _scale(m, m.horner(r, EXP), z, n)


def exp_normal(m: Lanes, x: ir.Value) -> ir.Value:
    """exp(x) for float32 x in [-87, 88], where neither end needs care."""
    r, z, n = _reduce_ln2(m, x)
    p = m.horner(r, EXP)
    scaled = m.ldexp(p, n)
    return scaled if scaled is not None else m.mul(p, _power_of_two(m, z))


def exp(m: Lanes, x: ir.Value) -> ir.Value:
    """e^x."""
    if not m.single:
        return m.libm("exp", x)
    return exp_clamped(m, m.max(m.min(x, 89.0), -104.0))


def exp2(m: Lanes, x: ir.Value) -> ir.Value:
    """2^x; exact at integers."""
    if not m.single:
        return m.libm("exp2", x)
    x = m.max(m.min(x, 129.0), -151.0)
    z = m.add(x, MAGIC)
    n = m.sub(z, MAGIC)
    return _scale(m, m.horner(m.sub(x, n), EXP2), z, n)


def _expm1_reduced(m: Lanes, r: ir.Value) -> ir.Value:
    """expm1(r) for |r| <= ln2/2."""
    return m.fma(m.mul(r, r), m.horner(r, EXPM1), r)


def expm1(m: Lanes, x: ir.Value) -> ir.Value:
    """e^x - 1: 2 (expm1(r) 2^(n-1) + (2^(n-1) - 1/2)), the halving keeps n = 128 in range."""
    if not m.single:
        return m.libm("expm1", x)
    r, z, _ = _reduce_ln2(m, m.max(m.min(x, 89.0), -20.0))
    half_scale = m.from_bits(m.iadd(m.shl(m.bits(z), 23), ONE_BITS - (1 << 23)))
    half = m.fma(_expm1_reduced(m, r), half_scale, m.sub(half_scale, 0.5))
    # Denormals and zeros, whose halving would round or drop the sign.
    return m.select(m.cmp("<", m.abs(x), 2.0**-26), x, m.add(half, half))


def sigmoid(m: Lanes, x: ir.Value) -> ir.Value:
    """1 / (1 + e^-x), by e = exp(-|x|): e / (1 + e) on the negative side keeps the small results exact."""
    negated = m.neg(m.abs(x))
    e = exp_clamped(m, m.max(negated, -104.0)) if m.single else m.libm("exp", negated)
    total = m.add(e, 1.0)
    y = m.div(m.select(m.cmp("<", x, 0.0), e, 1.0), total)
    # What rounding the sum lost, to first order where it weighs most (small e); it hides behind the division.
    return m.fma(m.neg(y), m.sub(e, m.sub(total, 1.0)), y)


def tanh(m: Lanes, x: ir.Value) -> ir.Value:
    """-t / (2 + t) with t = expm1(-2|x|), and the sign of x."""
    if not m.single:
        return m.libm("tanh", x)
    r, z, _ = _reduce_ln2(m, m.mul(m.min(m.abs(x), 10.0), -2.0))
    scale = _power_of_two(m, z)
    t = m.fma(_expm1_reduced(m, r), scale, m.sub(scale, 1.0))
    return m.copysign(m.div(t, m.sub(-2.0, t)), x)


def _sinh_cosh_parts(m: Lanes, x: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value, ir.Value]:
    """(sinh r, cosh r, (2^n - 2^-n) / 4, (2^n + 2^-n) / 4) for |x| = n ln2 + r, clamped where cosh overflows."""
    r, z, _ = _reduce_ln2(m, m.min(m.abs(x), 89.5))
    r2 = m.mul(r, r)
    odd = m.fma(m.mul(r2, m.horner(r2, SINH)), r, r)
    even = m.fma(r2, m.horner(r2, COSH), 1.0)
    exponent = m.shl(m.bits(z), 23)
    up = m.from_bits(m.iadd(exponent, ONE_BITS - (2 << 23)))
    down = m.from_bits(m.isub(ONE_BITS + (2 << 23), exponent))
    return odd, even, m.fma(down, -0.0625, up), m.fma(down, 0.0625, up)


def sinh(m: Lanes, x: ir.Value) -> ir.Value:
    """sinh(n ln2 + r) = sinh(n ln2) cosh(r) + cosh(n ln2) sinh(r), at half scale so that the last doubling overflows."""
    if not m.single:
        return m.libm("sinh", x)
    odd, even, difference, total = _sinh_cosh_parts(m, x)
    half = m.fma(even, difference, m.mul(odd, total))
    return m.select(m.cmp("<", m.abs(x), 2.0**-13), x, m.copysign(m.add(half, half), x))


def cosh(m: Lanes, x: ir.Value) -> ir.Value:
    """cosh(n ln2 + r) = cosh(n ln2) cosh(r) + sinh(n ln2) sinh(r)."""
    if not m.single:
        return m.libm("cosh", x)
    odd, even, difference, total = _sinh_cosh_parts(m, x)
    half = m.fma(even, total, m.mul(odd, difference))
    return m.add(half, half)


# -- logarithms ------------------------------------------------------------------------------------------------------

SQRT_HALF_BITS = 0x3F3504F3
# The exponent is kept as k * 2^23, as it lies in the bits; the constants that multiply it carry the 2^-23.
K_LN2_HI, K_LN2_LO = LN2_HI * 2.0**-23, LN2_LO * 2.0**-23
LOG2_E_HI, LOG2_E_LO = split_single(LOG2_E)
LOG10_E_HI, LOG10_E_LO = split_single(math.log10(math.e))
K_LOG10_2_HI, K_LOG10_2_LO = (part * 2.0**-23 for part in split_single(math.log10(2.0)))


def _log_reduce(m: Lanes, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """(f, k * 2^23 as float) with x = 2^k (1 + f), 1 + f in [sqrt(1/2), sqrt(2)), for positive finite float32 x."""
    denormal = m.cmp("<", x, MIN_NORMAL)
    bits = m.bits(m.select(denormal, m.mul(x, 2.0**23), x))
    k = m.iand(m.isub(bits, SQRT_HALF_BITS), EXPONENT_FIELD)
    f = m.sub(m.from_bits(m.isub(bits, k)), 1.0)
    return f, m.add(m.to_float(k), m.select(denormal, -23 * 2.0**23, 0.0))


def _log1p_tail(m: Lanes, f: ir.Value) -> ir.Value:
    """log(1 + f) - f for 1 + f in [sqrt(1/2), sqrt(2)]."""
    f2 = m.mul(f, f)
    return m.mul(f2, m.estrin(f, f2, LOG))


def _log_specials(m: Lanes, x: ir.Value, y: ir.Value, zero: float) -> ir.Value:
    """y, but -inf at x == zero, NaN below, and x itself at +inf (and NaN)."""
    y = m.select(m.cmp("<", x, INF), y, x)
    return m.select(m.cmp(">", x, zero), y, m.select(m.cmp("==", x, zero), -INF, NAN))


def log_positive(m: Lanes, x: ir.Value) -> ir.Value:
    """log(x) for positive finite float32 x, denormals included."""
    f, k = _log_reduce(m, x)
    return m.fma(k, K_LN2_HI, m.add(f, m.fma(k, K_LN2_LO, _log1p_tail(m, f))))


def log(m: Lanes, x: ir.Value) -> ir.Value:
    """Natural logarithm."""
    return _log_specials(m, x, log_positive(m, x), 0.0) if m.single else m.libm("log", x)


def log2(m: Lanes, x: ir.Value) -> ir.Value:
    """Logarithm to base 2; exact at powers of two."""
    if not m.single:
        return m.libm("log2", x)
    f, k = _log_reduce(m, x)
    tail = m.fma(_log1p_tail(m, f), LOG2_E, m.mul(f, LOG2_E_LO))
    return _log_specials(m, x, m.fma(k, 2.0**-23, m.fma(f, LOG2_E_HI, tail)), 0.0)


def log10(m: Lanes, x: ir.Value) -> ir.Value:
    """Logarithm to base 10."""
    if not m.single:
        return m.libm("log10", x)
    f, k = _log_reduce(m, x)
    tail = m.fma(_log1p_tail(m, f), LOG10_E_HI, m.fma(f, LOG10_E_LO, m.mul(k, K_LOG10_2_LO)))
    return _log_specials(m, x, m.fma(k, K_LOG10_2_HI, m.fma(f, LOG10_E_HI, tail)), 0.0)


def _log1p_parts(m: Lanes, x: ir.Value) -> ir.Value:
    """log(1 + x) for finite float32 x > -1; the sign of a zero is lost.

    1 + x = 2^k (1 + f) with f = x 2^-k + (2^-k - 1): k is read off the rounded sum, f does not see that rounding
    (after N. Juffa, log1pf).  x 2^-k is an exponent subtraction, sound because k = 0 wherever x is tiny.
    """
    u = m.add(x, 1.0)
    k = m.iand(m.isub(m.bits(u), SQRT_HALF_BITS), EXPONENT_FIELD)
    four_scale = m.from_bits(m.isub(ONE_BITS + (2 << 23), k))
    f = m.add(m.from_bits(m.isub(m.bits(x), k)), m.fma(four_scale, 0.25, -1.0))
    k = m.to_float(k)
    return m.fma(k, K_LN2_HI, m.add(f, m.fma(k, K_LN2_LO, _log1p_tail(m, f))))


def log1p(m: Lanes, x: ir.Value) -> ir.Value:
    """log(1 + x), accurate near zero."""
    if not m.single:
        return m.libm("log1p", x)
    # x + x == x exactly at the zeros and infinities, which come back as they are (-inf is caught below).
    y = m.select(m.cmp("==", m.add(x, x), x), x, _log1p_parts(m, x))
    return m.select(m.cmp(">", x, -1.0), y, m.select(m.cmp("==", x, -1.0), -INF, NAN))


# -- inverse hyperbolics ---------------------------------------------------------------------------------------------

# Above this, sqrt(x^2 +- 1) = x and log1p(2x) = log(x) + ln2 to float32; below 2^63, so that squares do not overflow.
HUGE = 2.0**40


def asinh(m: Lanes, x: ir.Value) -> ir.Value:
    """log1p(a + a^2 / (1 + sqrt(a^2 + 1))) with a = |x|, and the sign of x."""
    if not m.single:
        return m.libm("asinh", x)
    a = m.abs(x)
    square = m.mul(a, a)
    argument = m.add(a, m.div(square, m.add(m.sqrt(m.add(square, 1.0)), 1.0)))
    return m.copysign(_log1p_or_huge(m, a, argument), x)


def acosh(m: Lanes, x: ir.Value) -> ir.Value:
    """log1p(t + sqrt(2t + t^2)) with t = x - 1; NaN below 1."""
    if not m.single:
        return m.libm("acosh", x)
    t = m.sub(x, 1.0)
    argument = m.add(t, m.sqrt(m.fma(t, t, m.add(t, t))))
    return m.select(m.cmp(">=", x, 1.0), _log1p_or_huge(m, x, argument), NAN)


def _log1p_or_huge(m: Lanes, a: ir.Value, argument: ir.Value) -> ir.Value:
    """log1p(argument), but log(2a) where a > HUGE; +inf and NaN in a come back."""
    huge = m.cmp(">", a, HUGE)
    y = _log1p_parts(m, m.select(huge, a, argument))
    y = m.add(y, m.select(huge, LN2_HI, 0.0))
    return m.select(m.cmp("<", a, INF), y, a)


def atanh(m: Lanes, x: ir.Value) -> ir.Value:
    """log1p(2a / (1 - a)) / 2 with a = |x|, and the sign of x; inf at 1, NaN beyond."""
    if not m.single:
        return m.libm("atanh", x)
    a = m.abs(x)
    y = m.mul(_log1p_parts(m, m.div(m.add(a, a), m.sub(1.0, a))), 0.5)
    y = m.select(m.cmp("<", a, 1.0), y, m.select(m.cmp("==", a, 1.0), INF, NAN))
    return m.copysign(y, x)


# -- powers ----------------------------------------------------------------------------------------------------------


def _log2_double(m: Lanes, x: ir.Value) -> ir.Value:
    """log2(x) to 2^-35 relative for positive normal float64 x (any positive float32, widened)."""
    bits = m.bits(x)
    k = m.iand(m.isub(bits, 0x3FE6A09E667F3BCD), 0xFFF0000000000000)
    f = m.sub(m.from_bits(m.isub(bits, k)), 1.0)
    # k * 2^52 to float64 without a 64-bit conversion instruction: the exponent goes to the mantissa of 1.5 * 2^52.
    exponent = m.b.ashr(k, m.i(52))
    whole = m.sub(m.from_bits(m.iadd(exponent, 0x4338000000000000)), 6755399441055744.0)
    return m.fma(f, m.estrin(f, m.mul(f, f), POW_LOG2), whole)


def exp2_double(m: Lanes, t: ir.Value) -> ir.Value:
    """2^t to 2^-29 relative for float64 t, clamped to where float32 overflows or vanishes."""
    t = m.max(m.min(t, 200.0), -200.0)
    z = m.add(t, 6755399441055744.0)
    p = m.horner(m.sub(t, m.sub(z, 6755399441055744.0)), POW_EXP2)
    return m.mul(p, m.from_bits(m.iadd(m.shl(m.bits(z), 52), 0x3FF0000000000000)))


def pow(m: Lanes, x: ir.Value, y: ir.Value) -> ir.Value:
    """x^y as C99: float32 goes through 2^(y log2|x|) in float64, which rounds correctly but for about 1 in 100."""
    if not m.single:
        return m.libm("pow", x, y)
    d = m.double()
    a = m.abs(x)
    log = _log2_double(d, m.b.fpext(a, d.type))
    log = d.select(m.cmp("==", a, 0.0), -INF, log)
    log = d.select(m.cmp("<", a, INF), log, m.b.fpext(a, d.type))
    t = d.mul(log, m.b.fpext(y, d.type))
    # x^0 and (+-1)^(+-inf) are 1 whatever the product says; 1^NaN too.
    unit = m.b.or_(m.cmp("==", y, 0.0), m.cmp("==", x, 1.0))
    unit = m.b.or_(unit, m.b.and_(m.cmp("==", a, 1.0), m.cmp("==", y, y)))
    t = d.select(unit, 0.0, t)
    magnitude = m.b.fptrunc(exp2_double(d, t), m.type)
    whole = m.cmp("==", m.intrinsic("floor", y), y)
    half = m.mul(y, 0.5)
    odd = m.b.and_(whole, m.cmp("!=", m.intrinsic("floor", half), half))
    signed = m.b.select(odd, m.copysign(magnitude, x), magnitude)
    root_of_negative = m.b.and_(m.b.and_(m.cmp("<", x, 0.0), m.cmp(">", x, -INF)), m.b.not_(whole))
    # (-1)^NaN: NaN is not whole, so it falls here as well.
    return m.select(root_of_negative, NAN, signed)
