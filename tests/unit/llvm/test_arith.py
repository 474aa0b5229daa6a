"""Every arith op against torch, on every kind of element type it takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from aicc.backends.llvm.arith import emit
from aicc.benchmarks import elementwise
from aicc.ir import sym
from aicc.ir.dialects.arith import BY_NAME
from aicc.ir.types import DTYPES
from kernels import TORCH, buffer, kernel, run
from llvmlite import ir

t0 = sym("t0")
N = 67
INF, NAN = math.inf, math.nan

UNARY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "neg": torch.neg, "abs": torch.abs, "sign": torch.sign, "bitnot": torch.bitwise_not, "isnan": torch.isnan,
    "isinf": torch.isinf,
    "floor": torch.floor, "ceil": torch.ceil, "trunc": torch.trunc, "round": torch.round, "exp": torch.exp, "exp2": torch.exp2,
    "expm1": torch.expm1, "log": torch.log, "log2": torch.log2, "log10": torch.log10, "log1p": torch.log1p, "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt, "reciprocal": torch.reciprocal, "sin": torch.sin, "cos": torch.cos, "tan": torch.tan,
    "asin": torch.asin,
    "acos": torch.acos, "atan": torch.atan, "sinh": torch.sinh, "cosh": torch.cosh, "tanh": torch.tanh, "asinh": torch.asinh,
    "acosh": torch.acosh, "atanh": torch.atanh, "erf": torch.erf, "erfc": torch.erfc, "erfinv": torch.erfinv,
    "lgamma": torch.lgamma,
    "digamma": torch.digamma, "sigmoid": torch.sigmoid,
}
BINARY: dict[str, Callable[..., torch.Tensor]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "floordiv": torch.floor_divide,
    "truncdiv": lambda a, b: torch.div(a, b, rounding_mode="trunc"), "mod": torch.remainder, "rem": torch.fmod,
    "pow": torch.pow,
    "atan2": torch.atan2, "hypot": torch.hypot, "copysign": torch.copysign, "nextafter": torch.nextafter, "max": torch.maximum,
    "min": torch.minimum, "fmax": torch.fmax, "fmin": torch.fmin, "and": torch.bitwise_and, "or": torch.bitwise_or,
    "xor": torch.bitwise_xor, "shl": torch.bitwise_left_shift, "shr": torch.bitwise_right_shift, "eq": torch.eq, "ne": torch.ne,
    "lt": torch.lt, "le": torch.le, "gt": torch.gt, "ge": torch.ge,
}
KINDS = {"f": ("f32", "f64", "bf16", "f16"), "i": ("i64", "i32", "i8"), "u": ("u8",), "b": ("i1",)}


def values(dtype: str, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    t = TORCH[dtype]
    if dtype == "i1":
        return torch.rand(N, generator=g) > 0.5
    if t.is_floating_point:
        x = torch.randn(N, generator=g) * 3
        x[:12] = torch.tensor([0.0, -0.0, 1.0, -1.0, INF, -INF, NAN, 0.5, 2.5, -2.5, 1e-3, 30.0])
        return x.to(t)
    low = 0 if dtype == "u8" else -100
    return torch.randint(low, 100, (N,), generator=g).to(t)


def cases(table: dict[str, Any]) -> list[tuple[str, str]]:
    return [(n, d) for n in table for letter in BY_NAME[n].kinds for d in KINDS[letter]]


def check(name: str, dtype: str, got: torch.Tensor, want: torch.Tensor) -> None:
    if not got.is_floating_point():
        assert torch.equal(got, want), (name, dtype)
        return
    tolerance = {"f32": 3e-6, "f64": 1e-12, "bf16": 1e-2, "f16": 2e-3}[dtype]
    torch.testing.assert_close(got, want, rtol=tolerance, atol=1e-6 if dtype != "f64" else 1e-13, equal_nan=True)


@pytest.mark.parametrize("name,dtype", cases(UNARY))
def test_unary(name, dtype):
    x = values(dtype, 1)
    want = UNARY[name](x) if not (name == "sign" and dtype == "i1") else x
    y = torch.zeros(N, dtype=want.dtype)

    def body(k, a, r):
        k.store(r, k.arith(name, k.load(a, t0, shape=(N,))), t0)
    out = "i1" if want.dtype == torch.bool else dtype
    assert run(kernel([buffer((N,), dtype), buffer((N,), out)], [1], body), [x, y]) == 0
    check(name, dtype, y, want)


@pytest.mark.parametrize("name,dtype", cases(BINARY))
def test_binary(name, dtype):
    if (name == "hypot" and dtype == "bf16") or (name == "nextafter" and dtype in ("bf16", "f16")):
        pytest.skip("torch has no such operator, or rounds twice")
    x, y = values(dtype, 1), values(dtype, 2)
    if not y.is_floating_point():
        if name in ("floordiv", "truncdiv", "mod", "rem"):
            y = torch.where(y == 0, 7, y)
        if name in ("pow", "shl", "shr"):
            y = y.abs() % 8
    elif name in ("mod", "rem", "floordiv"):
        y = torch.where(y.abs() < 0.1, 0.75, y).to(y.dtype)
    want = BINARY[name](x, y)
    out = torch.zeros(N, dtype=want.dtype)

    def body(k, a, c, r):
        k.store(r, k.arith(name, k.load(a, t0, shape=(N,)), k.load(c, t0, shape=(N,))), t0)
    result = "i1" if want.dtype == torch.bool else dtype
    assert run(kernel([buffer((N,), dtype), buffer((N,), dtype), buffer((N,), result)], [1], body), [x, y, out]) == 0
    check(name, dtype, out, want)


def test_division_by_zero_does_not_trap(target):
    x, y = torch.tensor([5, -(1 << 31), 7, -8] * 8, dtype=torch.int32), torch.tensor([0, -1, 2, -1] * 8, dtype=torch.int32)
    q, r = torch.zeros(32, dtype=torch.int32), torch.zeros(32, dtype=torch.int32)

    def body(k, a, c, out, rest):
        v, w = k.load(a, t0, shape=(32,)), k.load(c, t0, shape=(32,))
        k.store(out, k.arith("floordiv", v, w), t0)
        k.store(rest, k.arith("mod", v, w), t0)
    assert run(kernel([buffer((32,), "i32")] * 4, [1], body), [x, y, q, r], target=target) == 0
    assert q[1:4].tolist() == [-(1 << 31), 3, 8] and r[1:4].tolist() == [0, 1, 0]


@pytest.mark.parametrize("a", ["f32", "f64", "bf16", "f16", "i64", "i32", "i16", "i8", "u8", "i1"])
@pytest.mark.parametrize("b", ["f32", "f64", "bf16", "f16", "i64", "i32", "i16", "i8", "u8", "i1"])
def test_cast(a, b):
    x = values(a, 3)
    if x.is_floating_point() and not TORCH[b].is_floating_point and b != "i1":
        x = x.nan_to_num(0, 5, -5).abs()
    want = x.to(TORCH[b])
    y = torch.zeros(N, dtype=want.dtype)

    def body(k, p, r):
        k.store(r, k.cast(k.load(p, t0, shape=(N,)), DTYPES[b]), t0)
    assert run(kernel([buffer((N,), a), buffer((N,), b)], [1], body), [x, y]) == 0
    torch.testing.assert_close(y, want, rtol=0, atol=0, equal_nan=True)


def test_fma_and_scalars(target):
    def body(k, a, r):
        s = k.load(a, 1)
        v = k.load(a, t0, shape=(N,))
        k.store(r, k.arith("fma", v, s, k.arith("sqrt", k.arith("abs", s))), t0)
    x, y = torch.randn(N), torch.zeros(N)
    assert run(kernel([buffer((N,)), buffer((N,))], [1], body), [x, y], target=target) == 0
    root = x[1].abs().double().sqrt().float()  # rounded once; torch's own float32 sqrt may come from MKL and be off by one ulp
    want = (x.double() * x[1].double() + root.double()).float()
    torch.testing.assert_close(y, want, rtol=0, atol=0)


@pytest.mark.skipif("avx512f" not in elementwise.host_features(), reason="needs AVX-512")
@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("name", ["max", "min"])
def test_extremes_by_avx512_keep_nans(name: str, dtype: str) -> None:
    """NaNs of both kinds and signs in either operand, at every width that has the instruction and at those that do not."""
    integer, element = (torch.int32, ir.FloatType()) if dtype == "f32" else (torch.int64, ir.DoubleType())
    x = torch.tensor([0.0, -0.0, 1.0, -1.0, INF, -INF, 1e-40, -1e-40, 3e38, -2.5, 7.0, 0.5], dtype=TORCH[dtype]).view(integer)
    quiet, signalling = (0x7FC12345, 0x7F800001) if dtype == "f32" else (0x7FF8000000012345, 0x7FF0000000000001)
    top = -(1 << (31 if dtype == "f32" else 63))
    x = torch.cat([x, torch.tensor([quiet, quiet + top, signalling, signalling + top], dtype=integer)]).view(TORCH[dtype])
    a, b = x.repeat(16), x.repeat_interleave(16)
    for width in (None, 2, 4, 8, 16, 32, 64):
        module = elementwise.emit_loop(lambda *v: emit(v[0], elementwise.host_features(), name, DTYPES[dtype], *v[1:]), [element, element], element, width)
        if "avx512vl" in elementwise.host_features():
            assert ("fixupimm" in str(module)) == (width is not None and width * DTYPES[dtype].bits >= 128)
        result = torch.empty_like(a)
        elementwise.compile_function(module, "kernel", 3)(a.data_ptr(), b.data_ptr(), result.data_ptr(), result.numel())
        torch.testing.assert_close(result, BINARY[name](a, b), rtol=0, atol=0, equal_nan=True)
