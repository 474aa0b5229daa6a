"""Index expressions: canonical form, bounds and simplification against plain integer arithmetic, by brute force over small ranges."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from aicc.ir import Expr, sym
from aicc.ir.expr import as_int, ceildiv, evaluate, floordiv, fold, free_symbols, maximum, minimum, mod, product, substitute
from aicc.ir.expr_json import expr_to_json, json_to_expr
from aicc.ir.parser import parse_expr
from aicc.ir.ranges import contiguous_linear, delinearize, known_less, known_nonnegative, lower_bound, simplify, split_linear, upper_bound
from hypothesis import given, settings
from hypothesis import strategies as st

SIZES, POSITIONS = ("s0", "s1"), ("d0", "d1")
SYMBOLS = (*SIZES, *POSITIONS)


@dataclass(frozen=True)
class Tree:
    """An expression twice: as aicc builds it, and as a Python function of the symbols."""

    expr: Any
    value: Callable[[dict[str, int]], int]
    text: str

    def __repr__(self) -> str:
        return self.text


def _leaf(name: str) -> Tree:
    return Tree(sym(name), lambda env: env[name], name)


def _constant(n: int) -> Tree:
    return Tree(n, lambda env: n, str(n))


def _binary(op: str, a: Tree, b: Tree) -> Tree:
    made = {"+": lambda x, y: x + y, "-": lambda x, y: x - y, "*": lambda x, y: x * y, "max": maximum, "min": minimum}[op]
    plain = {"+": lambda x, y: x + y, "-": lambda x, y: x - y, "*": lambda x, y: x * y, "max": max, "min": min}[op]
    return Tree(made(a.expr, b.expr), lambda env: plain(a.value(env), b.value(env)), f"({a.text} {op} {b.text})")


def _division(op: str, a: Tree, b: Tree) -> Tree:
    """Denominators are positive: constants, sizes plus one, or products of these."""
    made, plain = (floordiv, lambda x, y: x // y) if op == "//" else (mod, lambda x, y: x % y)
    return Tree(made(a.expr, b.expr), lambda env: plain(a.value(env), b.value(env)), f"({a.text} {op} {b.text})")


_ONE = _constant(1)
_POSITIVE = st.one_of(
    st.integers(1, 12).map(_constant),
    st.sampled_from(SIZES).map(lambda s: _binary("+", _leaf(s), _ONE)),
    st.sampled_from(SIZES).flatmap(lambda s: st.integers(1, 4).map(lambda k: _binary("*", _binary("+", _leaf(s), _ONE), _constant(k)))),
    st.sampled_from(SIZES).map(lambda s: _binary("max", _leaf(s), _ONE)))


def _grow(children: st.SearchStrategy[Tree]) -> st.SearchStrategy[Tree]:
    return st.one_of(st.builds(_binary, st.sampled_from(["+", "-", "*", "+", "*", "max", "min"]), children, children),
                     st.builds(_division, st.sampled_from(["//", "%"]), children, _POSITIVE))


TREES = st.recursive(st.one_of(st.integers(-20, 20).map(_constant), st.sampled_from(SYMBOLS).map(_leaf)), _grow, max_leaves=8)
RANGES = {"s0": (0, 3), "s1": (0, 4), "d0": (-1, 3), "d1": (0, 5)}
"""`d0` may be negative: nothing may assume the sign of a symbol whose bounds say otherwise."""


def environments(ranges: dict[str, tuple[int, int]] = RANGES) -> Iterator[dict[str, int]]:
    for values in itertools.product(*(range(lo, hi + 1) for lo, hi in ranges.values())):
        yield dict(zip(ranges, values))


ENVIRONMENTS = list(environments())
ARRAYS = {s: np.array([env[s] for env in ENVIRONMENTS]) for s in SYMBOLS}
scaled = settings(max_examples=150)


def values(e: Any, arrays: dict[str, Any] = ARRAYS) -> np.ndarray:
    return np.broadcast_to(np.asarray(evaluate(e, arrays)), (len(next(iter(arrays.values()))),))


def want(t: Tree) -> list[int]:
    return [t.value(env) for env in ENVIRONMENTS]


@scaled
@given(TREES)
def test_construction_keeps_the_value(t: Tree) -> None:
    assert values(t.expr).tolist() == want(t)
    assert [evaluate(t.expr, env) for env in ENVIRONMENTS[::7]] == want(t)[::7]


@scaled
@given(TREES)
def test_text_round_trip(t: Tree) -> None:
    assert parse_expr(str(t.expr)) == t.expr
    assert json_to_expr(expr_to_json(t.expr)) == t.expr


@scaled
@given(TREES)
def test_text_means_what_python_means(t: Tree) -> None:
    code = compile(str(t.expr), "expr", "eval")
    space = {"max": max, "min": min}
    assert [eval(code, space, env) for env in ENVIRONMENTS[::11]] == want(t)[::11]


@scaled
@given(TREES, TREES)
def test_canonical_form(a: Tree, b: Tree) -> None:
    x, y = a.expr, b.expr
    assert x + y == y + x and hash(x + y) == hash(y + x) and x * y == y * x
    assert x - x == 0 and (x + y) - y == x and (x + y) * 2 == x * 2 + y * 2
    assert str(x + y) == str(y + x)
    assert maximum(x, y) == maximum(y, x) and minimum(x, y) == minimum(y, x)


@scaled
@given(TREES, st.sampled_from(SYMBOLS), TREES)
def test_substitute(t: Tree, name: str, by: Tree) -> None:
    if isinstance(t.expr, Expr) and name in SIZES:
        by = _constant(3)  # a size in a denominator stays positive
    got = substitute(t.expr, {name: by.expr})
    assert values(got).tolist() == [t.value({**env, name: by.value(env)}) for env in ENVIRONMENTS]
    assert name in free_symbols(by.expr) or name not in free_symbols(got)


@st.composite
def bounded(draw: Any) -> dict[str, tuple[int, int]]:
    """Random ranges for all symbols; sizes are non-negative."""
    made = {}
    for s in SYMBOLS:
        low = draw(st.integers(0 if s in SIZES else -2, 4))
        made[s] = (low, low + draw(st.integers(0, 4)))
    return made


def arrays_of(ranges: dict[str, tuple[int, int]]) -> dict[str, np.ndarray]:
    grid = np.meshgrid(*(np.arange(lo, hi + 1) for lo, hi in ranges.values()), indexing="ij")
    return {s: g.reshape(-1) for s, g in zip(ranges, grid)}


@settings(max_examples=300)
@given(TREES, bounded())
def test_simplify_with_constant_bounds(t: Tree, ranges: dict[str, tuple[int, int]]) -> None:
    arrays = arrays_of(ranges)
    simplified = simplify(t.expr, ranges)
    assert values(simplified, arrays).tolist() == values(t.expr, arrays).tolist(), f"{t.expr} became {simplified}"


@settings(max_examples=300)
@given(TREES, TREES, bounded())
def test_bounds_hold(a: Tree, b: Tree, ranges: dict[str, tuple[int, int]]) -> None:
    arrays = arrays_of(ranges)
    x = values(a.expr, arrays)
    low, high = lower_bound(a.expr, ranges), upper_bound(a.expr, ranges)
    if low is not None:
        assert bool((values(low, arrays) <= x).all()), f"lower bound {low} of {a.expr}"
    if high is not None:
        assert bool((values(high, arrays) >= x).all()), f"upper bound {high} of {a.expr}"
    if known_less(a.expr, b.expr, ranges):
        assert bool((x < values(b.expr, arrays)).all()), f"{a.expr} < {b.expr}"


@settings(max_examples=300)
@given(TREES, bounded(), st.sampled_from(POSITIONS), st.booleans())
def test_bounds_with_one_side(a: Tree, ranges: dict[str, tuple[int, int]], name: str, upper: bool) -> None:
    arrays = arrays_of(ranges)
    x = values(a.expr, arrays)
    low, high = ranges[name]
    known = {**ranges, name: (None, high) if upper else (low, None)}
    below, above = lower_bound(a.expr, known), upper_bound(a.expr, known)
    assert below is None or bool((values(below, arrays) <= x).all()), f"lower bound {below} of {a.expr} in {known}"
    assert above is None or bool((values(above, arrays) >= x).all()), f"upper bound {above} of {a.expr} in {known}"


def test_products_of_bounds_need_a_sign() -> None:
    assert upper_bound(parse_expr("d0*(d0 // 4)"), {"d0": (None, 3)}) is None, "d0 = -4 gives 4, not 3*0"
    assert upper_bound(parse_expr("d0*min(s0, 5)"), {"d0": (0, 3)}) == 15


@st.composite
def spaces(draw: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Iteration positions d0, d1 inside symbolic sizes, as the passes see them: d_i in [0, size_i - 1], sizes any number >= 1."""
    sizes = draw(st.lists(st.sampled_from([sym("s0"), sym("s1"), sym("s0") * sym("s1"), sym("s0") * 4, sym("s1") + 1, 6, 8]), min_size=2, max_size=2))
    bounds = {f"d{i}": (0, size - 1) for i, size in enumerate(sizes)}
    rows = []
    for s0, s1 in itertools.product(range(1, 4), range(1, 5)):
        env = {"s0": s0, "s1": s1}
        for d0, d1 in itertools.product(*(range(int(evaluate(size, env))) for size in sizes)):
            rows.append((s0, s1, d0, d1))
    return bounds, dict(zip(SYMBOLS, np.array(rows).T))


