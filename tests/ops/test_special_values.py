"""Unary and binary operators on the values where rounding and arithmetic are not what they are elsewhere: NaN, infinities, signed zeros,
denormal numbers, the largest numbers, and integers that overflow. One graph per element type has all of them; each result is
compared with eager's: NaN where it is NaN, the same infinities, zeros of the same sign, the rest to a few units in the last place or
nearer to the result in float64.

Where eager itself is wrong or free, nothing is compared: `EAGER` lists it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

Function = Callable[..., torch.Tensor]

_EXACT: dict[str, Function] = {
    **{n: getattr(torch, n) for n in ("abs", "neg", "sign", "floor", "ceil", "trunc", "round", "relu", "isnan", "isinf", "isfinite",
                                      "signbit", "logical_not", "reciprocal", "square", "frac", "nan_to_num", "positive")},
    "clamp": lambda x: x.clamp(-1, 1), "int": lambda x: x.nan_to_num(0, 0, 0).clamp(-1e4, 1e4).to(torch.int64), "bool": lambda x: x.bool(),
    "pow 2": lambda x: x ** 2, "pow 0": lambda x: x ** 0, "pow -1": lambda x: x ** -1, "times 0": lambda x: x * 0, "plus 0": lambda x: x + 0.0,
    "minus itself": lambda x: x - x, "over itself": lambda x: x / x, "is itself": lambda x: x == x, "max": lambda x: x.amax(), "argmax": lambda x: x.argmax(),
    "leaky_relu": torch.nn.functional.leaky_relu, "hardtanh": torch.nn.functional.hardtanh,
}
_NEAR: dict[str, Function] = {
    **{n: getattr(torch, n) for n in ("sqrt", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "rsqrt", "sin", "cos", "tan", "asin", "acos", "atan",
                                      "sinh", "cosh", "tanh", "asinh", "acosh", "atanh", "erf", "erfc", "sigmoid", "erfinv", "lgamma", "digamma")},
    **{n: getattr(torch.nn.functional, n) for n in ("gelu", "silu", "softplus", "elu", "mish", "hardswish", "hardsigmoid", "logsigmoid")},
    "pow 0.5": lambda x: x ** 0.5, "pow -0.5": lambda x: x ** -0.5, "2 pow": lambda x: 2 ** x,
}
_BINARY: dict[str, Function] = {
    **{n: getattr(torch, n) for n in ("add", "sub", "mul", "div", "maximum", "minimum", "fmax", "fmin", "eq", "ne", "lt", "le", "gt", "ge", "copysign",
                                      "nextafter", "remainder", "fmod", "floor_divide", "logical_and", "logical_or", "logical_xor")},
    "trunc_divide": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
}
_BINARY_NEAR: dict[str, Function] = {n: getattr(torch, n) for n in ("pow", "atan2", "hypot", "xlogy", "logaddexp", "logaddexp2")}
_INTEGER: dict[str, Function] = {
    **{n: getattr(torch, n) for n in ("add", "sub", "mul", "maximum", "minimum", "eq", "lt", "ge", "bitwise_and", "bitwise_or", "bitwise_xor",
                                      "bitwise_left_shift", "bitwise_right_shift", "logical_and", "fmax")},
    "pow": lambda a, b: torch.pow(a, b.remainder(67)), "pow of negative": lambda a, b: torch.pow(a, b),
    "neg": lambda a, b: -a, "abs": lambda a, b: a.abs(), "sign": lambda a, b: a.sign(), "not": lambda a, b: ~a,
    "float": lambda a, b: a.float(), "i8": lambda a, b: a.to(torch.int8), "u8": lambda a, b: a.to(torch.uint8), "true": lambda a, b: a / b,
    "sum": lambda a, b: a.sum(0), "prod": lambda a, b: a.prod(0), "cumsum": lambda a, b: a.cumsum(0), "square": lambda a, b: a.square(),
}
_DIVISION: dict[str, Function] = {
    "floor_divide": torch.floor_divide, "remainder": torch.remainder, "fmod": torch.fmod,
    "trunc_divide": lambda a, b: torch.div(a, b, rounding_mode="trunc"),
}
FLOATS = [torch.float32, torch.bfloat16, *(pytest.param(t, marks=pytest.mark.slow) for t in (torch.float64, torch.float16))]
INTEGERS = [torch.int64, torch.uint8, *(pytest.param(t, marks=pytest.mark.slow) for t in (torch.int32, torch.int16, torch.int8))]


Where = Callable[..., torch.Tensor]


def _denormal(*x: torch.Tensor) -> torch.Tensor:
    """Where an argument is, or the result may be, below the smallest normal number, or in lanes that eager flushes to zero."""
    small = [(a != 0) & (a.abs() < 2 * torch.finfo(a.dtype).smallest_normal) for a in x]
    return torch.stack(small).any(0)


def _zeros(*x: torch.Tensor) -> torch.Tensor:
    return torch.stack([a == 0 for a in x]).all(0)


EAGER: dict[str, tuple[str, Where]] = {
    "log1p": ("flushes denormal numbers", _denormal),
    "erf": ("flushes denormal numbers", _denormal),
    "gelu": ("NaN for infinity; flushes denormal numbers", lambda x: _denormal(x) | x.isinf()),
    "relu": ("a zero of either sign, by element type", _zeros),
    "fmax": ("a zero of either sign", _zeros), "fmin": ("a zero of either sign", _zeros),
    "fmod": ("NaN where the quotient is huge", lambda a, b: a.abs() / b.abs() > 1e30),
    "remainder": ("NaN where the quotient is huge", lambda a, b: a.abs() / b.abs() > 1e30),
    "atan2": ("flushes denormal results", lambda a, b: b.abs() / 2 >= torch.finfo(a.dtype).max / 4),
    "digamma": ("cancels around its roots", lambda x: (torch.digamma(x).abs() < 0.05)),
    "logaddexp": ("cancels around 0", lambda a, b: torch.logaddexp(a, b).abs() < 0.1),
    "logaddexp2": ("cancels around 0", lambda a, b: torch.logaddexp2(a, b).abs() < 0.1),
}


def specials(dtype: torch.dtype) -> torch.Tensor:
    """Special numbers of a float type, both signs; as many as not to fill vectors evenly."""
    f = torch.finfo(dtype)
    low = [0.0, f.smallest_normal, f.smallest_normal / 2, f.smallest_normal * f.eps, f.eps, 0.3, 0.5, 1.0, 1.0 + f.eps, 1.5, 2.0, 2.5, 3.0, 10.0, 88.0,
           f.max / 2, f.max, math.inf]
    return torch.tensor([*low, *(-x for x in low), math.nan], dtype=torch.float64).to(dtype)


def extremes(dtype: torch.dtype) -> torch.Tensor:
    i = torch.iinfo(dtype)
    return torch.tensor([0, 1, 2, 3, 7, 31, 63, i.max // 2 + 1, i.max - 1, i.max, *([-1, -2, -3, -7, i.min + 1, i.min] if i.min else [])], dtype=dtype)


def pairs(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.repeat_interleave(len(x)), x.repeat(len(x))


COARSE = {"digamma": 16.0}
"""Units in the last place for functions that are coarser: digamma adds up to ten reciprocals."""


def differences(functions: dict[str, Function], arguments: tuple[torch.Tensor, ...], ulps: float) -> dict[str, str]:
    """What differs from eager, by the name of the function. `ulps`: how many units in the last place a finite number may be off."""
    torch._dynamo.reset()
    got = torch.compile(lambda *a: [f(*a) for f in functions.values()], backend="aicc", dynamic=False)(*arguments)
    found = {}
    for (name, f), g in zip(functions.items(), got, strict=True):
        e = f(*arguments)
        assert (g.dtype, g.shape) == (e.dtype, e.shape), name
        bad = ~_alike(g, e, COARSE.get(name, ulps))
        if e.is_floating_point() and e.dtype != torch.float64 and ulps:
            exact = f(*[a.double() for a in arguments])
            bad &= ~((g.double() - exact).abs() <= (e.double() - exact).abs())
        if name in EAGER and arguments[0].is_floating_point():
            bad &= ~EAGER[name][1](*arguments)
        if bool(bad.any()):
            where = bad.reshape(-1).nonzero()[0].item() if bad.dim() else 0
            at = [a.reshape(-1)[where].item() for a in arguments if a.numel() == g.numel()]
            found[name] = f"{int(bad.sum())} of {bad.numel()}, first at {at}: {g.reshape(-1)[where].item()} instead of {e.reshape(-1)[where].item()}"
    return found


def _alike(g: torch.Tensor, e: torch.Tensor, ulps: float) -> torch.Tensor:
    if not e.is_floating_point():
        return g == e
    a, b = g.double(), e.double()
    f = torch.finfo(e.dtype)
    same = (a == b) & ((a != 0) | (torch.signbit(a) == torch.signbit(b))) | (a.isnan() & b.isnan())
    spacing = (b.abs() * f.eps).clamp(min=f.smallest_normal * f.eps)
    return same | ((a - b).abs() <= ulps * spacing) & (ulps > 0) & ((a != 0) | (b != 0))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_unary(dtype: torch.dtype) -> None:
    assert differences(_EXACT, (specials(dtype),), 0) == {}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_unary_functions(dtype: torch.dtype) -> None:
    assert differences(_NEAR, (specials(dtype),), 4) == {}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_binary(dtype: torch.dtype) -> None:
    assert differences(_BINARY, pairs(specials(dtype)), 0) == {}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_binary_functions(dtype: torch.dtype) -> None:
    assert differences(_BINARY_NEAR, pairs(specials(dtype)), 4) == {}


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integers(dtype: torch.dtype) -> None:
    assert differences(_INTEGER, pairs(extremes(dtype)), 0) == {}


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_integer_division(dtype: torch.dtype) -> None:
    a, b = pairs(extremes(dtype))
    traps = (b == 0) | ((b == -1) & (a == torch.iinfo(dtype).min))  # eager raises at the first, and may die of the second
    assert differences(_DIVISION, (a[~traps], b[~traps]), 0) == {}
