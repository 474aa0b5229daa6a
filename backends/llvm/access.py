"""Loads and stores of tiles.

Each row of a tile is one run of lanes. By the coefficient of the last tile position in the offset a chunk of it is read as
one vector (1), one element for all (0), a vector turned round (-1), runs of neighbours, or lane by lane (`llvm.masked.gather`
where the target has it). Addresses share bases, so that rows differ by a constant displacement or one hoisted pointer.

Masks that `Facts` cannot prove are computed. No access ever touches memory outside its mask: a mask over lanes becomes a masked
instruction (or one address per lane), a mask over whole rows redirects the address to a scratch vector that holds
`other`, without a branch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import TYPE_CHECKING

from llvmlite import ir

from ...ir.core import Operation
from ...ir.expr import Dim, free_symbols, substitute, sym
from ...ir.ranges import split_linear
from ...ir.types import BufferType, DType, TileType
from .atomics import emit_atomic
from .intrinsics import call, suffix
from .lane_loads import by_lane
from .masks import LaneChunk
from .shapes import emit_transpose
from .symbolic import position
from .values import (
    I1,
    I32,
    I64,
    PTR,
    Tile,
    chunk_type,
    concat,
    constant,
    extract,
    memory_type,
    pack,
    shuffle,
    slice_chunk,
    splat,
    with_widths,
)

if TYPE_CHECKING:
    from .kernel import KernelEmitter

__all__ = ["AccessChunk", "Accessor", "broadcast_row", "emit_load", "emit_store", "full_mask", "row_coordinates"]

MIN_RUN = 4
"""Neighbouring lanes that are worth a vector load of their own."""


def row_coordinates(shape: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Coordinates of the rows (all dimensions but the last), row-major."""
    return product(*(range(n) for n in shape[:-1]))


def broadcast_row(coordinates: Sequence[int], shape: Sequence[int]) -> int:
    """The flattened row of a tile of `shape` that broadcasts to `coordinates`."""
    row = 0
    for at, size in zip(coordinates, shape[:-1]):
        row = row * size + (0 if size == 1 else at)
    return row


@dataclass
class AccessChunk:
    """One chunk to access: its lanes, the offset of each, and what guards it."""

    lanes: LaneChunk
    offset: Dim
    gaps: list[Dim]
    row: tuple[int, ...] = ()


