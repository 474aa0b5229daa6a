"""Calls of LLVM intrinsics and external functions, declared on first use."""

from __future__ import annotations

from collections.abc import Sequence

from llvmlite import ir

__all__ = ["call", "call_same", "declare", "suffix"]

_FLOATS = {"float": "f32", "double": "f64", "half": "f16"}


def suffix(type_: ir.Type) -> str:
    """How an overloaded intrinsic names `type_`: f32, i64, v16f32, ..."""
    if isinstance(type_, ir.VectorType):
        return f"v{type_.count}{suffix(type_.element)}"
    if isinstance(type_, ir.PointerType):
        return "p0"
    return f"i{type_.width}" if isinstance(type_, ir.IntType) else _FLOATS[str(type_)]


def declare(module: ir.Module, name: str, result: ir.Type, operands: Sequence[ir.Type]) -> ir.Function:
    """The external function or intrinsic `name`."""
    found = module.globals.get(name)
    return found if found is not None else ir.Function(module, ir.FunctionType(result, list(operands)), name)


def call(b: ir.IRBuilder, name: str, result: ir.Type, args: Sequence[ir.Value], fastmath: Sequence[str] = ()) -> ir.Value:
    """Calls `name`, whose full name is given (with the overload suffix)."""
    return b.call(declare(b.module, name, result, [a.type for a in args]), args, fastmath=fastmath)


def call_same(b: ir.IRBuilder, name: str, *args: ir.Value, fastmath: Sequence[str] = ()) -> ir.Value:
    """`llvm.<name>` overloaded on the first argument's type, which is also the result's."""
    t = args[0].type
    return call(b, f"llvm.{name}.{suffix(t)}", t, args, fastmath)
