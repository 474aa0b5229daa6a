"""Which steps of a block the conditions of a stream's masks leave to a tile of rows, on CPUs: found while the kernel runs, from the data itself.

A condition such as `mask[q, k]`, `doc[q] == doc[k]` or `k < lengths[b]`, or a float mask that is added, is a tree (`passes/mask_tree.py`). It is
computed for a register tile of points at a time, and a panel of steps is left out at both ends of a block where it holds at no point of the panel.
What a tree does not know (gathers, comparisons of floats) counts as holding.

    possible(lowering, e, ("and", a, b), at, mask)      a tile of i1 that is true wherever the tree can hold; None if nothing is known
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...ir import Dim, TileType, Value, element_type
from ...ir.expr import free_symbols, product, substitute
from ...ir.ranges import simplify
from ...ir.types import DTYPES
from ..mask_tree import COMPARISONS, Tree, parts_of
from ..stream_form import Stream
from .emit import Emitter, Pair
from .stream import StreamLowering, offset_in

__all__ = ["alive_panels", "deciding"]

I1, I64 = DTYPES["i1"], DTYPES["i64"]
WORK_OF_A_PART = 4
"""Multiplications of a point of the middle space from which a part of a tree is worth being computed once more: a part is an operation or two for
each vector of points, a multiplication half a cycle. At 64 + 64 multiplications and a mask in memory, 3 % where nothing is left out."""


def deciding(s: Stream) -> list[Tree]:
    """The conditions that are worth asking before a tile is computed."""
    width = sum((product(op["dims"][len(s.position[op]):]) for op in s.firsts), 0) + len(s.seconds) * product(s.columns)
    known = [t for t in (*s.alive.data, *s.alive.added) if _known(t, True)]
    return [t for t in known if not isinstance(width, int) or WORK_OF_A_PART * sum(1 for _ in parts_of(t)) <= width]


def _known(t: Tree, truth: bool) -> bool:
    """Whether there is anything to be computed for "`t` is `truth`": what `possible` makes is not None."""
    name, *args = t
    if name == "not":
        return _known(args[0], not truth)
    if name in ("and", "or"):
        return (any if (name == "and") == truth else all)(_known(a, truth) for a in args)
    if name == "added":
        return truth
    return name in (*COMPARISONS, "holds") and all(map(_computable, (p for a in args for p in parts_of(a))))


def _computable(t: Tree) -> bool:
    """Nothing that may trap past the ends, where 0 is read: divisions are by numbers."""
    return t[0] in ("load", "at", "number") or t[0] == "arith" and (
        not any(x in t[1] for x in ("div", "mod", "rem")) or t[-1][0] == "number")


def possible(low: StreamLowering, e: Emitter, t: Tree, at: Mapping[str, Dim], mask: Sequence[Pair], truth: bool = True) -> Value | None:
    """See the module docstring. `at`: the frame's position; `mask`: what must hold for steps to be inside."""
    name, *args = t
    b = e.builder
    if not _known(t, truth):
        return None
    if name == "not":
        return possible(low, e, args[0], at, mask, not truth)
    if name in ("and", "or"):
        sides = [v for v in (possible(low, e, a, at, mask, truth) for a in args) if v is not None]
        return sides[0] if len(sides) == 1 else b.arith("and" if (name == "and") == truth else "or", *sides)
    if name == "added":
        return b.arith("ne", b.cast(_scalar(low, e, args[0], at, mask), DTYPES["f32"]), float("-inf"))
    sides = _alike(e, [_scalar(low, e, a, at, mask) for a in args])
    if name != "holds":
        made = b.arith(name, *sides)
    else:
        made = sides[0] if element_type(sides[0].type) == I1 else b.arith("ne", sides[0], 0)
    return made if truth else b.arith("bitnot", made)


def _scalar(low: StreamLowering, e: Emitter, t: Tree, at: Mapping[str, Dim], mask: Sequence[Pair]) -> Value:
    from_ = t[0]
    if from_ == "load":
        offset = offset_in(t[1], t[2], dict(at), e.bounds())
        return e.load(low.buffers[t[1]], offset, e.needed([p for p in mask if free_symbols(p[0]) & free_symbols(offset)]))
    if from_ == "at":
        return e.index_value(simplify(substitute(t[1], at), e.bounds()))
    if from_ == "number":
        return e.builder.constant(t[1], t[2])
    _, name, attributes, dtype, *rest = t
    args = [_scalar(low, e, a, at, mask) for a in rest]
    if name == "arith.cast":
        return e.builder.cast(args[0], dtype)
    made = e.builder.arith(name.removeprefix("arith."), *args[:-2], *_alike(e, args[-2:]))
    made.defining_op.attributes |= dict(attributes)  # type: ignore[union-attr]
    return made


def _alike(e: Emitter, values: list[Value]) -> list[Value]:
    """Operands of one type: a tree does not say which integers a position is counted in."""
    return values if len({element_type(v.type) for v in values}) == 1 else [e.builder.cast(v, I64) for v in values]


def alive_panels(low: StreamLowering, e: Emitter, trees: Sequence[Tree], start: Dim, panels: Dim, place, slots: Value) -> tuple[Dim, Dim]:  # type: ignore[no-untyped-def]
    """(first, end) of the panels of a block, of those from `start` to `panels`, between which all trees can hold; first >= end if they can nowhere.
    `place(q)`: the frame's position and the mask of steps of panel q; `slots`: memory for two i64."""
    none = [e.broadcast(e.builder.constant(v, I64), (1, 1)) for v in (1 << 30, 0)]

    def ask(x: Emitter, q: Dim, found: list[Value]) -> list[Value]:
        b = x.builder
        at, mask = place(q)
        hold = x.mask_value(mask)  # past the end, where 0 is read, nothing counts
        for t in trees:
            made = possible(low, x, t, at, mask)
            assert made is not None
            hold = made if hold is None else b.arith("and", hold, made)
        assert hold is not None
        if not isinstance(hold.type, TileType):
            hold = x.broadcast(hold, (1, 1))
        rows, steps = hold.type.shape  # type: ignore[attr-defined]
        if rows != 1:
            hold = b.op("tile.reduce", hold, type=TileType((1, steps), I1), axis=0, kind="any")
        if steps != 1:
            hold = b.op("tile.reduce", hold, type=TileType((1, 1), I1), axis=1, kind="any")
        here, after = (x.broadcast(x.index_value(n), (1, 1)) for n in (q, q + 1))
        return [b.arith("min", found[0], b.arith("select", hold, here, none[0])),
                b.arith("max", found[1], b.arith("select", hold, after, none[1]))]

    for k, v in enumerate(e.loop(start, panels, 1, none, ask)):
        e.store(slots, v, k)
    first, end = (e.fresh(e.load(slots, k), 0, panels) for k in (0, 1))
    return first, end