class Accessor:
    """What loads, stores and masks share: the rows and chunks of one access, with their addresses."""

    def __init__(self, k: KernelEmitter, op: Operation, widths: tuple[int, ...]):
        self.k = k
        self.b = k.b
        self.op = op
        access = k.resolver.accesses[op]
        self.shape = access.shape or (1,)
        self.widths = widths
        if op.name != "tile.mask":
            buffer = op.operands[0]
            assert isinstance(buffer.type, BufferType)
            self.dtype: DType = buffer.type.dtype
            self.base = k.env[buffer]
            self.memory = memory_type(self.dtype)
        self.offset = k.instantiate(k.facts.simplify(access.offset, access.shape))
        pairs = [p for p in access.pairs if not k.facts.proves(p, access.shape)]
        self.gaps = [k.instantiate(b) - k.instantiate(a) - 1 for a, b in pairs]
        self._gathered: dict[str, Tile] = {}
        for e in (self.offset, *self.gaps):
            for s in free_symbols(e):
                if s[:2] == "%g" and s not in self._gathered:
                    self._gathered[s] = k.tile(k.resolver.values[s])

    def rows(self) -> Iterator[list[AccessChunk]]:
        """The chunks of each row."""
        last = position(len(self.shape) - 1)
        wide = {s: with_widths(self.b, t, self.widths) for s, t in self._gathered.items() if t.shape[-1] > 1}
        for at in row_coordinates(self.shape):
            env: dict[str, Dim] = {position(d): n for d, n in enumerate(at)}
            for s, t in self._gathered.items():
                if t.shape[-1] == 1:
                    env[s] = sym(f"{s}@{broadcast_row(at, t.shape)}")
            offset = substitute(self.offset, env)
            gaps = [substitute(g, env) for g in self.gaps]
            start, chunks = 0, []
            for c, width in enumerate(self.widths):
                vectors = {s: self._index_chunk(t, broadcast_row(at, t.shape), c) for s, t in wide.items()}
                chunks.append(AccessChunk(LaneChunk(self.k.scalars, last, start, width, self.shape[-1], vectors), offset, gaps, at))
                start += width
            yield chunks

    def _index_chunk(self, t: Tile, row: int, c: int) -> Callable[[], ir.Value]:
        return lambda: self.k.widen_index(t.rows[row][c], t.dtype)

    def address(self, offset: Dim) -> ir.Value:
        return self.k.scalars.address(self.base, self.memory, offset)

    def lane_addresses(self, chunk: AccessChunk) -> list[ir.Value]:
        """One pointer per lane."""
        lanes = chunk.lanes
        if not any(s in lanes.vectors for s in free_symbols(chunk.offset)):
            return [self.address(lanes.at(chunk.offset, i)) for i in range(lanes.width)]
        shared, index = lanes.index(chunk.offset)
        base = self.address(shared)
        return [self.b.gep(base, [extract(self.b, index, i)], source_etype=self.memory) for i in range(lanes.width)]

    def vector_address(self, chunk: AccessChunk) -> ir.Value:
        """A vector of pointers."""
        shared, index = chunk.lanes.index(chunk.offset)
        base = self.address(shared)
        gep = self.b.gep(base, [index], source_etype=self.memory)
        gep.type = ir.VectorType(PTR, chunk.lanes.width)  # llvmlite does not know that a vector index gives a vector
        return gep

    def steps(self, chunk: AccessChunk) -> list[int] | None:
        """Constant distances of the lanes from the first one; None if they are not constant."""
        lanes = chunk.lanes
        if any(s in lanes.vectors for s in free_symbols(chunk.offset)):
            return None
        linear = lanes.linear(chunk.offset)
        if linear is not None:
            return [linear[0] * i for i in range(lanes.width)] if isinstance(linear[0], int) else None
        first = lanes.at(chunk.offset, 0)
        distances = [lanes.at(chunk.offset, i) - first for i in range(lanes.width)]
        return distances if all(isinstance(d, int) for d in distances) else None  # type: ignore[return-value]

    def has_gather(self, width: int) -> bool:
        f = self.k.features
        return width >= 4 and self.memory_bits in (32, 64) and ("avx512f" in f or "avx2" in f)

    def numbers_in_memory(self, c: AccessChunk, symbol: str) -> ir.Value | None:
        """Where the indices `symbol` of the chunk's lanes lie side by side in memory that the kernel does not write; None if they do not."""
        load = self.k.resolver.values[symbol].defining_op
        if load is None or load.name != "tile.load" or any(u.name != "tile.load" for u in load.operands[0].users):
            return None
        x = _Loader(self.k, load, self.widths)
        if x.gaps or x._gathered or len(x.shape) != len(self.shape) or x.shape[-1] != self.shape[-1]:
            return None
        row = list(x.rows())[broadcast_row(c.row, x.shape)]
        chunk = next(n for n in row if n.lanes.start == c.lanes.start)
        return self.k.scalars.address(x.base, x.memory, chunk.lanes.at(chunk.offset, 0)) if x.steps(chunk) == list(range(chunk.lanes.width)) else None

    @property
    def has_masked(self) -> bool:
        f = self.k.features
        return ((self.memory_bits in (32, 64) and ("avx512f" in f or "avx2" in f))
                or self.memory_bits in (8, 16) and "avx512bw" in f)

    @property
    def memory_bits(self) -> int:
        return self.dtype.bits


def full_mask(b: ir.IRBuilder, scalar: ir.Value | None, vector: ir.Value | None, width: int) -> ir.Value:
    """A mask as a vector of i1 (a scalar for width 1)."""
    parts = [splat(b, scalar, width)] if scalar is not None else []
    parts += [vector] if vector is not None else []
    if not parts:
        return splat(b, I1(1), width)
    return parts[0] if len(parts) == 1 else b.and_(*parts)


