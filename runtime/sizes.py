"""Size expressions at run time: JSON trees (see `ir/expr_json.py`) become integers or closures over the symbol values.

    size = compile_size(["add", ["mul", "s0", 4], 3], {"s0": 0})
    size([10])                                                      # 43

Nothing is ever handed to `eval`: a manifest comes from disk.
Semantics of floordiv and mod are Python's (toward minus infinity).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, Union

__all__ = ["Size", "SizeError", "compile_size", "compile_sizes", "evaluate_size"]

Symbols = Sequence[int]
Size = Union[int, Callable[[Symbols], int]]
"""A constant, or a function of the symbol values in the order of the program's symbols."""

MAX_DEPTH = 100


class SizeError(ValueError):
    """A tree that is no size expression, or names an unknown symbol."""


def compile_size(tree: Any, positions: Mapping[str, int], depth: int = 0) -> Size:
    """`tree` as an int when constant, else as a closure over the list of symbol values.

    `positions` gives each symbol's place in that list. SizeError for a malformed tree or unknown symbol.
    """
    if isinstance(tree, int) and not isinstance(tree, bool):
        return tree
    if isinstance(tree, str):
        return _symbol(tree, positions)
    if not isinstance(tree, (list, tuple)) or len(tree) < 3 or not isinstance(tree[0], str) or (
            tree[0] not in _MAKERS or depth > MAX_DEPTH):
        raise SizeError("not a size expression, or one that is nested too deeply")
    name, binary = tree[0], tree[0] in ("floordiv", "mod")
    if binary and len(tree) != 3:
        raise SizeError(f"'{name}' takes two operands, got {len(tree) - 1}")
    args = [compile_size(x, positions, depth + 1) for x in tree[1:]]
    return _MAKERS[name](args)


def _symbol(name: str, positions: Mapping[str, int]) -> Size:
    if name not in positions:
        raise SizeError(f"unknown size symbol '{name}'; known: {', '.join(positions)}")
    at = positions[name]
    return lambda s: s[at]


def _associative(combine: Callable[[list[int]], int]) -> Callable[[list[Size]], Size]:
    def make(args: list[Size]) -> Size:
        constants = [a for a in args if isinstance(a, int)]
        functions = [a for a in args if not isinstance(a, int)]
        if not functions:
            return combine(constants)
        known = [combine(constants)] if constants else []
        return lambda s: combine([*known, *[f(s) for f in functions]])
    return make


def _binary(combine: Callable[[int, int], int]) -> Callable[[list[Size]], Size]:
    def make(args: list[Size]) -> Size:
        a, b = args
        if isinstance(b, int):
            if b <= 0:
                raise SizeError(f"a division by {b}")
            constant = b
            if isinstance(a, int):
                return combine(a, b)
            f = a
            return lambda s: combine(f(s), constant)
        g = b
        if isinstance(a, int):
            numerator = a
            return lambda s: combine(numerator, g(s))
        f = a
        return lambda s: combine(f(s), g(s))
    return make


_MAKERS: dict[str, Callable[[list[Size]], Size]] = {
    "add": _associative(sum), "mul": _associative(prod), "max": _associative(max), "min": _associative(min),
    "floordiv": _binary(lambda a, b: a // b), "mod": _binary(lambda a, b: a % b),
}


def evaluate_size(size: Size, symbols: Symbols) -> int:
    """The value of a compiled size."""
    return size if isinstance(size, int) else size(symbols)


def compile_sizes(trees: Sequence[Any], positions: Mapping[str, int]) -> tuple[int, ...] | Callable[[Symbols], tuple[int, ...]]:
    """A shape or strides: a tuple when all entries are constant, else a closure that gives the tuple."""
    sizes = tuple(compile_size(t, positions) for t in trees)
    if all(isinstance(x, int) for x in sizes):
        return sizes  # type: ignore[return-value]
    return lambda s: tuple([x if isinstance(x, int) else x(s) for x in sizes])
