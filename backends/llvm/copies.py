"""`host.copy` as a kernel, so that copies are vectorised and parallel like everything else."""

from __future__ import annotations

from ...ir.builder import Builder
from ...ir.core import Block, Operation, Region
from ...ir.expr import Dim, ceildiv, free_symbols, minimum, product, sym
from ...ir.types import BufferType, TileType, index

__all__ = ["copy_kernel", "is_plain_copy"]

WIDTH = 64
CHUNK = 4096


def is_plain_copy(source: BufferType, target: BufferType) -> bool:
    """True if both are dense and laid out alike: the elements in memory order are the same."""
    if source.strides is None and target.strides is None:
        return True
    return _relevant(source) == _relevant(target) and _dense(target)


def _relevant(t: BufferType) -> list[tuple[Dim, Dim]]:
    return [(n, s) for n, s in zip(t.shape, t.layout) if n != 1]


def _dense(t: BufferType) -> bool:
    expected: Dim = 1
    dims = _relevant(t)
    while dims:
        found = next((d for d in dims if d[1] == expected), None)
        if found is None:
            return False
        dims.remove(found)
        expected = expected * found[0]
    return True


def copy_kernel(name: str, source: BufferType, target: BufferType) -> Operation:
    """A kernel that copies any strided buffer to another of the same shape. Its symbols are those of the two types, sorted."""
    if is_plain_copy(source, target):
        dims: list[tuple[Dim, Dim, Dim]] = [(source.numel, 1, 1)]
    else:
        dims = [(n, s, t) for n, s, t in zip(target.shape, source.layout, target.layout) if n != 1] or [(1, 1, 1)]
    vector = min(range(len(dims)), key=lambda d: (dims[d][2] != 1, dims[d][1] != 1, -d))
    block = Block([source, target])
    b = Builder.at_end(block)
    outer = [d for d in range(len(dims)) if d != vector]
    chunks = ceildiv(dims[vector][0], CHUNK)
    grid = (*(dims[d][0] for d in outer), chunks)
    ids = [b.op("tile.program_id", type=index, axis=a) for a in range(len(grid))]
    start, size = sym(f"i{len(outer)}") * CHUNK, dims[vector][0]
    body = Block([index])
    inner = Builder.at_end(body)
    operands = [*(ids[a] for a in range(len(outer))), body.args[0]]
    position = sym(f"i{len(outer)}") + sym("t0")
    exact = isinstance(size, int) and size % CHUNK == 0
    upper = sym(f"i{len(outer) + 1}") * CHUNK + CHUNK if exact else minimum(size, sym(f"i{len(outer) + 1}") * CHUNK + CHUNK)
    mask = () if exact else ((position, upper),)

    def offset(which: int) -> Dim:
        total: Dim = position * dims[vector][which]
        for a, d in enumerate(outer):
            total = total + sym(f"i{a}") * dims[d][which]
        return total

    value = inner.op("tile.load", block.args[0], *operands, ids[-1], type=TileType((WIDTH,), source.dtype), offset=offset(1),
                     shape=(WIDTH,), mask=mask)
    inner.create("tile.store", [block.args[1], value, *operands, ids[-1]], {"offset": offset(2), "mask": mask})
    inner.create("tile.yield")
    bound = start + CHUNK if exact else minimum(size, start + CHUNK)
    b.create("tile.for", ids, {"lower": start, "upper": bound, "step": WIDTH, "indices": len(ids)}, (), [Region([body])])
    b.create("tile.yield")
    used = [e for d in dims for e in d]
    symbols = tuple(sorted(set().union(*(free_symbols(e) for e in used))))
    return Operation.create("tile.kernel", (), {"sym_name": name, "grid": grid, "symbols": symbols, "outputs": 1,
                                                "bytes": product(source.shape) * source.dtype.bytes * 2}, (), [Region([block])])