def _runs(steps: list[int]) -> list[tuple[int, int]]:
    """(first lane, length) of the runs of neighbouring elements."""
    runs: list[tuple[int, int]] = []
    for i, s in enumerate(steps):
        if runs and s - steps[i - 1] == 1:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((i, 1))
    return runs


# -- loads --------------------------------------------------------------------------------------------------------------

class _Loader(Accessor):
    def __init__(self, k: KernelEmitter, op: Operation, widths: tuple[int, ...]):
        super().__init__(k, op, widths)
        self.other = op["other"]
        self.align = self.dtype.bytes

    def run(self) -> list[list[ir.Value]]:
        return [[self._finish(x, c.lanes.width) for x, c in zip(self._row(row), row, strict=True)] for row in self.rows()]

    def _row(self, chunks: list[AccessChunk]) -> list[ir.Value]:
        """One test for a whole row if all its lanes are guarded alike (a row of a table by its index), and one address if they lie side by side."""
        first = chunks[0]
        if not first.gaps or any(first.lanes.varies(g) for g in first.gaps):
            return [self._chunk(c, *self._mask(c)) for c in chunks]
        inside, _ = self._mask(first)
        linear = first.lanes.linear(first.offset)
        if len(chunks) == 1 or linear is None or linear[0] != 1:
            return [self._chunk(c, inside, None) for c in chunks]
        room = self.k.scratch.filled(self.dtype, self.other, self.shape[-1], self.op["check"])
        pointer = self.b.select(inside, self.address(first.lanes.at(first.offset, 0)), room)
        return [self.b.load(self.b.gep(pointer, [I64(c.lanes.start)], source_etype=self.memory), align=self.align,
                            typ=chunk_type(self.memory, c.lanes.width)) for c in chunks]

    def _mask(self, c: AccessChunk) -> tuple[ir.Value | None, ir.Value | None]:
        """The chunk's mask, reported where outside of it is an error."""
        scalar, vector = c.lanes.mask(c.gaps)
        if self.op["check"] and c.gaps:
            self.k.report(self.op, full_mask(self.b, scalar, vector, c.lanes.width) if scalar is None or vector is not None else scalar)
        return scalar, vector

    def _finish(self, raw: ir.Value, width: int) -> ir.Value:
        """Memory to register form."""
        if self.dtype.name != "i1":
            return raw
        return self.b.icmp_unsigned("!=", raw, splat(self.b, ir.IntType(8)(0), width))

    def _other(self, width: int) -> ir.Value:
        if self.dtype.name == "i1":
            return splat(self.b, ir.IntType(8)(int(bool(self.other))), width)
        return constant(self.other, self.dtype, width)

    def _chunk(self, c: AccessChunk, scalar: ir.Value | None, vector: ir.Value | None) -> ir.Value:
        lanes, b = c.lanes, self.b
        steps = self.steps(c)
        if steps is not None and lanes.width > 1:
            if all(s == 0 for s in steps):
                return self._broadcast(c, scalar, vector)
            if all(s == i for i, s in enumerate(steps)):
                return self._contiguous(lanes.at(c.offset, 0), lanes.width, scalar, vector)
            if all(s == -i for i, s in enumerate(steps)):
                backward = list(range(lanes.width - 1, -1, -1))
                turned = None if vector is None else shuffle(b, vector, backward)
                return shuffle(b, self._contiguous(lanes.at(c.offset, lanes.width - 1), lanes.width, scalar, turned), backward)
            runs = _runs(steps)
            if vector is None and len(runs) * MIN_RUN <= lanes.width:
                return concat(b, [self._contiguous(lanes.at(c.offset, i), n, scalar, None) for i, n in runs])
        mask = full_mask(b, scalar, vector, lanes.width)
        quick = self.has_gather(lanes.width)
        if self.op["check"] and lanes.width > 1 and c.gaps and not (quick and "sse4a" not in self.k.features):
            made = by_lane(self, c, mask, partial(self.numbers_in_memory, c), lambda: self._lanes(c, scalar, vector))
            if made is not None:
                return made
        return self._lanes(c, scalar, vector)()

    def _lanes(self, c: AccessChunk, scalar: ir.Value | None, vector: ir.Value | None) -> Callable[[], ir.Value]:
        """What loads each lane from an address of its own; the addresses are made here."""
        width = c.lanes.width
        if width > 1 and self.has_gather(width):
            vectors = self.vector_address(c)
            return lambda: self._gather(vectors, full_mask(self.b, scalar, vector, width))
        pointers = self.lane_addresses(c)
        return lambda: pack(self.b, [self._guarded(p, 1, _lane_of(self.b, scalar, vector, i)) for i, p in enumerate(pointers)])

    def _broadcast(self, c: AccessChunk, scalar: ir.Value | None, vector: ir.Value | None) -> ir.Value:
        """One element for all lanes, read if any lane wants it."""
        b, width = self.b, c.lanes.width
        if vector is None:
            return splat(b, self._guarded(self.address(c.lanes.at(c.offset, 0)), 1, scalar), width)
        mask = full_mask(b, scalar, vector, width)
        wanted = call(b, f"llvm.vector.reduce.or.{suffix(mask.type)}", I1, [mask])
        value = self._guarded(self.address(c.lanes.at(c.offset, 0)), 1, wanted)
        return b.select(mask, splat(b, value, width), self._other(width))

    def _guarded(self, pointer: ir.Value, width: int, condition: ir.Value | None) -> ir.Value:
        """A load of `width` elements at `pointer`, or `other` where the scalar condition is false."""
        if condition is not None:
            pointer = self.b.select(condition, pointer, self.k.scratch.filled(self.dtype, self.other, hidden=self.op["check"]))
        return self.b.load(pointer, align=self.align, typ=chunk_type(self.memory, width))

    def _contiguous(self, offset: Dim, width: int, scalar: ir.Value | None, vector: ir.Value | None) -> ir.Value:
        b = self.b
        if vector is None:
            return self._guarded(self.address(offset), width, scalar)
        if not self.has_masked:
            return pack(b, [self._guarded(self.address(offset + i), 1, _lane_of(b, scalar, vector, i)) for i in range(width)])
        mask = full_mask(self.b, scalar, vector, width)
        t = chunk_type(self.memory, width)
        return call(b, f"llvm.masked.load.{suffix(t)}.p0", t, [self.address(offset), I32(self.align), mask, self._other(width)])

    def _gather(self, pointers: ir.Value, mask: ir.Value) -> ir.Value:
        width = pointers.type.count
        t = chunk_type(self.memory, width)
        return call(self.b, f"llvm.masked.gather.{suffix(t)}.v{width}p0", t, [pointers, I32(self.align), mask, self._other(width)])