@settings(max_examples=300)
@given(TREES, TREES, spaces())
def test_symbolic_bounds(a: Tree, b: Tree, space: tuple[dict[str, Any], dict[str, np.ndarray]]) -> None:
    bounds, arrays = space
    x = values(a.expr, arrays)
    simplified = simplify(a.expr, bounds)
    assert values(simplified, arrays).tolist() == x.tolist(), f"{a.expr} became {simplified} in {bounds}"
    if known_less(a.expr, b.expr, bounds):
        assert bool((x < values(b.expr, arrays)).all()), f"{a.expr} < {b.expr} in {bounds}"
    low, high = lower_bound(a.expr, bounds), upper_bound(a.expr, bounds)
    assert low is None or bool((values(low, arrays) <= x).all()), f"lower bound {low} of {a.expr} in {bounds}"
    assert high is None or bool((values(high, arrays) >= x).all()), f"upper bound {high} of {a.expr} in {bounds}"


@scaled
@given(TREES)
def test_known_nonnegative(t: Tree) -> None:
    if known_nonnegative(t.expr):
        assert all(t.value(env) >= 0 for env in ENVIRONMENTS if env["d0"] >= 0)


@given(st.lists(st.integers(2, 5), min_size=1, max_size=4))
def test_delinearize_inverts_contiguous_linear(shape: list[int]) -> None:
    index = [sym(f"d{i}") for i in range(len(shape))]
    bounds = {f"d{i}": (0, n - 1) for i, n in enumerate(shape)}
    flat = contiguous_linear(index, shape)
    assert [simplify(e, bounds) for e in delinearize(flat, shape)] == index
    p = np.arange(int(product(shape)))
    back = [np.broadcast_to(evaluate(e, {"p": p}), p.shape) for e in delinearize(sym("p"), shape)]
    assert np.array_equal(np.stack(back), np.stack(np.unravel_index(p, shape)))


