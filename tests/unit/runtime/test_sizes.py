from __future__ import annotations

import json
from typing import Any

import pytest
from aicc.ir.expr import Dim, ceildiv, evaluate, floordiv, maximum, minimum, mod, sym
from aicc.ir.expr_json import expr_to_json, json_to_expr
from aicc.runtime.sizes import SizeError, compile_size, compile_sizes, evaluate_size
from hypothesis import given
from hypothesis import strategies as st

POSITIONS = {"s0": 0, "s1": 1}


@st.composite
def expressions(draw: st.DrawFn, depth: int = 3) -> Dim:
    if depth == 0 or draw(st.integers(0, 3)) == 0:
        return draw(st.one_of(st.integers(-9, 9), st.sampled_from([sym("s0"), sym("s1")])))
    a, b = draw(expressions(depth - 1)), draw(expressions(depth - 1))
    divisor = draw(st.one_of(st.integers(1, 64), st.just(sym("s0") + 1)))
    return draw(st.sampled_from([lambda: a + b, lambda: a - b, lambda: a * b, lambda: floordiv(a, divisor),
                                 lambda: mod(a, divisor),
                                 lambda: maximum(a, b), lambda: minimum(a, b), lambda: ceildiv(a, divisor)]))()


@given(expressions(), st.integers(0, 1000), st.integers(0, 1000))
def test_json_and_back_and_evaluated(e: Dim, s0: int, s1: int) -> None:
    tree = json.loads(json.dumps(expr_to_json(e)))
    want = evaluate(e, {"s0": s0, "s1": s1})
    assert evaluate_size(compile_size(tree, POSITIONS), [s0, s1]) == want
    assert evaluate(json_to_expr(tree), {"s0": s0, "s1": s1}) == want


def test_constants_are_folded() -> None:
    assert compile_size(["add", ["mul", 3, 4], 2], {}) == 14
    assert compile_sizes([2, ["floordiv", 9, 2]], {}) == (2, 4)
    shape = compile_sizes([2, "s1"], POSITIONS)
    assert callable(shape) and shape([5, 7]) == (2, 7)


@pytest.mark.parametrize("tree", [None, True, 1.5, "s9", [], ["add"], ["add", 1], ["pow", 2, 3], ["floordiv", 1, 2, 3],
                                  ["floordiv", "s0", 0],
                                  ["mod", 3, -1], {"add": 1}, [["add"], 1, 2], ["__import__", "os", "s0"]])
def test_malformed(tree: Any) -> None:
    with pytest.raises(SizeError):
        compile_size(tree, POSITIONS)


def test_deep_nesting_is_refused() -> None:
    tree: Any = "s0"
    for _ in range(5000):
        tree = ["add", tree, 1]
    with pytest.raises(SizeError):
        compile_size(tree, POSITIONS)