def _lane_of(b: ir.IRBuilder, scalar: ir.Value | None, vector: ir.Value | None, lane: int) -> ir.Value | None:
    if vector is None:
        return scalar
    bit = extract(b, vector, lane)
    return bit if scalar is None else b.and_(scalar, bit)


def emit_load(k: KernelEmitter, op: Operation) -> Tile | ir.Value:
    """The value of a `tile.load`."""
    t = op.result.type
    if not isinstance(t, TileType):
        return _Loader(k, op, (1,)).run()[0][0]
    widths = k.layout(op.result)
    loader = _Loader(k, op, widths)
    return _columns(loader, k.lanes) or Tile(t.shape, t.dtype, widths, loader.run())  # type: ignore[arg-type]


def _columns(x: _Loader, lanes: int) -> Tile | None:
    """A tile whose columns lie in one piece in memory, whose rows do not: columns are read as vectors, and turned in registers. None for others."""
    if len(x.shape) != 2 or x.gaps or x._gathered or x.dtype.name == "i1" or any(n % lanes for n in x.shape) or lanes == 1:
        return None
    down, across = (split_linear(x.offset, position(d)) for d in (0, 1))
    if down is None or across is None or down[0] != 1 or across[0] == 1:
        return None
    rows, columns = x.shape
    starts = [substitute(x.offset, {position(0): 0, position(1): c}) for c in range(columns)]
    read = [[x._contiguous(start + r, lanes, None, None) for r in range(0, rows, lanes)] for start in starts]
    return emit_transpose(x.b, Tile((columns, rows), x.dtype, (lanes,) * (rows // lanes), read), x.widths)


# -- stores -------------------------------------------------------------------------------------------------------------

class _Storer(Accessor):
    def __init__(self, k: KernelEmitter, op: Operation, value: Tile):
        super().__init__(k, op, value.widths)
        self.value = value
        self.align = self.dtype.bytes

    def run(self) -> None:
        for r, row in enumerate(self.rows()):
            for c, chunk in enumerate(row):
                value = self.value.rows[r][c]
                if self.dtype.name == "i1":
                    value = self.b.zext(value, chunk_type(ir.IntType(8), chunk.lanes.width))
                self._chunk(chunk, value)

    def _chunk(self, c: AccessChunk, value: ir.Value) -> None:
        lanes, b = c.lanes, self.b
        scalar, vector = lanes.mask(c.gaps)
        if self.op["atomic"]:
            for i, p in enumerate(self.lane_addresses(c)):
                emit_atomic(b, self.k.features, self.op["atomic"], self.dtype, p, extract(b, value, i),
                            _lane_of(b, scalar, vector, i))
            return
        steps = self.steps(c)
        if steps is not None and lanes.width > 1:
            if all(s == i for i, s in enumerate(steps)):
                self._contiguous(lanes.at(c.offset, 0), value, scalar, vector)
                return
            if all(s == -i for i, s in enumerate(steps)):
                backward = list(range(lanes.width - 1, -1, -1))
                turned = None if vector is None else shuffle(b, vector, backward)
                self._contiguous(lanes.at(c.offset, lanes.width - 1), shuffle(b, value, backward), scalar, turned)
                return
            runs = _runs(steps)
            if vector is None and len(runs) * MIN_RUN <= lanes.width:
                for i, n in runs:
                    self._contiguous(lanes.at(c.offset, i), slice_chunk(b, value, i, n), scalar, None)
                return
        if lanes.width > 1 and "avx512f" in self.k.features and self.memory_bits in (32, 64) and (
                steps is None or any(steps)):
            self._scatter(c, value, full_mask(self.b, scalar, vector, lanes.width))
            return
        for i, p in enumerate(self.lane_addresses(c)):
            self._guarded(p, extract(b, value, i), _lane_of(b, scalar, vector, i))

    def _guarded(self, pointer: ir.Value, value: ir.Value, condition: ir.Value | None) -> None:
        if condition is not None:
            pointer = self.b.select(condition, pointer, self.k.scratch.sink())
        self.b.store(value, pointer, align=self.align)

    def _contiguous(self, offset: Dim, value: ir.Value, scalar: ir.Value | None, vector: ir.Value | None) -> None:
        b = self.b
        if vector is None:
            if scalar is None and self.k.nontemporal.suits(self.op.operands[0], offset, value):
                self.k.nontemporal.store(value, self.address(offset))
                return
            self._guarded(self.address(offset), value, scalar)
            return
        width = value.type.count
        if not self.has_masked:
            for i in range(width):
                self._guarded(self.address(offset + i), extract(b, value, i), _lane_of(b, scalar, vector, i))
            return
        mask = full_mask(self.b, scalar, vector, width)
        call(b, f"llvm.masked.store.{suffix(value.type)}.p0", ir.VoidType(),
             [value, self.address(offset), I32(self.align), mask])

    def _scatter(self, c: AccessChunk, value: ir.Value, mask: ir.Value) -> None:
        pointers = self.vector_address(c)
        call(self.b, f"llvm.masked.scatter.{suffix(value.type)}.v{c.lanes.width}p0", ir.VoidType(),
             [value, pointers, I32(self.align), mask])


def emit_store(k: KernelEmitter, op: Operation) -> None:
    """A `tile.store`."""
    value = k.value(op.operands[1])
    if not isinstance(value, Tile):
        dtype = op.operands[1].type.dtype  # type: ignore[attr-defined]
        value = Tile((1,), dtype, (1,), [[value]])
    _Storer(k, op, value).run()


