"""Stores past the caches, in kernels that are launched with `nontemporal` operands (`passes/nontemporal.py` chooses them).

Such a store wants an address that is a multiple of the vector's size. Buffers begin at multiples of 64 bytes, so an offset that is provably a
multiple of a vector is enough; other rows have none. A loop along such a row, if computing an element twice does no harm, is emitted as
    two steps up to a line boundary, stored as usual | steps from there to another one, past the caches | two steps up to its end, as usual
where the steps of a pair overlap each other. No line is written both ways: one that lies changed in a cache, or in a buffer on its way to memory,
would have to be brought there and back first (320 ns per row of 4 KB). Everything else (masked stores, short rows, other layouts) is stored as usual.

Nontemporal stores of a thread are ordered with nothing but a fence on x86: the kernel ends with one, before the thread says that it is done.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from llvmlite import ir

from ...ir.core import Operation, Value
from ...ir.expr import Dim, as_int, substitute, sym
from ...ir.ranges import split_linear
from ...ir.types import TileType, element_type
from .intrinsics import call
from .symbolic import position
from .values import I64, memory_type

if TYPE_CHECKING:
    from .kernel import KernelEmitter

__all__ = ["LINE", "Nontemporal", "Run"]

LINE = 64
SHORTEST = 8192
"""Bytes of a run that is worth its parts: below, what the four steps at its ends cost is as much as the rest gains."""
SMALLEST = 16
"""Bytes of the smallest vector that is stored so."""


@dataclass(frozen=True)
class Run:
    """A buffer that a loop writes in order: its offset in elements at the first lane of the tile, in the loop's variable."""

    buffer: Value
    offset: Dim


