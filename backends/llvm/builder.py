"""An IR builder that makes no instruction twice in a block.

Masks, addresses and splats are asked for once per load or operation, so up to a tenth of a kernel's instructions would be there already. LLVM finds
them too (the machine code is the same), but each costs more to make and to print than it takes to look it up. Only within a block: instructions are
added at its end, or in front of its terminator, so what a block has is computed before what is added to it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

__all__ = ["Builder"]

_PURE = (
    "add", "sub", "mul", "udiv", "sdiv", "urem", "srem", "shl", "lshr", "ashr", "and_", "or_", "xor", "neg", "not_",
    "fadd", "fsub", "fmul", "fdiv", "fneg", "icmp_signed", "icmp_unsigned", "fcmp_ordered", "fcmp_unordered", "select",
    "gep", "insert_element", "extract_element", "shuffle_vector",
    "trunc", "zext", "sext", "fptrunc", "fpext", "bitcast", "fptosi", "fptoui", "sitofp", "uitofp",
)
"""Methods whose result depends on their arguments alone."""


def _once(name: str) -> Callable[..., Any]:
    make = getattr(ir.IRBuilder, name)

    def method(self: Builder, *args: Any, **named: Any) -> Any:
        made = self.made.setdefault(self.block, {})
        key = (name, *map(_key, args), *((k, _key(v)) for k, v in named.items()))
        found = made.get(key)
        if found is None:
            found = made[key] = make(self, *args, **named)
        return found
    method.__name__, method.__doc__ = name, make.__doc__
    return method


def _key(argument: Any) -> Any:
    """An argument as part of a key: constants and types by their text, other values by identity."""
    if isinstance(argument, (list, tuple)):
        return tuple(map(_key, argument))
    return str(argument) if isinstance(argument, (ir.Type, ir.Constant)) else argument


class Builder(ir.IRBuilder):
    """As its base. Of an instruction that is changed after it was made, the next is the changed one."""

    def __init__(self, block: ir.Block):
        super().__init__(block)
        self.made: dict[ir.Block, dict[Any, ir.Value]] = {}


for _name in _PURE:
    setattr(Builder, _name, _once(_name))
