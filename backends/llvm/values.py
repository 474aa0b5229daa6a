"""Values in registers: how scalars and tiles of the tile dialect are held in LLVM values.

A tile is a list of rows (its leading dimensions, flattened row-major), each a list of *chunks* along the last dimension:
`tile<12x32xf32>` on a machine of 16 lanes is 12 rows of two `<16 x float>`. A chunk of width 1 is an LLVM scalar,
so that `tile<12x1xf32>` is twelve scalars, splatted where something wider needs them. Any width is legal LLVM.

In registers i1 is `i1`; bf16 and the fp8 types are their bit patterns (`i16`, `i8`): arithmetic on them goes
through f32. In memory i1 is a byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from llvmlite import ir

from ...ir.types import DType
from .lanes import splat as repeated

__all__ = [
    "I1",
    "I32",
    "I64",
    "PTR",
    "Tile",
    "chunk_type",
    "concat",
    "constant",
    "extract",
    "is_constant",
    "memory_type",
    "opaque",
    "pack",
    "recut",
    "register_type",
    "sequence",
    "slice_chunk",
    "splat",
    "split_widths",
    "stack_slot",
    "undef",
    "with_widths",
]

I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
PTR = ir.PointerType()

_REGISTER: dict[str, ir.Type] = {
    "f64": ir.DoubleType(), "f32": ir.FloatType(), "f16": ir.HalfType(), "bf16": I16, "f8e4m3fn": I8, "f8e5m2": I8,
    "i64": I64, "i32": I32, "i16": I16, "i8": I8, "u8": I8, "u16": I16, "u32": I32, "u64": I64, "i1": I1, "index": I64,
    "c64": I64, "c128": ir.IntType(128),  # complex numbers are only ever moved
}


def register_type(dtype: DType) -> ir.Type:
    """The LLVM type of one element in a register."""
    return _REGISTER[dtype.name]


def memory_type(dtype: DType) -> ir.Type:
    """The LLVM type of one element in memory."""
    return I8 if dtype.name == "i1" else _REGISTER[dtype.name]


def chunk_type(element: ir.Type, width: int) -> ir.Type:
    """A scalar for width 1, else a vector."""
    return element if width == 1 else ir.VectorType(element, width)


def stack_slot(b: ir.IRBuilder, type_: ir.Type, align: int = 0) -> ir.Value:
    """An alloca as an opaque pointer."""
    slot = b.alloca(type_)
    slot.type = PTR
    if align:
        slot.align = align
    return slot


def opaque(b: ir.IRBuilder, pointer: ir.Value) -> ir.Value:
    """The same pointer, of which LLVM knows nothing: an assembly of no instructions that may have touched what it points to."""
    return b.call(ir.InlineAsm(ir.FunctionType(PTR, [PTR]), "", "=r,0,~{memory}", side_effect=True), [pointer])


def undef(type_: ir.Type) -> ir.Constant:
    """An undefined value; vectors and scalars of one type are shared."""
    return _undef(type_.element, type_.count) if isinstance(type_, ir.VectorType) else _undef(type_, 0)


@lru_cache(maxsize=256)
def _undef(element: ir.Type, count: int) -> ir.Constant:
    made = ir.Constant(ir.VectorType(element, count) if count else element, ir.Undefined)
    made.constant = ir.Undefined  # of a vector llvmlite makes a list, whose text is long and read often
    return made


@lru_cache(maxsize=1024)
def sequence(element: ir.Type, values: tuple[int, ...]) -> ir.Constant:
    """These integers as a chunk."""
    return ir.Constant(chunk_type(element, len(values)), list(values) if len(values) > 1 else values[0])


def is_constant(value: ir.Value) -> bool:
    """True for a defined constant."""
    return isinstance(value, ir.Constant) and value.constant is not ir.Undefined


def constant(value: Any, dtype: DType, width: int = 1) -> ir.Constant:
    """`value` (a Python number) in every lane."""
    element = register_type(dtype)
    if dtype.name == "bf16":
        bits = int(np.float32(value).view(np.uint32))
        number: Any = (bits >> 16) | 0x40 if value != value else (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 & 0xFFFF
    elif dtype.name in ("f8e4m3fn", "f8e5m2"):
        if value != 0:
            raise NotImplementedError(f"a constant of type {dtype} other than 0: make it in f32 and cast")
        number = 0
    elif dtype.is_float:
        number = float(value)
    elif dtype.kind == "bool":
        number = int(bool(value))
    else:
        number = int(value)
    return repeated(chunk_type(element, width), number)


def width_of(value: ir.Value) -> int:
    """Lanes of a chunk."""
    return value.type.count if isinstance(value.type, ir.VectorType) else 1


def element_of(value: ir.Value) -> ir.Type:
    """LLVM element type of a chunk."""
    return value.type.element if isinstance(value.type, ir.VectorType) else value.type


def _order(lanes: Sequence[int]) -> ir.Constant:
    return _mask(tuple(lanes))


@lru_cache(maxsize=1024)
def _mask(lanes: tuple[int, ...]) -> ir.Constant:
    return ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes))


def splat(b: ir.IRBuilder, value: ir.Value, width: int) -> ir.Value:
    """The scalar `value` in every lane of a chunk."""
    if width == 1:
        return value
    type_ = ir.VectorType(value.type, width)
    if is_constant(value):
        return repeated(type_, value.constant)
    first = b.insert_element(undef(type_), value, I32(0))
    return b.shuffle_vector(first, undef(type_), _order([0] * width))


def extract(b: ir.IRBuilder, chunk: ir.Value, lane: int) -> ir.Value:
    """One lane of a chunk."""
    return b.extract_element(chunk, I32(lane)) if isinstance(chunk.type, ir.VectorType) else chunk


def slice_chunk(b: ir.IRBuilder, chunk: ir.Value, start: int, width: int) -> ir.Value:
    """Lanes [start, start + width) of a chunk."""
    if width == width_of(chunk):
        return chunk
    return extract(b, chunk, start) if width == 1 else shuffle(b, chunk, range(start, start + width))


def shuffle(b: ir.IRBuilder, chunk: ir.Value, lanes: Sequence[int]) -> ir.Value:
    """The lanes of one vector in another order (any number of them, at least two)."""
    return b.shuffle_vector(chunk, undef(chunk.type), _order(list(lanes)))


def pack(b: ir.IRBuilder, scalars: Sequence[ir.Value]) -> ir.Value:
    """Scalars side by side in one chunk."""
    if len(scalars) == 1:
        return scalars[0]
    if all(map(is_constant, scalars)):
        return ir.Constant(ir.VectorType(scalars[0].type, len(scalars)), list(scalars))
    result: ir.Value = undef(ir.VectorType(scalars[0].type, len(scalars)))
    for lane, s in enumerate(scalars):
        result = b.insert_element(result, s, I32(lane))
    return result


def concat(b: ir.IRBuilder, chunks: Sequence[ir.Value]) -> ir.Value:
    """Chunks (of any widths) end to end."""
    if len(chunks) == 1:
        return chunks[0]
    widths = [width_of(c) for c in chunks]
    if all(w == 1 for w in widths):
        return pack(b, chunks)
    parts = [c if w > 1 else b.insert_element(undef(ir.VectorType(c.type, 1)), c, I32(0)) for c, w in zip(chunks, widths)]
    while len(parts) > 1:
        joined = [_join(b, x, y) for x, y in zip(parts[::2], parts[1::2])]
        parts = joined + ([parts[-1]] if len(parts) % 2 else [])
    return parts[0]


def _join(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    nx, ny = x.type.count, y.type.count
    n = max(nx, ny)
    if nx < n:
        x = b.shuffle_vector(x, undef(x.type), _order([i if i < nx else 0 for i in range(n)]))
    if ny < n:
        y = b.shuffle_vector(y, undef(y.type), _order([i if i < ny else 0 for i in range(n)]))
    return b.shuffle_vector(x, y, _order([*range(nx), *range(n, n + ny)]))


def split_widths(size: int, lanes: int) -> tuple[int, ...]:
    """Chunk widths for a last dimension of `size`: full vectors and one narrower remainder."""
    full, rest = divmod(size, lanes)
    return (lanes,) * full + ((rest,) if rest else ())


@dataclass
class Tile:
    """A tile in registers. `rows[r][c]` is chunk c (of `widths[c]` lanes) of flattened row r; the shape is constant."""

    shape: tuple[int, ...]
    dtype: DType
    widths: tuple[int, ...]
    rows: list[list[ir.Value]]

    @property
    def values(self) -> list[ir.Value]:
        """All chunks, row-major."""
        return [c for row in self.rows for c in row]

    def with_values(self, values: Sequence[ir.Value]) -> Tile:
        """A tile of the same form from chunks in the order of `values`."""
        n = len(self.widths)
        return Tile(self.shape, self.dtype, self.widths, [list(values[i:i + n]) for i in range(0, len(values), n)])

    def lanes(self, b: ir.IRBuilder, row: int) -> list[ir.Value]:
        """Every element of one row, as scalars."""
        return [extract(b, c, i) for c, w in zip(self.rows[row], self.widths) for i in range(w)]


def with_widths(b: ir.IRBuilder, tile: Tile, widths: tuple[int, ...]) -> Tile:
    """The same tile cut into chunks of other widths."""
    if tile.widths == widths:
        return tile
    return Tile(tile.shape, tile.dtype, widths, [recut(b, row, tile.widths, widths) for row in tile.rows])


def recut(b: ir.IRBuilder, row: Sequence[ir.Value], old: Sequence[int], new: Sequence[int]) -> list[ir.Value]:
    """A run of chunks of widths `old` cut again into widths `new`."""
    result: list[ir.Value] = []
    index, used = 0, 0  # the chunk being consumed, and how many of its lanes are gone
    for w in new:
        pieces, missing = [], w
        while missing:
            take = min(missing, old[index] - used)
            pieces.append(slice_chunk(b, row[index], used, take))
            used, missing = used + take, missing - take
            if used == old[index]:
                index, used = index + 1, 0
        result.append(concat(b, pieces))
    return result
