"""How a value that is summed depends on an earlier reduction of the same row, and whether the dependence can be rescaled.

  exp(x - m)    with m a running maximum: when m grows to m', what was summed so far is multiplied by exp(m - m')   ("shift")
  x * w, x / w  with w any value of the row: linear, so it can be applied once, to the finished sum                  ("scale")

These are the homomorphisms that let two dependent reductions become one pass; streams and online softmax are made of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..ir import Operation, Value, element_type

__all__ = ["FREE", "Declined", "Dependence", "Factor"]


class Declined(Exception):
    """It does not work out; the text says why."""


@dataclass(frozen=True)
class Factor:
    """How a scalar of the inner space depends on row values: "free", not at all; "row", it is `value`; "linear", it is `value` but for a rounding,
    a sign or a choice of 0; "shift", something minus `value`; "product", something times exp(-value), if there is one, and times the `scales`.

    A scale is (row value, "mul" or "div", guarded): guarded by a select of 0 outside of it, which hides a NaN of the row. `guarded`: exp is."""

    kind: str
    value: Value | None = None
    scales: tuple[tuple[Value, str, bool], ...] = ()
    guarded: bool = False


FREE = Factor("free")
_LINEAR = ("row", "linear")


def _opaque() -> Factor:
    raise Declined("a reduction depends on an earlier one in a way that cannot be rescaled")



def _merge(a: Factor, b: Factor, kind: str) -> Factor:
    """The factor of a * b or a / b (kind "mul" or "div"), where at most one is a shift."""
    if "shift" in (a.kind, b.kind):
        return _opaque()
    if a.kind in _LINEAR:
        return _merge(b, a, kind) if kind == "mul" and b.kind not in _LINEAR else _opaque()
    if b.kind in _LINEAR:
        assert b.value is not None
        return Factor("product", a.value if a.kind == "product" else None, (*a.scales, (b.value, kind, False)), a.guarded)
    if (b.kind == "product" and kind == "div") or (a.value is not None and b.value is not None):
        return _opaque()
    return FREE if a.kind == b.kind == "free" else Factor("product", a.value or b.value, (*a.scales, *b.scales),
                                                                          a.guarded or b.guarded)


class Dependence:
    """Memoised factors of the scalars in members' bodies. `kind_of(v)` says what a tensor is: "full" (of the inner space, computed by a member),
    "reduction" or "row" (one value per row, which depends on reductions), or anything else."""

    def __init__(self, kind_of: Callable[[Value], str]):
        self.kind_of = kind_of
        self.known: dict[Value, Factor] = {}

    def of(self, op: Operation, scalar: Value) -> Factor:
        if scalar not in self.known:
            self.known[scalar] = self._compute(op, scalar)
        return self.known[scalar]

    def _compute(self, op: Operation, x: Value) -> Factor:
        inner = x.defining_op
        if inner is None:
            v = op.operands[x.index]  # type: ignore[attr-defined]
            kind = self.kind_of(v)
            if kind == "full":
                made = v.defining_op
                assert made is not None
                return self.of(made, made.body.terminator.operands[made.results.index(v)])  # type: ignore[arg-type]
            return Factor("row", v) if kind in ("reduction", "row") else FREE
        args = [self.of(op, a) for a in inner.operands]
        return self._rule(inner, args)

    def _rule(self, inner: Operation, args: list[Factor]) -> Factor:
        if all(a.kind == "free" for a in args):
            return FREE
        name = inner.name.removeprefix("arith.")
        if name == "sub" and args[0].kind == "free" and args[1].kind == "row":
            return Factor("shift", args[1].value)
        if name == "exp" and args[0].kind == "shift":
            return Factor("product", args[0].value)
        if name in ("mul", "div"):
            return _merge(args[0], args[1], name)
        if name in ("cast", "neg") and args[0].kind in ("product", *_LINEAR):
            to = element_type(inner.result.type)
            if not to.is_float or (to.name == "f16" and args[0].scales and args[0].value is None):
                return _opaque()  # without its scales the product may be too large
            return _linear(args[0])
        if name == "select" and args[0].kind == "free":
            return self._choice(inner, args)
        return _opaque()

    def _choice(self, inner: Operation, args: list[Factor]) -> Factor:
        sides = [(a, v) for a, v in zip(args[1:], inner.operands[1:], strict=True) if not _is_zero(v)]
        found = sides[0][0]
        if len(sides) == 1 and found.kind in ("product", *_LINEAR):
            return replace(_linear(found), scales=tuple((w, kind, True) for w, kind, _ in found.scales), guarded=True)
        return found if len(sides) == 2 and found == sides[1][0] and found.kind == "product" else _opaque()


def _linear(f: Factor) -> Factor:
    """The factor of what is proportional to a value with factor `f`."""
    return replace(f, kind="linear") if f.kind == "row" else f


def _is_zero(v: Value) -> bool:
    return v.defining_op is not None and v.defining_op.name == "arith.constant" and v.defining_op["value"] == 0
