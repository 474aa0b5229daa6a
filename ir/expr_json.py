"""Size expressions as JSON: what the compiler writes into a manifest and `runtime/sizes.py` reads back.

A constant is a JSON integer, a symbol a string, anything else a list that starts with the operator's name:

    (s0 * 4) + max(s1, 3)   ->   ["add", ["mul", "s0", 4], ["max", 3, "s1"]]

Operators: add, mul, max, min (two or more operands), floordiv and mod (two). `json_to_expr` is the inverse.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .expr import Dim, floordiv, fold, maximum, minimum, mod, product, sym

__all__ = ["expr_to_json", "json_to_expr"]

Json = Any


def _joined(name: str) -> Callable[[Json, Json], Json]:
    """An associative operator: nested lists of the same operator are one list."""
    def join(a: Json, b: Json) -> Json:
        left = a[1:] if isinstance(a, list) and a[0] == name else [a]
        right = b[1:] if isinstance(b, list) and b[0] == name else [b]
        return [name, *left, *right]
    return join


_TO_JSON: dict[str, Callable[..., Json]] = {
    **{name: _joined(name) for name in ("add", "mul", "max", "min")},
    "floordiv": lambda a, b: ["floordiv", a, b], "mod": lambda a, b: ["mod", a, b]}


def expr_to_json(e: Dim) -> Json:
    """The JSON form of a size expression: nested lists, strings and integers."""
    return fold(e, lambda name: name, lambda n: n, _TO_JSON)


def _sum(*args: Dim) -> Dim:
    total: Dim = 0
    for a in args:
        total = total + a
    return total


_FROM_JSON: dict[str, Callable[..., Dim]] = {
    "add": _sum, "mul": lambda *args: product(args), "max": maximum, "min": minimum, "floordiv": floordiv, "mod": mod}


def json_to_expr(tree: Json) -> Dim:
    """The expression that `tree` stands for; ValueError if it is no size expression."""
    if isinstance(tree, int) and not isinstance(tree, bool):
        return tree
    if isinstance(tree, str):
        return sym(tree)
    if isinstance(tree, list) and len(tree) >= 3 and isinstance(tree[0], str) and tree[0] in _FROM_JSON:
        return _FROM_JSON[tree[0]](*map(json_to_expr, tree[1:]))
    raise ValueError(f"not a size expression: {tree!r}")
