"""Triton functions that generated kernels call, as source text: a kernel's file contains those that it needs.

`used_helpers(body)` gives the texts that a kernel's body needs.
"""

from __future__ import annotations

import re

__all__ = ["HELPERS", "used_helpers"]


def _jit(text: str) -> str:
    return "@triton.jit\n" + text.strip("\n") + "\n"


_SOURCES = """
def floor_div(a, b):
    q = a // b  # rounds toward zero
    r = a - q * b
    return tl.where((r != 0) & ((r < 0) != (b < 0)), q - 1, q)

def floor_mod(a, b):
    r = a % b  # has the sign of a
    return tl.where((r != 0) & ((r < 0) != (b < 0)), r + b, r)

def float_mod(a, b):
    r = libdevice.fmod(a, b)
    return tl.where((r != 0) & ((b < 0) != (r < 0)), r + b, r)

def float_floor_div(a, b):
    r = libdevice.fmod(a, b)
    q = libdevice.div_rn(a - r, b)
    q = tl.where((r != 0) & ((b < 0) != (r < 0)), q - 1, q)
    down = tl.floor(q)
    down = tl.where(q - down > 0.5, down + 1, down)
    plain = libdevice.div_rn(a, b)
    return tl.where(b == 0, plain, tl.where(q == 0, libdevice.copysign(q * 0, plain), down))

def max_nan(a, b):
    return tl.where((a > b) | (a != a), a, b)

def max_nan32(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)

def min_nan32(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)

def min_nan(a, b):
    return tl.where((a < b) | (a != a), a, b)

def product(a, b):
    return a * b

def plus(a, b):
    return a + b

def larger(a, b):
    return tl.maximum(a, b)

def smaller(a, b):
    return tl.minimum(a, b)

def int_pow(x, n, BITS: tl.constexpr):
    result = x * 0 + 1
    power = x + n * 0
    for bit in tl.static_range(BITS):
        result = tl.where(((n >> bit) & 1) != 0, result * power, result)
        power = power * power
    one = x * 0 + 1
    minus = tl.where((n & 1) != 0, x, one)
    negative = tl.where(x == 1, one, tl.where(x == -1, minus, x * 0))
    return tl.where(n < 0, negative, result)

def shift_left(x, n, BITS: tl.constexpr):
    inside = (n >= 0) & (n < BITS)
    return tl.where(inside, x << tl.where(inside, n, n * 0), x * 0)

def shift_right(x, n, BITS: tl.constexpr, SIGNED: tl.constexpr):
    inside = (n >= 0) & (n < BITS)
    if SIGNED:
        return x >> tl.where(inside, n, n * 0 + (BITS - 1))
    return tl.where(inside, x >> tl.where(inside, n, n * 0), x * 0)

def quotient(x, d):
    # by the reciprocal of few in two parts: exact where the quotient is a float, else one of its two neighbours
    size = tl.abs(d)  # by 2^64 or 2^-64, so that the reciprocal is a normal number
    scale = tl.where(size < 5.421010862427522e-20, 18446744073709551616.0, tl.where(size > 18446744073709551616.0, 5.421010862427522e-20, 1.0))
    high = libdevice.rcp_rn(d * scale)
    low = libdevice.fma(-high, d * scale, 1.0) * high
    low = tl.where(low == low, low, 0.0)  # of 0 and infinity
    x = x * scale
    q = x * high
    return tl.where(tl.abs(q) < float("inf"), libdevice.fma(x, low, q), q)

def sigmoid(x):
    return libdevice.rcp_rn(1.0 + libdevice.exp(-x))

def to_e4m3(x):
    # torch gives NaN above the largest number where the hardware saturates
    return tl.where(tl.abs(x) > 464.0, float("nan"), x).to(tl.float8e4nv)

def to_e5m2(x):
    bits = x.to(tl.float8e5).to(tl.uint8, bitcast=True)
    infinite = tl.where(x < 0, 0xFC, 0x7C).to(tl.uint8)
    return tl.where(tl.abs(x) >= 61440.0, infinite, bits).to(tl.float8e5, bitcast=True)

def exp2_approx(x):
    # tl.exp2 keeps subnormal results, which takes three more instructions
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)

def exp_approx(x):
    power = x * 1.4426950408889634
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [power], dtype=tl.float32, is_pure=True, pack=1)

def sigmoid_approx(x):
    power = x * -1.4426950408889634
    e = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [power], dtype=tl.float32, is_pure=True, pack=1)
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [e + 1.0], dtype=tl.float32, is_pure=True, pack=1)

def tanh_approx(x):
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)

def log_approx(x):
    return 0.6931471805599453 * tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)

def multiply_words(a, b):
    # of two numbers below 2^32: one instruction, where LLVM and ptxas see a product of 64 bits and add a part of it that is zero
    words = [a.to(tl.uint32), b.to(tl.uint32)]
    return tl.inline_asm_elementwise("mul.wide.u32 $0, $1, $2;", "=l,r,r", words, dtype=tl.uint64, is_pure=True, pack=1)

def rounded_bf16(x):
    # the nearest bfloat16 as a float32: its bits with 16 zeros behind them, in one instruction
    bits = tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $1, 0f00000000;", "=r,f", [x], dtype=tl.int32, is_pure=True, pack=1)
    return bits.to(tl.float32, bitcast=True)

def fetch(p, length):
    # into the L2 cache, where there is any length
    text: tl.constexpr = "{ .reg .pred go; setp.gt.s32 go, $2, 0; @go cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }"
    tl.inline_asm_elementwise(text, "=r,l,r", [p.to(tl.int64), length], dtype=tl.int32, is_pure=False, pack=1)

def erf_approx(x):
    # 1 - exp(-x^2) * g(1 / (1 + 0.55 |x|)), with g of degree 6 for the least largest error (3e-8; the form is Hastings', 1955); near 0 the series
    t = tl.abs(x)
    r = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [t * 0.55 + 1.0], dtype=tl.float32, is_pure=True, pack=1)
    y = t * 1.2011224087864498
    e = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [-y * y], dtype=tl.float32, is_pure=True, pack=1)
    g = ((((0.10686823223511316 * r - 0.5162564243575846) * r + 0.7569591889188071) * r - 0.03931982137535995) * r + 0.3900470156302311) * r
    g = (g + 0.3017017991232496) * r
    s = x * x
    near = x * (1.1283791670955126 + s * (s * 0.11283791670955126 - 0.37612638903183754))
    far = (1.0 - g * e).to(tl.int32, bitcast=True) | (x.to(tl.int32, bitcast=True) & -2147483648)
    return tl.where(t < 0.125, near, far.to(tl.float32, bitcast=True))

def digamma(x):
    # reflection below 0, recurrence up to 10, then the asymptotic series (Cephes psi)
    whole = (x == tl.floor(x)) & (x <= 0)
    reflected = x < 0
    y = tl.where(reflected, 1.0 - x, x)
    total = y * 0
    for _ in tl.static_range(10):
        small = y < 10.0
        total = total - tl.where(small, libdevice.rcp_rn(tl.where(small, y, y * 0 + 1.0)), y * 0)
        y = tl.where(small, y + 1.0, y)
    z = libdevice.rcp_rn(y * y)
    tail = z * (1.0 / 240 - z * (1.0 / 132 - z * (691.0 / 32760 - z * (1.0 / 12))))
    series = z * (1.0 / 12 - z * (1.0 / 120 - z * (1.0 / 252 - tail)))
    value = total + libdevice.log(y) - libdevice.div_rn(y * 0 + 0.5, y) - series
    fraction = x - libdevice.rint(x)  # exact, and small where the cotangent is steep
    cotangent = libdevice.div_rn(fraction * 0 + 3.141592653589793, libdevice.tan(3.141592653589793 * fraction))
    value = tl.where(reflected, value - cotangent, value)
    at_zero = libdevice.copysign(x * 0 + float("inf"), -x)
    return tl.where(x == 0, at_zero, tl.where(whole, float("nan"), value))
"""

HELPERS: dict[str, str] = {
    re.match(r"def (\w+)", text).group(1): _jit(text)  # type: ignore[union-attr]
    for text in re.split(r"\n(?=def )", _SOURCES.strip("\n"))
}


def used_helpers(body: str) -> list[str]:
    """Source texts of the helpers that `body` calls, in a fixed order. Helpers do not call each other."""
    return [text for name, text in HELPERS.items() if re.search(rf"\b{name}\b", body)]
