"""`host.loop` -> a native loop that calls its body's function once per trip.

Operands: the carried values' start, sliced, invariant; then what is written: the carried values' end, the stacked results, scratch memory.
Each trip is handed a table as any host function (`host.py`): pointers to where the carried values are now, to its slices, to the
invariants, to where results go, and the body's arena. A result that is stacked is written to its slice; if it is carried too, the
next trip reads it there. Other carried results are written to two buffers in turn, in the scratch memory, which ends with the arena.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llvmlite import ir

from ...ir.core import IRError, Operation, Value
from ...ir.expr import Dim, ceildiv
from ...ir.types import BufferType, element_type
from .values import I32, I64, PTR, memory_type, stack_slot

if TYPE_CHECKING:
    from .host import ModuleEmitter
    from .scalars import ScalarEmitter

__all__ = ["LoopSite", "emit_loop"]

ALIGNMENT = 64


@dataclass(frozen=True)
class LoopSite:
    """Where a loop is emitted: the calling function's builder, sizes, and how it addresses buffers."""

    owner: ModuleEmitter
    b: ir.IRBuilder
    scalars: ScalarEmitter
    sizes: dict[str, ir.Value]
    pointer: Callable[[Value], ir.Value]
    context: ir.Value

    def copy(self, source: ir.Value, target: ir.Value, t: BufferType) -> None:
        """Copies a row-major buffer."""
        kernel, launcher = self.owner.launcher(self.owner.copier(t, t))
        self.b.call(launcher, [source, target, *(self.sizes[s] for s in kernel["symbols"]), self.context])

    def address(self, base: ir.Value, nbytes: Dim) -> ir.Value:
        return self.scalars.address(base, ir.IntType(8), nbytes)


@dataclass(frozen=True)
class _Result:
    """One result of the body: the argument that it is written to, the argument that it is, or the earlier result that it is."""

    written: int | None = None
    given: int | None = None
    same: int | None = None


def _results(body: Operation) -> list[_Result]:
    made: list[_Result] = []
    for attrs in body["result_attrs"]:
        kind = attrs["kind"]
        if kind == "buffer":
            made.append(_Result(written=attrs["arg"]))
        elif kind == "input":
            made.append(_Result(given=attrs["arg"]))
        elif kind == "same":
            made.append(_Result(same=attrs["result"]))
        else:
            raise IRError(f"the body '@{body['sym_name']}' of a loop gives a result of kind '{kind}'")
    return made


def emit_loop(site: LoopSite, op: Operation) -> None:
    """Emits the loop at the builder's position, which is after it then."""
    _Loop(site, op).emit()


