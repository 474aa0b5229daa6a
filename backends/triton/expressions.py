"""Index expressions as Triton text.

    text = IndexText({"i0": ("pid0", (0, 7))}, shape=(16, 64), arange=...)
    text(offset)                                  # "pid0*1024 + r16*64 + c64"

Triton's `//` and `%` on signed integers round toward zero; ours round down. They agree for non-negative dividends, which
ranges mostly
prove; where they do not, the helpers `floor_div` and `floor_mod` are called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...ir.expr import Atom, Dim, Expr, FloorDiv, Max, Min, Sym, free_symbols
from ...ir.ranges import known_nonnegative, lower_bound

__all__ = ["IndexText", "axis_of"]

Range = tuple[Dim | None, Dim | None]


def axis_of(symbol: str) -> int | None:
    """k for a position symbol `t<k>`, else None."""
    return int(symbol[1:]) if symbol[0] == "t" and symbol[1:].isdigit() else None


class IndexText:
    """Writes expressions over `operands` (name -> (text, range)), size symbols with ranges `sizes`, and positions in a
    tile of `shape`.

    `arange(axis, size, rank)` gives the name of a position vector along an axis; along axes of size 1 the position is 0.
    """

    def __init__(
        self,
        operands: Mapping[str, tuple[str, Range]],
        sizes: Mapping[str, Range],
        shape: Sequence[int],
        arange: Callable[[int, int, int], str],
    ):
        self.operands, self.shape, self.arange = operands, shape, arange
        self.bounds: dict[str, Any] = {
            **sizes,
            **{name: r for name, (_, r) in operands.items()},
            **{f"t{k}": (0, n - 1) for k, n in enumerate(shape)},
        }

    def __call__(self, e: Dim) -> str:
        """`e` as text with the precedence of a sum."""
        if isinstance(e, int):
            return str(e)
        parts: list[str] = []
        for monomial, c in e.terms:
            factors = [self._atom(a) for a in monomial]
            if "0" in factors:
                continue
            magnitude = "*".join([*factors, *([str(abs(c))] if abs(c) != 1 else [])])
            parts.append((" + " if c > 0 else " - ") + magnitude if parts else magnitude if c > 0 else f"-{magnitude}")
        if e.const or not parts:
            parts.append(str(e.const) if not parts else f" {'+' if e.const > 0 else '-'} {abs(e.const)}")
        return "".join(parts)

    def axes(self, e: Dim) -> set[int]:
        """The tile axes of size > 1 that the value of `e` varies along (operands that are tiles not counted)."""
        return {k for s in free_symbols(e) if (k := axis_of(s)) is not None and self.shape[k] != 1}

    def _atom(self, a: Atom) -> str:
        if isinstance(a, Sym):
            return self._symbol(a.key)
        args = [self(x) for x in a.args]
        if isinstance(a, (Max, Min)):
            function = "tl.maximum" if isinstance(a, Max) else "tl.minimum"
            text = args[0]
            for x in args[1:]:
                text = f"{function}({text}, {x})"
            return text
        helper, operator = ("floor_div", "//") if isinstance(a, FloorDiv) else ("floor_mod", "%")
        if not self._nonnegative(a.args[0]):
            return f"{helper}({args[0]}, {args[1]})"
        return f"({_group(a.args[0], args[0])} {operator} {_group(a.args[1], args[1])})"

    def _symbol(self, name: str) -> str:
        if name in self.operands:
            return self.operands[name][0]
        axis = axis_of(name)
        if axis is None:
            return name
        return "0" if self.shape[axis] == 1 else self.arange(axis, self.shape[axis], len(self.shape))

    def _nonnegative(self, e: Dim) -> bool:
        low = lower_bound(e, self.bounds)
        return low is not None and known_nonnegative(low)


def _group(e: Dim, text: str) -> str:
    simple = isinstance(e, int) or (
        isinstance(e, Expr) and not e.const and len(e.terms) == 1 and e.terms[0][1] == 1 and len(e.terms[0][0]) == 1
    )
    return text if simple else f"({text})"
