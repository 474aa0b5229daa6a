"""How many bytes a tensor takes, and symbol values to compare symbolic sizes with.

Used by schedule, bufferize and plan_memory: one definition of "size" for all three.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..ir.core import Operation
from ..ir.expr import Dim, as_int, ceildiv, evaluate, free_symbols, maximum
from ..ir.ranges import Bounds
from ..ir.types import BufferType, TensorType

__all__ = ["ALIGNMENT", "align", "is_dense", "representative_symbols", "size_at", "sizes_exist", "storage_bytes", "symbol_bounds"]

ALIGNMENT = 64
"""Bytes: a cache line, and the widest vector."""

REPRESENTATIVE_SIZE = 128


def align(size: Dim) -> Dim:
    """`size` rounded up to a multiple of `ALIGNMENT`."""
    return ceildiv(size, ALIGNMENT) * ALIGNMENT


def is_dense(shape: tuple[Dim, ...], strides: tuple[Dim, ...]) -> bool:
    """True if the strides are provably those of a contiguous tensor with its dimensions permuted (no gaps, no overlap)."""
    left = [(size, stride) for size, stride in zip(shape, strides, strict=True) if size != 1]
    expected: Dim = 1
    while left:
        found = next((i for i, (_, stride) in enumerate(left) if stride == expected), None)
        if found is None:
            return False
        expected = expected * left.pop(found)[0]
    return True


def storage_bytes(t: TensorType | BufferType) -> Dim:
    """Bytes from the first element of `t` to the end of its last, under its strides."""
    if t.strides is None or is_dense(t.shape, t.strides):
        return t.numel * t.dtype.bytes
    if any(d == 0 for d in t.shape):
        return 0
    last: Dim = 0
    for size, stride in zip(t.shape, t.strides, strict=True):
        reach = (size - 1) * stride
        last = last + (reach if isinstance(size, int) else maximum(reach, 0))
    return (last + 1) * t.dtype.bytes


def symbol_bounds(func: Operation) -> Bounds:
    """The ranges of the function's symbols, in the form that `ir.expr` reasons with."""
    return {name: (low, high) for name, (low, high) in func["symbols"].items()}


def representative_symbols(func: Operation) -> dict[str, int]:
    """A value inside the range of each symbol, to compare symbolic plans by (never to decide what is correct): the usual one, or the first of
    its doubles for which the function's sizes are defined. ValueError if they are not for any below 2^40."""
    for doubled in range(32 if func["symbols"] else 1):
        chosen = {}
        for name, (low, high) in func["symbols"].items():
            value = max(as_int(low), REPRESENTATIVE_SIZE << doubled)
            chosen[name] = value if high is None else min(value, as_int(high))
        if not chosen or sizes_exist(func, chosen):
            return chosen
    raise ValueError(f"the sizes of '{func['sym_name']}' are not defined for any value of its symbols {dict(func['symbols'])}: each that was tried "
                     "divides by a size of zero")


def sizes_exist(func: Operation, symbols: Mapping[str, Any]) -> bool:
    """Whether the function's sizes are defined for these symbol values: a view of n elements as [n // (n // 3), n // 3] has no n below 3."""
    try:
        size_at(func["stats"].get("arena_bytes", 0), symbols)
        for op in func.body:
            for v in (*op.operands, *op.results):
                if isinstance(v.type, TensorType | BufferType):
                    size_at(storage_bytes(v.type), symbols)
    except ZeroDivisionError:
        return False
    return True


class _Default(dict):
    def __missing__(self, key: str) -> int:
        return REPRESENTATIVE_SIZE


def size_at(size: Dim, symbols: Mapping[str, Any]) -> int:
    """`size` for these symbol values; symbols that are not listed count as the representative size."""
    if isinstance(size, int):
        return size
    missing = free_symbols(size) - symbols.keys()
    return int(evaluate(size, _Default(symbols) if missing else symbols))
