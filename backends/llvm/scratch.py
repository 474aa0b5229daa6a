"""What a kernel function needs besides its code: error codes, stack slots, private memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llvmlite import ir

from ...ir.expr import Dim, Expr, ceildiv
from ...ir.types import DType
from .intrinsics import call, declare
from .scalars import at_block
from .values import I64, PTR, chunk_type, constant, memory_type, opaque, stack_slot

if TYPE_CHECKING:
    from .kernel import KernelEmitter

__all__ = ["ErrorTable", "Scratch"]

HEAP_BYTES = 64 * 1024
"""Scratch memory above this comes from the heap."""


@dataclass
class ErrorTable:
    """What each error word means; code 0 is success. "RuntimeError: ..." raises that, any other text OutOfRange."""

    messages: dict[int, str] = field(default_factory=dict)

    def code(self, message: str) -> int:
        n = len(self.messages) + 1
        self.messages[n] = message
        return n


class Scratch:
    """Stack slots of a function: where masked-off accesses are sent, and private memory of programs."""

    def __init__(self, k: KernelEmitter):
        self.k = k
        self.cache: dict[Any, ir.Value] = {}
        self.heap: list[ir.Value] = []

    @contextmanager
    def _entry(self) -> Iterator[ir.IRBuilder]:
        with at_block(self.k.b, self.k.entry):
            yield self.k.b

    def filled(self, dtype: DType, other: Any, width: int = 0, hidden: bool = False) -> ir.Value:
        """A pointer to `width` times `other`, or to a full vector of it. `hidden`: LLVM does not see what it points to, and so keeps one load from it
        or from another place; else it makes a branch with a load on one side, whose result nothing can take from memory."""
        width = max(width, self.k.lanes)
        key = (dtype.name, str(other), width, hidden)
        if key not in self.cache:
            with self._entry() as b:
                t = chunk_type(memory_type(dtype), width)
                slot = stack_slot(b, t)
                value = constant(other, dtype, width)
                b.store(b.zext(value, t) if dtype.name == "i1" else value, slot)
                self.cache[key] = opaque(b, slot) if hidden else slot
        return self.cache[key]

    def sink(self) -> ir.Value:
        """A pointer to a full vector that nobody reads."""
        if "sink" not in self.cache:
            with self._entry() as b:
                self.cache["sink"] = stack_slot(b, ir.ArrayType(I64, max(16, 2 * self.k.lanes)), 64)
        return self.cache["sink"]

    def private(self, key: object, size: Dim) -> ir.Value:
        """`size` bytes that live as long as the function runs; the same for the same key. The size may depend on the kernel's symbols."""
        if key not in self.cache:
            self.cache[key] = self._private(size) if isinstance(size, int) else self._sized(size)
        return self.cache[key]

    def _sized(self, size: Expr) -> ir.Value:
        scalars = self.k.scalars
        rounded = scalars.emit(ceildiv(size, 64) * 64)
        with at_block(self.k.b, scalars.scopes[0].hoist):  # where the sizes are known
            memory = call(self.k.b, "aligned_alloc", PTR, [I64(64), rounded])
        self.heap.append(memory)
        return memory

    def _private(self, size: int) -> ir.Value:
        with self._entry() as b:
            if size <= HEAP_BYTES:
                return stack_slot(b, ir.ArrayType(ir.IntType(8), size), 64)
            rounded = -(-size // 64) * 64
            memory = b.call(declare(b.module, "aligned_alloc", PTR, [I64, I64]), [I64(64), I64(rounded)])
            self.heap.append(memory)
            return memory

    def free(self) -> None:
        for memory in self.heap:
            call(self.k.b, "free", ir.VoidType(), [memory])
