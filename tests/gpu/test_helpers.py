"""The text of helper functions, executed on numpy arrays: the interpreter has no inline assembly."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from aicc.backends.triton.helpers import HELPERS

INSTRUCTIONS = {"rcp.approx.ftz.f32": lambda x: 1 / x, "ex2.approx.ftz.f32": np.exp2}


class Tile(np.ndarray):
    """float32 or int32 numbers with Triton's `to`."""

    def to(self, dtype, bitcast=False):
        return self.view(dtype) if bitcast else self.astype(dtype)


def _rounded(f):
    """In float32 from float64, whose products of two float32 numbers are exact."""
    def g(*xs):
        with np.errstate(all="ignore"):
            return f(*(x.astype(np.float64) if isinstance(x, np.ndarray) else x for x in xs)).astype(np.float32).view(Tile)
    return g


LIBDEVICE = SimpleNamespace(rcp_rn=_rounded(lambda x: 1 / x), fma=_rounded(lambda a, b, c: a * b + c))


def run(name, *x):
    """The helper on float32 arrays."""
    def assembly(text, constraints, args, **_):
        with np.errstate(divide="ignore"):
            return INSTRUCTIONS[text.split()[0]](args[0]).astype(np.float32)
    tl = SimpleNamespace(abs=np.abs, where=lambda c, a, b: np.asarray(np.where(c, a, b)).view(Tile), float32=np.float32, int32=np.int32, inline_asm_elementwise=assembly)
    scope = {"tl": tl, "libdevice": LIBDEVICE, "triton": SimpleNamespace(jit=lambda f: f)}
    exec(HELPERS[name], scope)
    with np.errstate(all="ignore"):
        return np.asarray(scope[name](*(v.astype(np.float32).view(Tile) for v in x)))


def test_erf_is_close_everywhere():
    x = np.concatenate([np.linspace(-7, 7, 100001), [0.125, np.nextafter(np.float32(0.125), np.float32(0))]])
    true = np.array([math.erf(v) for v in x.astype(np.float32)])
    assert np.abs(run("erf_approx", x) - true).max() < 3e-7


def test_erf_is_relatively_close_near_zero():
    x = 10.0 ** np.linspace(-30, 0, 1000)
    for sign in (1, -1):
        true = np.array([math.erf(v) for v in (sign * x).astype(np.float32)])
        assert (np.abs(run("erf_approx", sign * x) - true) / np.abs(true)).max() < 2e-6


@pytest.mark.parametrize(("x", "y"), [(math.inf, 1.0), (-math.inf, -1.0), (0.0, 0.0)])
def test_erf_at_the_ends(x, y):
    assert run("erf_approx", np.array([x])) == y


def test_erf_of_nan():
    assert np.isnan(run("erf_approx", np.array([math.nan])))


def test_sigmoid_and_exp_are_close_and_have_no_nan_at_the_ends():
    x = np.concatenate([np.linspace(-80, 80, 10001), [math.inf, -math.inf, -1e30, 1e30, -100.0]])
    wide = x.astype(np.float32).astype(np.float64)
    with np.errstate(over="ignore"):
        sigmoid, exp = 1 / (1 + np.exp(-wide)), np.exp(wide)
        got, power = run("sigmoid_approx", x).astype(np.float64), run("exp_approx", x).astype(np.float64)
    assert not np.isnan(got).any() and not np.isnan(power).any()
    assert (np.abs(got - sigmoid) <= 1e-5 * sigmoid + 1e-37).all()
    finite = np.isfinite(exp) & (exp < 3e38)
    assert (np.abs(power[finite] - exp[finite]) <= 1e-5 * exp[finite] + 1e-37).all()


def test_quotients_of_many_by_one():
    g = np.random.default_rng(0)
    for d in [*g.normal(size=20), 3e38, 1e-30, -1e-39, 2.0**-64, 1.0]:
        x = np.concatenate([g.normal(size=2000) * abs(d), g.normal(size=2000)]).astype(np.float32)
        by = np.array([[d]], np.float32)
        with np.errstate(all="ignore"):
            true = (x / by[0]).astype(np.float32)
        got = run("quotient", x[None], by)[0].astype(np.float32)
        near = np.isfinite(true) & (np.abs(true) > 1e-36)
        assert (np.abs(got[near] - true[near]) <= 1.2e-7 * np.abs(true[near])).all()
        assert (got[~np.isfinite(true)] == true[~np.isfinite(true)]).all()
    whole = np.arange(-4000, 4000, dtype=np.float32)
    for d in (3.0, 7.0, 0.1, 49.0, 1e-25):
        by = np.array([[d]], np.float32)
        assert (run("quotient", whole[None] * by, by)[0] == (whole * by[0]) / by[0]).all()


@pytest.mark.parametrize(("x", "d"), [(math.inf, 2.0), (-math.inf, 1e-30), (1.0, 0.0), (-1.0, 0.0), (0.0, 0.0), (0.0, 3.0), (5.0, math.inf), (math.inf, math.inf),
                                      (math.nan, 1.0), (1.0, math.nan)])
def test_quotients_at_the_ends(x, d):
    with np.errstate(all="ignore"):
        true = np.float32(x) / np.float32(d)
    got = run("quotient", np.array([[x]]), np.array([[d]]))[0, 0]
    assert got == true or (np.isnan(got) and np.isnan(true))