class _Loop:
    def __init__(self, site: LoopSite, op: Operation):
        self.site, self.op, self.b = site, op, site.b
        self.body, self.function = site.owner.step(op["body"].name)
        self.results = _results(self.body)
        self.carried, self.sliced = op["carried"], op["sliced"]
        outputs = list(op.operands[len(op.operands) - op["outputs"]:])
        self.inputs = list(op.operands[:len(op.operands) - op["outputs"]])
        self.ends, self.stacked, (self.scratch,) = outputs[:self.carried], outputs[self.carried:-1], outputs[-1:]
        self.types: list[BufferType] = [_buffer(v) for v in self.ends]

    def emit(self) -> None:
        b, site = self.b, self.site
        pointers = [site.pointer(v) for v in self.op.operands]  # before the loop: they are used in it and after
        ends = pointers[len(self.inputs):len(self.inputs) + self.carried]
        self.trips = site.scalars.emit(self.op["trips"])
        table_size = len(self.body.body.args) + 1
        table = stack_slot(b, ir.ArrayType(PTR, table_size))
        symbols = list(self.body["symbols"])
        sizes = stack_slot(b, ir.ArrayType(I64, max(1, len(symbols))))
        for i, s in enumerate(symbols):
            b.store(site.sizes[s], b.gep(sizes, [I64(i)], source_etype=I64))
        self._store(table, {i: pointers[i] for i in range(self.carried + self.sliced, len(self.inputs))})
        pairs, arena = self._scratch(site.pointer(self.scratch))
        self._store(table, {table_size - 1: arena})
        before = b.block
        head, trip, after = (b.append_basic_block(f"loop.{name}") for name in ("head", "trip", "after"))
        b.branch(head)
        b.position_at_end(head)
        t = b.phi(I64)
        now = [b.phi(PTR) for _ in range(self.carried)]
        failed = b.load(site.context, typ=I32)
        b.cbranch(b.and_(b.icmp_signed("<", t, self.trips), b.icmp_signed("==", failed, I32(0))), trip, after)
        b.position_at_end(trip)
        following = self._trip(t, now, pointers, pairs, table, sizes)
        t.add_incoming(I64(0), before)
        t.add_incoming(b.add(t, I64(1)), b.block)
        for phi, start, n in zip(now, pointers[:self.carried], following, strict=True):
            phi.add_incoming(start, before)
            phi.add_incoming(n, b.block)
        b.branch(head)
        b.position_at_end(after)
        for p, end, kind in zip(now, ends, self.types, strict=True):
            site.copy(p, end, kind)

    def _scratch(self, base: ir.Value) -> tuple[list[tuple[ir.Value, ir.Value]], ir.Value]:
        """Two places for each carried value, and the arena of the body."""
        pairs: list[tuple[ir.Value, ir.Value]] = []
        at: Dim = 0
        for t in self.types:
            size = ceildiv(t.numel * t.dtype.bytes, ALIGNMENT) * ALIGNMENT
            pairs.append((self.site.address(base, at), self.site.address(base, at + size)))
            at = at + 2 * size
        return pairs, self.site.address(base, at)

    def _slice(self, base: ir.Value, v: Value, t: ir.Value) -> ir.Value:
        """Where slice t of a row-major buffer begins."""
        kind = _buffer(v)
        row = self.site.scalars.emit(kind.layout[0])
        return self.b.gep(base, [self.b.mul(t, row)], source_etype=memory_type(element_type(kind)))

    def _store(self, table: ir.Value, entries: dict[int, ir.Value]) -> None:
        for i, p in entries.items():
            self.b.store(p, self.b.gep(table, [I64(i)], source_etype=PTR))

    def _trip(self, t: ir.Value, now: list[Any], pointers: list[ir.Value], pairs: list[tuple[ir.Value, ir.Value]], table: ir.Value,
              sizes: ir.Value) -> list[ir.Value]:
        """One call of the body; gives where the carried values are then."""
        b, n = self.b, self.carried
        given: dict[int, ir.Value] = dict(enumerate(now))
        back = b.sub(b.sub(self.trips, I64(1)), t)
        for j in range(self.sliced):
            given[n + j] = self._slice(pointers[n + j], self.inputs[n + j], back if j in self.op["reversed_operands"] else t)
        odd = b.icmp_signed("!=", b.and_(t, I64(1)), I64(0))
        own = [b.select(odd, second, first) for first, second in pairs]
        slices = [self._slice(pointers[len(self.inputs) + n + j], v, back if j in self.op["reversed_results"] else t)
                  for j, v in enumerate(self.stacked)]
        place: dict[int, ir.Value] = {}  # result -> where it is after the call
        copies: list[tuple[int, int]] = []  # results that are stacked, but written elsewhere, and which of the stacked they are
        for j, s in enumerate(slices):
            first = n + j
            while self.results[first].same is not None:
                first = self.results[first].same  # type: ignore[assignment]
            if self.results[first].written is not None and first not in place:
                place[first] = s
            else:
                copies.append((first, j))
        for k in range(n):
            if self.results[k].written is not None and k not in place:
                place[k] = own[k]
        self._store(table, {**given, **{r.written: place[k] for k, r in enumerate(self.results) if r.written is not None}})
        b.call(self.function, [table, sizes, self.site.context])
        invariant = dict(enumerate(pointers[:len(self.inputs)]))

        def found(k: int) -> ir.Value:
            """Where result k is."""
            r = self.results[k]
            return place[k] if r.written is not None else found(r.same) if r.same is not None else given.get(r.given, invariant[r.given])  # type: ignore[index,arg-type]

        for k, j in copies:
            self.site.copy(found(k), slices[j], _row(self.stacked[j]))
        following = []
        for k in range(n):
            r = self.results[k]
            if r.given == k:
                following.append(now[k])
            elif r.written is not None:
                following.append(place[k])
            else:  # the value of something else, which may be overwritten before this one is read
                self.site.copy(found(k), own[k], self.types[k])
                following.append(own[k])
        return following


def _buffer(v: Value) -> BufferType:
    assert isinstance(v.type, BufferType)
    return v.type


def _row(v: Value) -> BufferType:
    t = _buffer(v)
    return BufferType(t.shape[1:], t.dtype)
