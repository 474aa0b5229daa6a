"""Scalar arithmetic: the bodies of structured ops, and (broadcast over tiles) the bodies of kernels.

Operands are scalars or tiles; tiles of equal rank broadcast over dimensions of size 1, and scalars broadcast over tiles.
All data operands have one element type; nothing is converted silently. Comparisons and predicates give i1.

Semantics are torch's: integers wrap; `max` and `min` propagate NaN; `floordiv` and `mod` round toward minus infinity
(`mod` has the sign of the divisor) while `truncdiv` and `rem` are C's; `div` is the true division of floats;
`shr` is arithmetic on signed types; `round` is half to even; float -> int casts truncate.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..core import IRError, Operation
from ..opdef import Trait, attr, define
from ..types import DTYPES, ScalarType, TileType, element_type

I1 = DTYPES["i1"]


@dataclass(frozen=True)
class Row:
    """One arithmetic op: the dtype kinds that it takes and the dtype that it gives ('same' or 'i1')."""

    name: str
    arity: int
    doc: str
    kinds: str = "fiub"  # float, int, uint, bool
    result: str = "same"
    commutative: bool = False


_F = "f"
ROWS: tuple[Row, ...] = (
    # unary, any number
    Row("neg", 1, "-x", "fiu"), Row("abs", 1, "|x|", "fiu"), Row("sign", 1, "-1, 0 or 1; NaN gives 0", "fiub"),
    Row("bitnot", 1, "all bits flipped; logical not of i1", "iub"),
    Row("isnan", 1, "x != x", _F, "i1"), Row("isinf", 1, "|x| == inf", _F, "i1"),
    Row("floor", 1, "rounded down", _F), Row("ceil", 1, "rounded up", _F), Row("trunc", 1, "rounded toward zero", _F),
    Row("round", 1, "rounded half to even", _F),
    # unary, float
    *(Row(n, 1, d, _F) for n, d in {
        "exp": "e^x", "exp2": "2^x", "expm1": "e^x - 1", "log": "ln x", "log2": "log2 x", "log10": "log10 x", "log1p": "ln(1+x)",
        "sqrt": "square root", "rsqrt": "1/sqrt(x)", "reciprocal": "1/x", "sin": "sine", "cos": "cosine", "tan": "tangent",
        "asin": "arcsine", "acos": "arccosine", "atan": "arctangent", "sinh": "hyperbolic sine", "cosh": "hyperbolic cosine",
        "tanh": "hyperbolic tangent", "asinh": "inverse of sinh", "acosh": "inverse of cosh", "atanh": "inverse of tanh",
        "erf": "error function", "erfc": "1 - erf(x)", "erfinv": "inverse of erf", "lgamma": "ln |gamma(x)|",
        "digamma": "derivative of ln gamma", "sigmoid": "1/(1+e^-x)"}.items()),
    # binary
    Row("add", 2, "a + b (or of i1)", "fiub", commutative=True), Row("sub", 2, "a - b", "fiu"),
    Row("mul", 2, "a * b (and of i1)", "fiub", commutative=True), Row("div", 2, "a / b", _F),
    Row("floordiv", 2, "floor(a / b)", "fiu"), Row("truncdiv", 2, "trunc(a / b)", "iu"),
    Row("mod", 2, "a - b*floor(a/b)", "fiu"), Row("rem", 2, "a - b*trunc(a/b)", "fiu"),
    Row("pow", 2, "a^b", "fiu"), Row("atan2", 2, "angle of (b, a)", _F), Row("hypot", 2, "sqrt(a*a + b*b)", _F),
    Row("copysign", 2, "|a| with the sign of b", _F), Row("nextafter", 2, "next float from a toward b", _F),
    Row("max", 2, "larger, NaN if either is", "fiub", commutative=True), Row("min", 2, "smaller, NaN if either is", "fiub", commutative=True),
    Row("fmax", 2, "larger, the other one if one is NaN", _F, commutative=True),
    Row("fmin", 2, "smaller, the other one if one is NaN", _F, commutative=True),
    Row("and", 2, "bitwise and", "iub", commutative=True), Row("or", 2, "bitwise or", "iub", commutative=True),
    Row("xor", 2, "bitwise exclusive or", "iub", commutative=True),
    Row("shl", 2, "a << b", "iu"), Row("shr", 2, "a >> b", "iu"),
    Row("eq", 2, "a == b", "fiub", "i1", True), Row("ne", 2, "a != b", "fiub", "i1", True), Row("lt", 2, "a < b", "fiub", "i1"),
    Row("le", 2, "a <= b", "fiub", "i1"), Row("gt", 2, "a > b", "fiub", "i1"), Row("ge", 2, "a >= b", "fiub", "i1"),
    # ternary
    Row("fma", 3, "a * b + c, rounded once", _F),
)
BY_NAME = {r.name: r for r in ROWS}
_KIND_LETTER = {"float": "f", "int": "i", "uint": "u", "bool": "b", "index": "i", "complex": "c"}


def _shape(op: Operation, types: list) -> tuple[int, ...] | None:
    """The broadcast tile shape of the operand types; None for scalars alone."""
    tiles = [t for t in types if isinstance(t, TileType)]
    if not tiles:
        return None
    rank = {t.rank for t in tiles}
    if len(rank) > 1:
        raise IRError(f"'{op.name}' mixes tiles of ranks {sorted(rank)}")
    shape: list[int] = []
    for sizes in zip(*(t.shape for t in tiles), strict=True):
        wide = {s for s in sizes if s != 1}
        if len(wide) > 1:
            raise IRError(f"'{op.name}' cannot broadcast tile sizes {sorted(map(str, wide))}")
        shape.append(wide.pop() if wide else 1)
    return tuple(shape)


def _check_result(op: Operation, shape: tuple[int, ...] | None, dtype: object) -> None:
    t = op.result.type
    actual = t.shape if isinstance(t, TileType) else None
    if actual != shape or element_type(t) != dtype:
        raise IRError(f"'{op.name}' gives {'tile<' + 'x'.join(map(str, shape)) + '>' if shape else 'scalar'} of {dtype}, "
                      f"but its result is declared as {t}")


def _verify_row(op: Operation) -> None:
    row = BY_NAME[op.name.partition(".")[2]]
    types = [v.type for v in op.operands]
    dtypes = {element_type(t) for t in types}
    if len(dtypes) != 1:
        raise IRError(f"'{op.name}' needs operands of one element type, got {', '.join(sorted(map(str, dtypes)))}; insert arith.cast")
    dtype = dtypes.pop()
    if _KIND_LETTER[dtype.kind] not in row.kinds:
        raise IRError(f"'{op.name}' is not defined on {dtype}")
    from_types = _shape(op, types)
    _check_result(op, from_types, dtype if row.result == "same" else I1)


def _verify_select(op: Operation) -> None:
    cond, a, b = (v.type for v in op.operands)
    if element_type(cond) != I1 or element_type(a) != element_type(b):
        raise IRError(f"'arith.select' needs (i1, T, T), got ({cond}, {a}, {b})")
    _check_result(op, _shape(op, [cond, a, b]), element_type(a))


def _verify_cast(op: Operation) -> None:
    _check_result(op, _shape(op, [op.operands[0].type]), element_type(op.result.type))


def _verify_constant(op: Operation) -> None:
    t = op.result.type
    if not isinstance(t, ScalarType):
        raise IRError("'arith.constant' gives a scalar; scalars broadcast over tiles")
    want = {"float": float, "int": int, "uint": int, "index": int, "bool": bool}[t.dtype.kind]
    if type(op["value"]) is not want:
        raise IRError(f"'arith.constant' of {t} needs a {want.__name__} value, got {op['value']!r}")


for _row in ROWS:
    define(f"arith.{_row.name}", _row.doc, operands=("x",) if _row.arity == 1 else ("a", "b", "c")[:_row.arity],
           traits=[Trait.Pure, Trait.Elementwise, *([Trait.Commutative] if _row.commutative else [])], verify=_verify_row)

define("arith.select", "a where cond, else b", operands="cond a b", traits=[Trait.Pure, Trait.Elementwise], verify=_verify_select)
define("arith.cast", "x converted to the element type of the result", operands="x", traits=[Trait.Pure, Trait.Elementwise],
       verify=_verify_cast)
define("arith.constant", "a scalar constant", attrs={"value": attr("float, int or bool, as the type says")},
       traits=[Trait.Pure, Trait.ConstantLike], verify=_verify_constant)