class Nontemporal:
    """What one kernel writes past the caches. `aligned` are offsets, in elements, known to lie on a vector's boundary here."""

    def __init__(self, k: KernelEmitter, operands: frozenset[int]):
        self.k = k
        self.buffers = {k.kernel.body.args[n] for n in operands}
        self.aligned: list[Dim] = [0]
        self.suspended = False
        self.used = False

    def suits(self, buffer: Value, offset: Dim, value: ir.Value) -> bool:
        """Whether this vector may be stored past the caches at this offset (of the buffer's elements)."""
        if buffer not in self.buffers or self.suspended or not isinstance(value.type, ir.VectorType):
            return False
        elements = value.type.count
        size = elements * element_type(buffer.type).bytes
        if size < SMALLEST or size > LINE or size & (size - 1):
            return False
        return any(self._is_multiple(offset - start, elements) for start in self.aligned)

    def store(self, value: ir.Value, pointer: ir.Value) -> None:
        """`suits` must hold."""
        b = self.k.b
        t = value.type
        bits = 16 if str(t.element) in ("half", "bfloat") else {"float": 32, "double": 64}.get(str(t.element)) or t.element.width
        made = b.store(value, pointer, align=t.count * bits // 8)
        made.set_metadata("nontemporal", b.module.add_metadata([ir.IntType(32)(1)]))
        self.used = True

    def fence(self) -> None:
        """Before the kernel's end. Elsewhere than on x86 the end of the shared launch orders these stores like others."""
        if self.used and "sse2" in self.k.features:
            call(self.k.b, "llvm.x86.sse.sfence", ir.VoidType(), [])

    def _is_multiple(self, e: Dim, n: int) -> bool:
        """A multiple of n for all values of programs, loops and sizes."""
        for loop in sorted(self.k.resolver.loops.values(), key=lambda x: -x.depth):  # inner ones first: they start at outer ones
            e = substitute(e, {loop.symbol: loop.lower + loop.step * sym(f"{loop.symbol}n")})
        return e % n == 0 if isinstance(e, int) else e.const % n == 0 and all(c % n == 0 for _, c in e.terms)

    # -- rows that begin anywhere

    def unaligned_run(self, op: Operation) -> Run | None:
        """What this loop writes in order from an address that may be odd, if it may be emitted as a run."""
        k = self.k
        loop = k.resolver.loops[op]
        if not self.buffers or self.suspended or op.results or k.cold:
            return None
        stores = [x for x in op.body if x.name == "tile.store"]
        touched = {x.operands[0] for x in stores}
        read = {x.operands[0] for x in op.body if x.name == "tile.load"}
        if any(x.regions for x in op.body) or any(x["atomic"] for x in stores) or read & touched:
            return None
        args = {a.index for a in touched if a in self.buffers or not self._shared(a)}  # type: ignore[attr-defined]
        if len(args) != len(touched):
            return None
        for x in stores:
            t = x.operands[1].type
            if x.operands[0] not in self.buffers or not isinstance(t, TileType) or loop.step * t.dtype.bytes % LINE or t.dtype.bytes > 8:
                continue
            if loop.trips is not None and loop.trips * loop.step * t.dtype.bytes < SHORTEST:
                continue
            fixed: dict[str, Dim] = {position(d): 0 for d in range(t.rank)}
            whole = k.instantiate(k.facts.simplify(k.resolver.accesses[x].offset, k.resolver.accesses[x].shape))
            lanes = split_linear(substitute(whole, {p: v for p, v in fixed.items() if p != position(t.rank - 1)}), position(t.rank - 1))
            along = split_linear(whole, loop.symbol)
            if lanes is None or along is None or lanes[0] != 1 or along[0] != 1 or as_int(t.shape[-1]) != loop.step:
                continue
            offset = substitute(whole, fixed)
            if not self._is_multiple(offset, max(k.layout(x.operands[1]))):
                return Run(x.operands[0], offset)
        return None

    def _shared(self, a: Value) -> bool:
        return any(a.index in pair for pair in self.k.kernel["inplace"])  # type: ignore[attr-defined]

    def emit_run(self, op: Operation, run: Run) -> None:
        """The loop in three parts, or as usual if it is too short for them."""
        k, b = self.k, self.k.b
        loop = k.resolver.loops[op]
        lower, upper = (k.scalars.emit(k.instantiate(e)) for e in (loop.lower, loop.upper))
        step = loop.step
        long, short, done = (b.append_basic_block(f"run.{n}") for n in ("long", "short", "end"))
        dtype = element_type(run.buffer.type)
        b.cbranch(b.icmp_signed(">=", b.sub(upper, lower), I64(max(SHORTEST // dtype.bytes, 4 * step))), long, short)
        outer = k.facts
        b.position_at_end(long)
        k.facts = whole = outer.inside(loop.symbol, loop.lower, loop.upper - step)
        with k.scalars.scope({loop.symbol: lower}, "run.start"):
            address = b.ptrtoint(k.scalars.address(k.env[run.buffer], memory_type(dtype), run.offset), I64)
        # From the last line boundary within the first two steps: those that write the lines before it lie one behind the other, but for an overlap.
        past = b.udiv(b.and_(address, I64(LINE - 1)), I64(dtype.bytes))
        boundary = b.sub(b.add(lower, I64(2 * step)), past)
        self._two_steps(op, lower, b.sub(boundary, I64(step)), "run.head")
        k.facts = outer
        self.aligned.append(run.offset)
        at, _ = k.steps(op, loop, whole, boundary, k.instantiate(loop.upper) - 2 * step + 1, 1, [])
        self.aligned.pop()
        k.facts = whole
        self._two_steps(op, at, b.sub(upper, I64(step)), "run.tail")
        b.branch(done)
        b.position_at_end(short)
        k.facts = outer
        self.suspended = True
        k.emit_loop(op, loop, [])
        self.suspended = False
        b.branch(done)
        b.position_at_end(done)

    def _two_steps(self, op: Operation, first: ir.Value, second: ir.Value, name: str) -> None:
        """The loop's body at these two values of its variable, stored as usual."""
        k, b = self.k, self.k.b
        before, body, after = b.block, b.append_basic_block(name), b.append_basic_block(f"{name}.end")
        b.branch(body)
        b.position_at_end(body)
        variable, again = b.phi(I64), b.phi(ir.IntType(1))
        variable.add_incoming(first, before)
        again.add_incoming(ir.IntType(1)(1), before)
        self.suspended = True
        with k.scalars.scope({k.resolver.loops[op].symbol: variable}, name):
            k.iterate(op, [])
            variable.add_incoming(second, b.block)
            again.add_incoming(ir.IntType(1)(0), b.block)
            b.cbranch(again, body, after)
        self.suspended = False
        b.position_at_end(after)