def test_delinearize_with_symbolic_sizes() -> None:
    s0, s1, d0, d1, d2 = (sym(n) for n in ("s0", "s1", "d0", "d1", "d2"))
    bounds = {"d0": (0, s0 - 1), "d1": (0, s1 - 1), "d2": (0, 3)}
    flat = contiguous_linear([d0, d1, d2], [s0, s1, 4])
    assert [simplify(e, bounds) for e in delinearize(flat, [s0, s1, 4])] == [d0, d1, d2]
    p = sym("d0")
    assert simplify(contiguous_linear(delinearize(p, [s0, s1, 4]), [s0, s1, 4]), {"d0": (0, s0 * s1 * 4 - 1)}) == p


@scaled
@given(TREES, st.sampled_from(SYMBOLS))
def test_split_linear(t: Tree, name: str) -> None:
    split = split_linear(t.expr, name)
    if split is None:
        return
    coefficient, rest = split
    assert name not in free_symbols(coefficient) | free_symbols(rest)
    assert coefficient * sym(name) + rest == t.expr


@pytest.mark.parametrize(("text", "bounds", "simple"), [
    ("(d0*4 + d1) // 4", {"d1": (0, 3)}, "d0"),
    ("(d0*4 + d1) % 4", {"d1": (0, 3)}, "d1"),
    ("(d0 // 8)*8 + d0 % 8", {}, "d0"),
    ("((d0 // 8)*8 + d0 % 8) * s0", {}, "d0*s0"),
    ("(d0*s0 + d1) // s0", {"d1": (0, "s0 - 1")}, "d0"),
    ("(d0*s0 + d1) % s0", {"d1": (0, "s0 - 1")}, "d1"),
    ("(d0*8 + d1) // 4", {"d1": (0, 7)}, "(d1 // 4) + d0*2"),
    ("(d0*4 + d1) // 32", {"d1": (0, 3), "d0": (0, 63)}, "(d0 // 8)"),
    ("(d0*4 + d1) % 32", {"d1": (0, 3), "d0": (0, 7)}, "d0*4 + d1"),
    ("max(d0, 0)", {"d0": (0, 9)}, "d0"),
    ("min(d0, s0)", {"d0": (0, "s0 - 1")}, "d0"),
    ("(d0 // 3) // 5", {}, "(d0 // 15)"),
    ("(d0 % 12) % 4", {}, "(d0 % 4)"),
    ("(s0*12) // 4 + (s0*12) % 4", {}, "s0*3"),
    # A position taken apart along three dimensions and put together again, as a whole, and as panel and column of a packed operand.
    ("((d0 // 3) % 3)*3 + d0 % 3 + (d0 // 9)*9", {}, "d0"),
    ("(((d0*16 + d1) // 3) % 3*3 + (d0*16 + d1) % 3 + ((d0*16 + d1) // 9)*9) // 16", {"d1": (0, 15)}, "d0"),
    ("(((d0*16 + d1) // 3) % 3*3 + (d0*16 + d1) % 3 + ((d0*16 + d1) // 9)*9) % 16", {"d1": (0, 15)}, "d1"),
    ("((d0 // 56) % 56)*56 + d0 % 56", {}, "(d0 % 3136)"),
    ("(d0 % 48) // 16", {}, "((d0 // 16) % 3)"),
    ("((((d0*16 + d1) // 56) % 56*56 + (d0*16 + d1) % 56) // 16)*7 + ((d0*16 + d1) // 3136)*1372", {"d1": (0, 15)}, "d0*7"),
])
def test_simplify(text: str, bounds: dict[str, Any], simple: str) -> None:
    ranges = {k: (lo, parse_expr(hi) if isinstance(hi, str) else hi) for k, (lo, hi) in bounds.items()}
    assert str(simplify(parse_expr(text), ranges)) == simple


