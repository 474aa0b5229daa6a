"""Which types hold all values of another exactly, and in which 16-bit type the factors of a product do.

Matrix units multiply 16-bit floats exactly and add in float32. So a product of, say, bfloat16 and int8 need not be computed in float32: int8
fits bfloat16.
"""

from __future__ import annotations

from ..ir import DType, Operation, element_type
from ..ir.types import DTYPES

__all__ = ["factors", "holds", "matrix_unit_type"]

_FLOATS = {
    "f8e4m3fn": (4, -9, 8), "f8e5m2": (3, -16, 15), "f16": (11, -24, 15), "bf16": (8, -133, 127), "f32": (24, -149, 127), "f64": (53, -1074, 1023),
}
"""Digits of the significand, exponent of the smallest number, largest exponent (IEEE 754; OCP 8-bit floating point, section 5)."""


def holds(wide: DType, narrow: DType) -> bool:
    """Every value of `narrow` is one of `wide`."""
    if wide == narrow:
        return True
    if narrow.name in _FLOATS:
        if wide.name not in _FLOATS:
            return False
        (digits, least, most), (d, low, high) = _FLOATS[wide.name], _FLOATS[narrow.name]
        return digits >= d and least <= low and most >= high
    bits = {"bool": 1, "uint": narrow.bits, "int": narrow.bits - 1}.get(narrow.kind)
    if bits is None:
        return False
    if wide.name in _FLOATS:
        return _FLOATS[wide.name][0] >= bits and _FLOATS[wide.name][2] >= bits
    return wide.kind in ("int", "uint") and (wide.kind == "int" or narrow.kind != "int") and bits <= wide.bits - (wide.kind == "int")


def factors(op: Operation) -> list[list[DType]]:
    """Of each operand of a contraction: its element type, then those that it is cast to before the product."""
    found = []
    for v, arg in zip(op.operands, op.body.args, strict=True):
        types = [element_type(v.type)]
        user: Operation = next(iter(arg.uses))[0]
        while user.name == "arith.cast":
            types.append(element_type(user.result.type))
            user = next(iter(user.result.uses))[0]
        found.append(types)
    return found


def matrix_unit_type(op: Operation) -> DType | None:
    """The 16-bit float type that holds both factors of a contraction with a float32 sum; None if there is none, or a cast on the way rounds."""
    if element_type(op.result.type).name != "f32":
        return None
    chains = factors(op)
    if any(not holds(t, types[0]) for types in chains for t in types):
        return None
    wanted = [types[0] for types in chains if types[0].name in ("bf16", "f16")]
    return next((t for t in [*wanted, DTYPES["bf16"], DTYPES["f16"]] if all(holds(t, types[0]) for types in chains)), None)

