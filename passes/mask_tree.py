"""Conditions of a stream's masks as trees of integers, which `block_ranges.py` evaluates for whole blocks of positions.

    ("and" | "or", tree, tree)      ("not", tree)       ("holds", scalar)       (comparison, scalar, scalar)       UNKNOWN

    ("load", tensor, positions)     ("extract", tensor, checked, scalar...)     ("at", expression)
    ("number", value, type)         ("arith", name, attributes, type, scalar...)

    ("added", load)      of a float mask that is added to scores: it is not -inf. Only CPUs ask it (`tiling/conditions.py`)

Positions are expressions over the stream's frame. Trees are plain tuples: two members that ask the same have equal ones. Nothing is known by
name: a condition is whatever the body computes from integers that are loaded, gathered or positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..ir import Dim, Operation, Value, element_type, sym
from ..ir.dialects.tensor import fill_of
from ..ir.expr import free_symbols, substitute

if TYPE_CHECKING:
    from .stream_form import Stream

__all__ = ["COMPARISONS", "UNKNOWN", "Tree", "added_mask", "loads_data", "parts_of", "symbols_of", "tree_of"]

Tree = tuple[Any, ...]
UNKNOWN: Tree = ("unknown",)
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")


def tree_of(s: Stream, op: Operation, condition: Value, truth: bool = True) -> Tree:
    """That the scalar `condition` of the body of `op`, a member of `s`, is `truth`."""
    made = _condition(s, op, condition)
    return made if truth else ("not", made)


def _condition(s: Stream, op: Operation, c: Value) -> Tree:
    inner = c.defining_op
    if inner is None:
        source = _pointwise_member(s, op, c)
        if source is not None:
            return _condition(s, *source)
    else:
        name = inner.name.removeprefix("arith.")
        if name == "bitnot":
            return ("not", _condition(s, op, inner.operands[0]))
        if name in ("and", "or"):
            return (name, *(_condition(s, op, v) for v in inner.operands))
        if name in COMPARISONS:
            sides = [_scalar(s, op, v) for v in inner.operands]
            return UNKNOWN if None in sides else (name, *sides)
    x = _scalar(s, op, c)
    return UNKNOWN if x is None else ("holds", x)


def _pointwise_member(s: Stream, op: Operation, arg: Value) -> tuple[Operation, Value] | None:
    """(member, scalar it yields) where an argument of op's body is another pointwise member's result."""
    made = op.operands[arg.index].defining_op  # type: ignore[attr-defined]
    if made is None or made not in s.full and made not in s.row:
        return None
    return made, made.body.terminator.operands[made.results.index(op.operands[arg.index])]  # type: ignore[attr-defined, arg-type]


def _scalar(s: Stream, op: Operation, v: Value) -> Tree | None:
    """An integer or a boolean; None if it is, or comes from, anything else."""
    if not _is_whole(v):
        return None
    inner = v.defining_op
    if inner is None:
        return _read(s, op, v)
    if inner.name == "tensor.index":
        return ("at", (*s.position[op], *(sym(f) for f in s.stream))[inner["dim"]])
    if inner.name == "tensor.sym":
        return ("at", inner["expr"])
    if inner.name == "arith.constant":
        return ("number", inner["value"], element_type(v.type))
    if inner.name == "tensor.extract":
        source, *indices = inner.operands
        args = [_scalar(s, op, x) for x in indices]
        tensor = op.operands[source.index]  # type: ignore[attr-defined]
        return None if None in args or s.kind_of(tensor) else ("extract", tensor, bool(inner["check"]), *args)
    if inner.name.startswith("arith."):
        args = [_scalar(s, op, x) for x in inner.operands]
        return None if None in args else ("arith", inner.name, tuple(sorted(inner.attributes.items())), element_type(v.type), *args)
    return None


def _read(s: Stream, op: Operation, arg: Value) -> Tree | None:
    source = _pointwise_member(s, op, arg)
    if source is not None:
        return _scalar(s, *source)
    i = arg.index  # type: ignore[attr-defined]
    v, m = op.operands[i], op["maps"][i]
    if m is None or s.kind_of(v) or fill_of(op, i) is not None:
        return None
    at = {f"d{j}": x for j, x in enumerate((*s.position[op], *(sym(f) for f in s.stream)))}
    return ("load", v, tuple(substitute(e, at) for e in m))


def added_mask(s: Stream, op: Operation, i: int) -> Tree | None:
    """That operand `i` of the member `op`, floats from outside that move along the stream, is not -inf; None if it is anything else."""
    v, m = op.operands[i], op["maps"][i]
    if m is None or not element_type(v.type).is_float or element_type(v.type).bits > 32 or fill_of(op, i) is not None:
        return None
    at = {f"d{j}": x for j, x in enumerate((*s.position[op], *(sym(f) for f in s.stream)))}
    places = tuple(substitute(e, at) for e in m)
    return ("added", ("load", v, places)) if set().union(*(free_symbols(e) for e in places)) & set(s.stream) else None


def _is_whole(v: Value) -> bool:
    t = element_type(v.type)
    return t.kind in ("int", "bool") or (t.kind == "uint" and t.bits < 64)


def parts_of(t: Tree) -> Iterator[Any]:
    """The tree and all trees within."""
    yield t
    for x in t:
        if isinstance(x, tuple) and x and isinstance(x[0], str):
            yield from parts_of(x)


def loads_data(t: Tree) -> bool:
    """Whether anything in the tree is read from memory."""
    return any(x[0] in ("load", "extract") for x in parts_of(t))


def symbols_of(t: Tree) -> set[str]:
    """Symbols in the positions of a tree."""
    found: set[str] = set()
    for x in parts_of(t):
        exprs: tuple[Dim, ...] = x[2] if x[0] == "load" else (x[1],) if x[0] == "at" else ()
        found |= set().union(*(free_symbols(e) for e in exprs))
    return found
