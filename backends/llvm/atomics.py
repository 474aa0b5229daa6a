"""Atomic read-modify-write of one element.

Integers and float addition have an instruction or an LLVM expansion (`atomicrmw`). The rest (NaN-propagating float max and
min, 16-bit floats) is a compare-and-swap loop in an internal helper function of the module, one per operation and element type.
"""

from __future__ import annotations

from llvmlite import ir

from ...ir.types import DType
from . import arith
from .values import I1, PTR, register_type

__all__ = ["emit_atomic"]

_RMW = {("add", "f"): "fadd", ("add", "i"): "add", ("add", "u"): "add", ("max", "i"): "max", ("max", "u"): "umax",
        ("min", "i"): "min", ("min", "u"): "umin"}
_KIND = {"float": "f", "int": "i", "uint": "u", "index": "i"}


def emit_atomic(b: ir.IRBuilder, features: arith.Features, name: str, dtype: DType, pointer: ir.Value, value: ir.Value,
                condition: ir.Value | None) -> None:
    """`*pointer = *pointer <name> value`, atomically, where `condition` (i1; None means always)."""
    helper = _helper(b.module, features, name, dtype)
    b.call(helper, [pointer, value, I1(1) if condition is None else condition])


def _helper(module: ir.Module, features: arith.Features, name: str, dtype: DType) -> ir.Function:
    full = f"aicc.atomic.{name}.{dtype}"
    found = module.globals.get(full)
    if found is not None:
        return found
    t = register_type(dtype)
    f = ir.Function(module, ir.FunctionType(ir.VoidType(), [PTR, t, I1]), full)
    f.linkage = "internal"
    pointer, value, condition = f.args
    entry, active, done = (f.append_basic_block(n) for n in ("entry", "active", "done"))
    b = ir.IRBuilder(entry)
    b.cbranch(condition, active, done)
    b.position_at_end(active)
    rmw = _RMW.get((name, _KIND.get(dtype.kind, "")))
    if rmw is not None and dtype.bits >= (32 if dtype.is_float else 8):
        b.atomic_rmw(rmw, pointer, value, "monotonic")
        b.branch(done)
    else:
        _swap_loop(b, features, name, dtype, pointer, value, done)
    ir.IRBuilder(done).ret_void()
    return f


def _swap_loop(b: ir.IRBuilder, features: arith.Features, name: str, dtype: DType, pointer: ir.Value, value: ir.Value,
               done: ir.Block) -> None:
    bits = ir.IntType(dtype.bits)
    loop = b.append_basic_block("swap")
    first = b.load(pointer, typ=bits, align=dtype.bytes)
    entry = b.block
    b.branch(loop)
    b.position_at_end(loop)
    old = b.phi(bits)
    old.add_incoming(first, entry)
    t = register_type(dtype)
    current = old if t == bits else b.bitcast(old, t)
    new = arith.emit(b, features, name, dtype, current, value)
    result = b.cmpxchg(pointer, old, new if t == bits else b.bitcast(new, bits), "monotonic", "monotonic")
    old.add_incoming(b.extract_value(result, 0), b.block)
    b.cbranch(b.extract_value(result, 1), done, loop)