@pytest.mark.parametrize(("a", "b", "bounds", "known"), [
    ("d0", "s0", {"d0": (0, "s0 - 1")}, True),
    ("d0*4 + d1", "s0*4", {"d0": (0, "s0 - 1"), "d1": (0, 3)}, True),
    ("d0*4 + d1", "s0*4", {"d0": (0, "s0 - 1"), "d1": (0, 4)}, False),
    ("d0*s1 + d1", "s0*s1", {"d0": (0, "s0 - 1"), "d1": (0, "s1 - 1")}, True),
    ("s0", "s0", {}, False), ("s0", "s0 + 1", {}, True), ("s0", "s0*2", {}, False),
    ("d0", "8", {"d0": (0, 7)}, True), ("d0", "8", {"d0": (0, None)}, False), ("0", "s0", {}, False), ("0", "s0", {"s0": (1, None)}, True),
])
def test_known_less(a: str, b: str, bounds: dict[str, Any], known: bool) -> None:
    ranges = {k: (lo, parse_expr(hi) if isinstance(hi, str) else hi) for k, (lo, hi) in bounds.items()}
    assert known_less(parse_expr(a), parse_expr(b), ranges) is known


def test_arithmetic_with_ints_gives_ints() -> None:
    s = sym("s0")
    assert (s - s, s * 0, s // s, s % s, mod(s * 6, 3), floordiv(7, 2), ceildiv(7, 2), mod(-1, 4)) == (0, 0, 1, 0, 0, 3, 4, 3)
    assert str(s + 2 - s) == "2" and as_int(s + 3 - s) == 3
    assert str(ceildiv(s, 64)) == "((s0 + 63) // 64)"
    assert fold(s * 2 + 1, lambda n: n, str, {"add": lambda a, b: f"{a}+{b}", "mul": lambda a, b: f"{a}*{b}"}) == "s0*2+1"


def test_errors() -> None:
    s = sym("s0")
    with pytest.raises(TypeError, match="truth of the symbolic expression 's0 \\+ 1' is unknown"):
        bool(s + 1)
    with pytest.raises(TypeError, match="the step must be a constant, got the symbolic expression 's0'"):
        as_int(s, "the step")
    with pytest.raises(ZeroDivisionError):
        floordiv(s, 0)
    with pytest.raises(ZeroDivisionError):
        mod(s, 0)
    with pytest.raises(KeyError):
        evaluate(s, {})
    for bad in ("s0 +", "s0 s1", "f32", "1.5", "", "max(s0)", "s0 // 0"):
        with pytest.raises((ValueError, ZeroDivisionError)):
            parse_expr(bad)
    for tree in (True, 1.5, ["add", 1], ["pow", "s0", 2], None):
        with pytest.raises(ValueError, match="not a size expression"):
            json_to_expr(tree)


def test_remembered_simplifications_keep_ranges_apart() -> None:
    """The same expression under other ranges is another question."""
    e = (sym("d0") * 3 + sym("d1")) // 3
    assert str(simplify(e, {"d0": (0, 4), "d1": (0, 2)})) == "d0"
    assert simplify(e, {"d0": (0, 4), "d1": (0, 5)}) != sym("d0")
    assert substitute(e, {"d0": 2, "d1": 1}) == 2 and substitute(e, {"d0": 2, "d1": 4}) == 3
