"""How a value that is summed depends on an earlier reduction of the same row, and whether the dependence can be rescaled.

  exp(x - m)    with m a running maximum: when m grows to m', what was summed so far is multiplied by exp(m - m')   ("shift");
                the same with 0 in place of an m of -inf, which makes the sum of nothing 0 and not NaN
  x * w, x / w  with w any value of the row: linear, so it can be applied once, to the finished sum                  ("scale")
  (x - mean)^2  with the mean of the same x: the sum of squares is corrected by how far the running mean moves       (`about_mean`)

These are the homomorphisms that let two dependent reductions become one pass; streams and online softmax are made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from ..ir import Operation, Value, element_type

__all__ = ["FREE", "Declined", "Dependence", "Factor", "TooLarge", "about_mean", "finite_of"]


class Declined(Exception):
    """It does not work out; the text says why."""


class TooLarge(Declined):
    """`rounding` casts to 16 bits what may be too large for them until it is scaled."""

    def __init__(self, rounding: Operation):
        super().__init__("weights may be too large for float16 until they are scaled")
        self.rounding = rounding


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
    if "shift" in (a.kind, b.kind) or any(f.kind == "row" and f.guarded for f in (a, b)):
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
    "reduction" or "row" (one value per row, which depends on reductions), or anything else. `infinite`: a maximum is also made finite by 0 in
    place of both infinities (then exp(x - m) is inf where x is, and not NaN: for those who can merge that)."""

    def __init__(self, kind_of: Callable[[Value], str], *, infinite: bool = False):
        self.kind_of, self.infinite = kind_of, infinite
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
            if kind == "row" and (m := finite_of(v, infinite=self.infinite)) is not None and self.kind_of(m) == "reduction":
                return Factor("row", m, guarded=True)
            return Factor("row", v) if kind in ("reduction", "row") else FREE
        y = _made_finite(x, self.infinite)
        if y is not None and (f := self.of(op, y)).kind == "row":
            return replace(f, guarded=True)
        args = [self.of(op, a) for a in inner.operands]
        return self._rule(inner, args)

    def _rule(self, inner: Operation, args: list[Factor]) -> Factor:
        if all(a.kind == "free" for a in args):
            return FREE
        name = inner.name.removeprefix("arith.")
        if name == "sub" and args[0].kind == "free" and args[1].kind == "row":
            return Factor("shift", args[1].value, guarded=args[1].guarded)
        if name == "exp" and args[0].kind == "shift":
            return Factor("product", args[0].value, guarded=args[0].guarded)
        if name in ("mul", "div"):
            return _merge(args[0], args[1], name)
        if name in ("cast", "neg") and args[0].kind in ("product", *_LINEAR):
            to = element_type(inner.result.type)
            if to.name == "f16" and args[0].scales and args[0].value is None:
                raise TooLarge(inner)
            if not to.is_float:
                return _opaque()
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


def finite_of(v: Value, *, infinite: bool = False) -> Value | None:
    """m where the tensor `v` is m, or 0 where m is -inf (or, with `infinite`, inf): the same shift, but that exp(-inf - m) is 0 even if everything
    is -inf."""
    op = v.defining_op
    if op is None or op.name != "tensor.generic" or len(op.operands) != 1 or op["reductions"]:
        return None
    return op.operands[0] if _made_finite(op.body.terminator.operands[0], infinite) is op.body.args[0] else None


def _made_finite(x: Value, infinite: bool) -> Value | None:
    """y where the scalar x is select(y == -inf, 0, y), or (`infinite`) select(isinf(y), 0, y)."""
    choice = x.defining_op
    if choice is None or choice.name != "arith.select" or not _is_zero(choice.operands[1]):
        return None
    test, y = choice.operands[0].defining_op, choice.operands[2]
    if infinite and test is not None and test.name == "arith.isinf" and test.operands[0] is y:
        return y
    if test is None or test.name != "arith.eq" or test.operands[0] is not y:
        return None
    low = test.operands[1].defining_op
    return y if low is not None and low.name == "arith.constant" and low["value"] == float("-inf") else None


def _linear(f: Factor) -> Factor:
    """The factor of what is proportional to a value with factor `f`."""
    if f.kind == "row" and f.guarded:
        return _opaque()  # a maximum made finite is a shift and nothing else
    return replace(f, kind="linear") if f.kind == "row" else f


def _is_zero(v: Value) -> bool:
    return v.defining_op is not None and v.defining_op.name == "arith.constant" and v.defining_op["value"] == 0


# -- sums of squares about the mean ---------------------------------------------------------------------------------------------

def about_mean(op: Operation, made: Mapping[Value, Operation], same_point: Callable[[Operation, int, Operation, int], bool]) -> Operation | None:
    """The member that sums x, if `op` sums (x - mean)^2 with the mean of just these x: then one pass over x gives both,

        s' = s + x,  m2' = m2 + (x - s / n) * (x - s' / (n + 1))

    and parts merge by m2 = sum(m2_i) + sum(n_i * (s_i / n_i - mean)^2)  (Chan, Golub, LeVeque 1979: updating formulae for variances).
    `made` gives the member that makes a value; same_point(a, i, b, j): operand i of a and operand j of b are read at one point.
    """
    square = op.body.terminator.operands[0].defining_op
    if op["combine"] != ("sum",) or square is None or square.name != "arith.mul" or square.operands[0] is not square.operands[1]:
        return None
    difference = square.operands[0].defining_op
    if difference is None or difference.name != "arith.sub" or difference.operands[1].defining_op is not None:
        return None
    row = made.get(op.operands[difference.operands[1].index])  # type: ignore[attr-defined]
    if row is None or row["reductions"] or len(row.operands) != 1 or len(row.results) != 1:
        return None
    total = made.get(row.operands[0])
    if total is None or not total["reductions"] or total["combine"] != ("sum",):
        return None
    count = 1
    for d in total["dims"][len(total["dims"]) - total["reductions"]:]:
        if not isinstance(d, int):
            return None
        count *= d
    if not _divides_by(row, count) or not _same_scalar(op, difference.operands[0], total, total.body.terminator.operands[0], same_point):
        return None
    return total


def _divides_by(row: Operation, count: int) -> bool:
    """The op gives its operand over `count`."""
    step = row.body.terminator.operands[0].defining_op
    if step is None or step.name not in ("arith.div", "arith.mul") or step.operands[0] is not row.body.args[0]:
        return False
    constant = step.operands[1].defining_op
    wanted = count if step.name == "arith.div" else 1 / count
    return constant is not None and constant.name == "arith.constant" and abs(constant["value"] - wanted) <= 1e-7 * wanted


def _same_scalar(a: Operation, x: Value, b: Operation, y: Value, same_point: Callable[[Operation, int, Operation, int], bool]) -> bool:
    """The scalars x of a's body and y of b's body are the same function of the same elements."""
    p, q = x.defining_op, y.defining_op
    if p is None or q is None:
        return p is q and same_point(a, x.index, b, y.index)  # type: ignore[attr-defined]
    return (p.name == q.name and p.name.startswith("arith.") and p.attributes == q.attributes and x.type == y.type
            and all(_same_scalar(a, u, b, v, same_point) for u, v in zip(p.operands, q.operands, strict=True)))
