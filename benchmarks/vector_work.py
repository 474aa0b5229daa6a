"""Vector instructions of a kernel, counted in its IR: what bounds exponentials and their like, where neither multiply-adds nor memory do.

    vector_instructions(kernel, target)        # of all programs; 0 where a size is symbolic

An arithmetic op on a tile is one instruction per register, a function of `vecmath` as many as its code has (selections and integer operations
too, but no loads or moves); a division or a root counts as one. Products (`tile.dot`) are left out: their operations are counted as such.
"""

from __future__ import annotations

from functools import lru_cache

from aicc.backends.llvm import arith
from aicc.ir import Operation, Target, TileType, element_type
from aicc.ir.expr import product
from aicc.ir.types import DTYPES
from llvmlite import ir

__all__ = ["function_instructions", "vector_instructions"]

FREE = ("bitcast", "shufflevector", "phi", "br", "ret")
SIMPLE = {"constant": 0, "cast": 1, "select": 1}


@lru_cache(maxsize=1024)
def function_instructions(name: str, operands: int, lanes: int, features: frozenset[str], fast: bool) -> int:
    """Instructions of an arith op on a float32 vector; one where it is not of that type."""
    module = ir.Module("count")
    vector = ir.VectorType(ir.FloatType(), lanes)
    f = ir.Function(module, ir.FunctionType(vector, [vector] * operands), "f")
    b = ir.IRBuilder(f.append_basic_block())
    try:
        arith.emit(b, features, name, DTYPES["f32"], *f.args, fast=fast)
    except (KeyError, TypeError, NotImplementedError, AttributeError):
        return 1
    return max(1, sum(i.opname not in FREE for block in f.blocks for i in block.instructions))


def vector_instructions(kernel: Operation, target: Target) -> int:
    """The instructions of all programs on one thread's vectors."""
    programs = product(kernel["grid"])
    return programs * _in(kernel, target) if isinstance(programs, int) else 0


def _in(parent: Operation, target: Target) -> int:
    total = 0
    for op in parent.body:
        if op.name == "tile.for":
            length = op["upper"] - op["lower"]
            if isinstance(length, int):
                total += -(-length // op["step"]) * _in(op, target)
        elif op.name.startswith("arith.") and isinstance(op.result.type, TileType):
            name, lanes = op.name[6:], target.lanes(max(32, element_type(op.result.type).bits))
            size = product(op.result.type.shape)
            cost = SIMPLE.get(name)
            if cost is None:
                cost = function_instructions(name, len(op.operands), lanes, frozenset(target.features), bool(op.attributes.get("_approximate")))
            total += -(-size // lanes) * cost if isinstance(size, int) else 0
    return total
