"""Where a stream's middle space contributes nothing, as inequalities between positions.

A score of -inf, which becomes a weight of 0, is the neutral element of every reduction that reads it: tiles that are masked throughout can be
skipped, and tiles that are masked nowhere need no mask. The inequalities are read off the bodies: select(position comparison, -inf, x), through what
keeps -inf (adding, scaling by a positive constant) and what makes it 0 (exp) and keeps 0 (products).

What a condition asks of loaded numbers (documents, lengths) says nothing while compiling: it is kept as a tree (`mask_tree.py`), which
`block_ranges.py` evaluates for blocks of positions when the kernel runs.

So are float masks that are added: where -inf is loaded, nothing is left.

A skipped weight multiplies nothing: where the other operand is infinite or NaN under the mask, 0 * inf does not spoil the row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..ir import Dim, Operation, Value, element_type, sym
from ..ir.expr import substitute
from ..ir.ranges import simplify
from .mask_tree import Tree, added_mask, loads_data, tree_of

if TYPE_CHECKING:
    from .stream_form import Stream

__all__ = ["Alive", "dead_where"]

Pair = tuple[Dim, Dim]
_COMPARISONS = {"lt": (0, 1, 0), "le": (0, 1, 1), "gt": (1, 0, 0), "ge": (1, 0, 1)}
"""name -> (smaller operand, larger operand, 1 if equality counts): a < b + 1 is a <= b."""
_NEGATED = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt"}


@dataclass
class Alive:
    """Points outside of `pairs` (each a < b, over the frame) contribute nothing, nor do those where a tree of `data` does not hold. Where all pairs
    hold, the conditions in `known` have these values; where all of `data` does, those in `known_by_data` do. `added`: trees ("added", load) of floats
    that are -inf at points that contribute nothing."""

    pairs: list[Pair] = field(default_factory=list)
    known: dict[Value, bool] = field(default_factory=dict)
    data: list[Tree] = field(default_factory=list)
    known_by_data: dict[Value, bool] = field(default_factory=dict)
    added: list[Tree] = field(default_factory=list)


@dataclass
class _Site:
    """A select whose condition decides: alive points have `truth`, which implies `pairs`, and is implied by them if `complete`.
    `tree` says it whole."""

    condition: Value
    truth: bool
    pairs: frozenset[Pair]
    complete: bool
    tree: Tree


def dead_where(s: Stream) -> Alive:
    """The pairs that every reduction and second contraction of the stream agrees on."""
    reader = _Reader(s)
    common: frozenset[Pair | Tree] | None = None
    for op in [*s.reductions, *s.seconds]:
        pairs = reader.of_reduction(op)
        common = pairs if common is None else common & pairs
    found = common or frozenset()
    alive: list[Pair] = sorted((p for p in found if not isinstance(p[0], str)), key=str)  # type: ignore[misc]
    trees = list(dict.fromkeys(site.tree for site in reader.sites if site.tree in found))
    return Alive(alive, {site.condition: site.truth for site in reader.sites if site.complete and site.pairs <= set(alive)}, trees,
                 {site.condition: site.truth for site in reader.sites if site.tree in found},
                 sorted((t for t in found if t[0] == "added"), key=str))  # type: ignore[misc]


class _Reader:
    def __init__(self, s: Stream):
        self.s = s
        self.sites: list[_Site] = []
        self.memo: dict[tuple[Value, str], frozenset[Pair | Tree]] = {}

    def of_reduction(self, op: Operation) -> frozenset[Pair | Tree]:
        if op in self.s.seconds:
            return self._operand(op, self.s.streamed(op), "zero")
        wanted = {"max": "low", "sum": "zero"}
        found = [self._of(op, y, wanted[c]) if c in wanted else frozenset() for c, y in zip(
            op["combine"], op.body.terminator.operands, strict=True)]
        return frozenset.intersection(*found)

    def _operand(self, op: Operation, v: Value, want: str) -> frozenset[Pair | Tree]:
        made = v.defining_op
        if made is None or made not in self.s.full:
            return frozenset()
        return self._of(made, made.body.terminator.operands[made.results.index(v)], want)  # type: ignore[arg-type]

    def _of(self, op: Operation, x: Value, want: str) -> frozenset[Pair | Tree]:
        """Pairs (and trees) outside of which the scalar `x` of op's body is -inf (want "low") or 0 ("zero")."""
        if (x, want) not in self.memo:
            self.memo[x, want] = self._compute(op, x, want)
        return self.memo[x, want]

    def _compute(self, op: Operation, x: Value, want: str) -> frozenset[Pair | Tree]:
        inner = x.defining_op
        if inner is None:
            v = op.operands[x.index]  # type: ignore[attr-defined]
            added = added_mask(self.s, op, x.index) if want == "low" and not self.s.kind_of(v) else None  # type: ignore[attr-defined]
            return frozenset({added}) if added is not None else self._operand(op, v, want)
        name, args = inner.name.removeprefix("arith."), inner.operands
        if name == "select":
            return self._select(op, inner, want)
        if name == "cast":
            return self._of(op, args[0], want) if element_type(args[0].type).is_float and element_type(x.type).is_float else frozenset()
        if want == "low":
            if name == "add":
                return self._of(op, args[0], want) | self._of(op, args[1], want)
            if name == "sub" or (name in ("mul", "div") and _positive(args[1])):
                return self._of(op, args[0], want)
            return self._of(op, args[1], want) if name == "mul" and _positive(args[0]) else frozenset()
        if name in ("exp", "exp2"):
            return self._of(op, args[0], "low")
        if name == "mul":
            return self._of(op, args[0], want) | self._of(op, args[1], want)
        if name in ("add", "sub"):
            return self._of(op, args[0], want) & self._of(op, args[1], want)
        return self._of(op, args[0], want) if name in ("div", "neg") else frozenset()

    def _select(self, op: Operation, inner: Operation, want: str) -> frozenset[Pair | Tree]:
        condition, yes, no = inner.operands
        neutral = -math.inf if want == "low" else 0
        if _is_constant(yes, neutral):
            truth, rest = False, no
        elif _is_constant(no, neutral):
            truth, rest = True, yes
        else:
            return self._of(op, yes, want) & self._of(op, no, want)
        pairs, complete = self._implied(op, condition, truth)
        tree = tree_of(self.s, op, condition, truth)
        self.sites.append(_Site(condition, truth, pairs, complete, tree))
        return pairs | ({tree} if loads_data(tree) else frozenset()) | self._of(op, rest, want)

    def _implied(self, op: Operation, c: Value, truth: bool) -> tuple[frozenset[Pair], bool]:
        """What holds if `c` is `truth`, and whether that is all that it says."""
        inner = c.defining_op
        if inner is None:  # another member makes it
            v = op.operands[c.index]  # type: ignore[attr-defined]
            made = v.defining_op
            if made is None or made not in self.s.full:
                return frozenset(), False
            return self._implied(made, made.body.terminator.operands[made.results.index(v)], truth)  # type: ignore[union-attr, arg-type]
        name = inner.name.removeprefix("arith.")
        if name == "bitnot":
            return self._implied(op, inner.operands[0], not truth)
        if name == ("and" if truth else "or"):
            (a, whole_a), (b, whole_b) = (self._implied(op, v, truth) for v in inner.operands)
            return a | b, whole_a and whole_b
        if name in _COMPARISONS:
            sides = [self._position(op, v) for v in inner.operands]
            if None not in sides:
                small, large, slack = _COMPARISONS[name if truth else _NEGATED[name]]
                low, high = sides[small], sides[large]
                assert low is not None and high is not None
                return frozenset({_normal(low, high + slack)}), True
        return frozenset(), False

    def _position(self, op: Operation, v: Value) -> Dim | None:
        """An integer scalar as an expression over the frame."""
        inner = v.defining_op
        if inner is None:
            return None
        name = inner.name
        if name == "tensor.index":
            at = (*self.s.position[op], *(sym(f) for f in self.s.stream))
            return at[inner["dim"]]
        if name == "tensor.sym":
            return inner["expr"]
        if name == "arith.constant":
            return int(inner["value"]) if element_type(v.type).kind == "int" else None
        if name in ("arith.add", "arith.sub", "arith.mul", "arith.cast"):
            args = [self._position(op, a) for a in inner.operands]
            if any(a is None for a in args) or element_type(v.type).kind != "int":
                return None
            if name == "arith.cast":
                return args[0] if element_type(v.type).bits >= 32 else None  # positions have at most 31
            a, b = args
            assert a is not None and b is not None
            return a + b if name == "arith.add" else a - b if name == "arith.sub" else a * b
        return None


def _normal(a: Dim, b: Dim) -> Pair:
    """0 < b - a: one form for all ways to write an inequality."""
    return 0, simplify(substitute(b - a, {}), {})


def _is_constant(v: Value, value: float) -> bool:
    return v.defining_op is not None and v.defining_op.name == "arith.constant" and v.defining_op["value"] == value


def _positive(v: Value) -> bool:
    return v.defining_op is not None and v.defining_op.name == "arith.constant" and v.defining_op["value"] > 0

