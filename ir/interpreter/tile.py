"""Reference semantics of kernels: all programs of a grid at once.

A scalar of a kernel is a torch tensor of shape [P], a tile one of shape [P, *tile], where P is the number of programs that run
together, or 1 while the value is the same for all of them. `LANES` bounds the memory: larger grids run in pieces, in order.

Loops: iterations, too, run together as far as they do not depend on each other (`loops.py`): as lanes of their own,
program-major.

Memory is laid out as the tensor types of the launch say. An output that `inplace` pairs with an input shares its memory;
all other outputs start poisoned. See `memory.py` for what is checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..core import Block, IRError, Operation, Value
from ..expr import Dim
from ..types import BufferType, TensorType, TileType
from . import arith
from .context import WIDENED, Context, Handler, bind_shape, evaluate_index, failure
from .graph import first_of
from .loops import lift, run_loop
from .memory import Memory, extent
from .tensor import combine

Tensor = torch.Tensor

__all__ = ["HANDLERS", "LANES"]

LANES = 1 << 22
"""Elements of the largest tile of a kernel, times the programs that run together."""


def _rank(v: Value) -> int:
    return v.type.rank if isinstance(v.type, TileType) else 0


@dataclass
class Programs:
    """Lanes that run together: programs, or iterations of a loop of each.

    ids: [P] the number in the grid of each lane's program.
    lanes: [P] the number of each lane's program among those that share scratch memory.
    active: [P] false for programs that are done with a loop; none when all run.
    written: the buffers that the kernel stores to.
    largest: elements of the kernel's largest tile.
    ordered: whether several lanes belong to one program (stores of later lanes then win).
    """

    ctx: Context
    grid: tuple[int, ...]
    ids: Tensor
    lanes: Tensor
    env: dict[Value, Any]
    written: frozenset[Value]
    largest: int
    active: Tensor | None = None
    ordered: bool = False

    def run(self, block: Block) -> None:
        """Runs all ops of `block` but its terminator."""
        terminator = block.terminator
        for op in block:
            if op is terminator:
                return
            self.run_op(op)

    def run_op(self, op: Operation) -> None:
        """Runs one op on the values in `env`, which learns its results."""
        handler = _OPS.get(op.name)
        try:
            if handler is None:
                raise IRError(f"'{op.name}' cannot stand in a kernel")
            results = handler(self, op, [self.env[v] for v in op.operands])
        except IndexError as e:
            raise IndexError(str(failure(op, str(e)))) from e
        except IRError as e:
            raise e if "\n  in " in str(e) else failure(op, str(e)) from e
        except (RuntimeError, TypeError, ValueError, KeyError) as e:
            raise failure(op, f"{type(e).__name__}: {e}") from e
        self.env.update(zip(op.results, results, strict=True))

    def index(self, indices: Sequence[Tensor], shape: Sequence[int]) -> Callable[[Dim], Tensor]:
        """A function from expressions over i0.., t0.. and sizes to values of full rank, broadcastable to [P, *shape]."""
        rank = len(shape)
        grids = {f"i{k}": lift(x, rank).to(torch.int64) for k, x in enumerate(indices)}
        for k, n in enumerate(shape):
            grids[f"t{k}"] = torch.arange(n).reshape([1] + [n if j == k else 1 for j in range(rank)])

        def value(e: Dim) -> Tensor:
            got = evaluate_index(self.ctx, e, grids)
            return got.reshape((1,) * (rank + 1 - got.dim()) + got.shape)
        return value

    def wanted(self, op: Operation, value: Callable[[Dim], Tensor], rank: int) -> tuple[Tensor, Tensor]:
        """(where the op's mask holds, where besides the program is active)."""
        mask = lift(_conjunction(op, value), rank)
        return mask, mask if self.active is None else mask & lift(self.active, rank)


def _conjunction(op: Operation, value: Callable[[Dim], Tensor]) -> Tensor:
    mask = torch.ones(1, dtype=torch.bool)
    for a, b in op["mask"]:
        mask = mask & (value(a) < value(b))
    for a in op["mask_low"] if "mask_low" in op.opdef.attrs else ():
        mask = mask & (value(a) >= 0)
    return mask


def _part(p: Programs, op: Operation, xs: list[Any]) -> list[Any]:
    """The programs of a part, numbered as in a grid of their own."""
    count = math.prod(op["grid"])
    mine = ((p.ids >= op["first"]) & (p.ids < op["first"] + count)).nonzero().flatten()
    if len(mine):
        replace(p, grid=tuple(op["grid"]), ids=p.ids[mine] - op["first"], lanes=p.lanes[mine], env=dict(p.env)).run(op.body)
    return []


# -- memory -----------------------------------------------------------------------------------------------------------

def _load(p: Programs, op: Operation, xs: list[Any]) -> list[Any]:
    memory, *indices = xs
    shape = op["shape"]
    value = p.index(indices, shape)
    mask, wanted = p.wanted(op, value, len(shape))
    if op["check"]:
        outside = ~mask if p.active is None else lift(p.active, len(shape)) & ~mask
        if bool(outside.any()):
            raise IndexError("an index given by the user is out of range")
    got = memory.load(value(op["offset"]), wanted, lift(p.lanes, len(shape)), lift(p.ids, len(shape)))
    if not bool(wanted.all()):
        got = arith.select(wanted, got, torch.tensor(op["other"], dtype=got.dtype))
    return [got.expand(-1, *shape)]


def _store(p: Programs, op: Operation, xs: list[Any]) -> list[Any]:
    memory, stored, *indices = xs
    shape = op.operands[1].type.shape if _rank(op.operands[1]) else ()  # type: ignore[attr-defined]
    value = p.index(indices, shape)
    _, wanted = p.wanted(op, value, len(shape))
    stored, lanes, ids = (lift(x, len(shape)) for x in (stored, p.lanes, p.ids))
    memory.store(value(op["offset"]), wanted, stored, lanes, ids, atomic=op["atomic"], ordered=p.ordered)
    return []


def _sort(p: Programs, op: Operation, xs: list[Any]) -> list[Any]:
    """Each program's row is read whole and sorted."""
    outs = int(op["values"]) + int(op["places"])
    source, *buffers = xs[:1 + outs]
    numbers = [x.reshape(-1, 1) for x in xs[1 + outs:]]
    start, (n, keep) = numbers[0], (int(x.max()) for x in numbers[1:3])
    lanes, ids = (lift(x, 1) for x in (p.lanes, p.ids))
    active = torch.ones(1, 1, dtype=torch.bool) if p.active is None else lift(p.active, 1)
    row = source.load((start + torch.arange(n)).expand(len(p.ids), n), active, lanes, ids)
    values, first = first_of(row, keep, op["largest"], op["pick"])
    keep = first.shape[1]
    made = [*([values] if op["values"] else []), *([first] if op["places"] else [])]
    for j, (buffer, value) in enumerate(zip(buffers, made, strict=True)):
        into, step = numbers[3 + 2 * j:5 + 2 * j]
        buffer.store((into + torch.arange(keep) * step).expand(len(p.ids), keep), active, value, lanes, ids)
    return []


def _alloca(p: Programs, op: Operation, xs: list[Any]) -> list[Any]:
    t = op.result.type
    assert isinstance(t, BufferType)
    return [Memory.fresh(extent(p.ctx.dims(t.shape), p.ctx.dims(t.layout)), p.ctx.dtype(t), programs=int(p.lanes[-1]) + 1)]


# -- values -----------------------------------------------------------------------------------------------------------

def _program_id(p: Programs, op: Operation, xs: list[Any]) -> list[Any]:
    axis = op["axis"]
    return [p.ids // math.prod(p.grid[axis + 1:]) % p.grid[axis]]


def _index(p: Programs, op: Operation, xs: list[Any]) -> list[Any]:
    shape = op["shape"]
    return [p.ctx.to_type(p.index(xs, shape)(op["expr"]).expand(-1, *shape), op.result.type)]


def _mask(p: Programs, op: Operation, xs: list[Any]) -> list[Any]:
    shape = op["shape"]
    mask = _conjunction(op, p.index(xs, shape))
    return [lift(mask, len(shape)).expand(-1, *shape)]


def _full(p: Programs, op: Operation, xs: list[Any]) -> list[Any]:
    t = op.result.type
    assert isinstance(t, TileType)
    return [lift(xs[0], t.rank).expand(-1, *p.ctx.dims(t.shape))]


def _reduce(p: Programs, op: Operation, xs: list[Any]) -> list[Any]:
    x, axis = xs[0], op["axis"] + 1
    return [combine(op["kind"], x.movedim(axis, -1), x.dim() - 1).unsqueeze(axis)]


def _scan(p: Programs, op: Operation, xs: list[Any]) -> list[Any]:
    x, axis = xs[0], op["axis"] + 1
    parts = [combine(op["kind"], x.narrow(axis, 0, n + 1).movedim(axis, -1), x.dim() - 1) for n in range(x.shape[axis])]
    return [torch.stack(parts, axis)]


def _reshape(p: Programs, op: Operation, xs: list[Any]) -> list[Any]:
    shape = op.result.type.shape if _rank(op.result) else ()  # type: ignore[attr-defined]
    return [xs[0].reshape(-1, *shape)]


def _transpose(p: Programs, op: Operation, xs: list[Any]) -> list[Any]:
    return [xs[0].transpose(1, 2)]


def _every(p: Programs, op: Operation, xs: list[Any]) -> list[Any]:
    return [xs[0][:, :, op["first"] :: op["of"]]]


def _dot(p: Programs, op: Operation, xs: list[Any]) -> list[Any]:
    a, b, acc = xs
    if not acc.is_floating_point():
        # in f64, sums of products of narrow integers are exact, and much faster
        wide = torch.float64 if a.dtype.itemsize <= 2 else acc.dtype
        return [acc + (a.to(wide) @ b.to(wide)).to(acc.dtype)]
    wide = torch.float32 if acc.dtype in WIDENED else acc.dtype
    return [(acc.to(wide) + a.to(wide) @ b.to(wide)).to(acc.dtype)]


def _for(p: Programs, op: Operation, xs: list[Any]) -> list[Any]:
    n = op["indices"]
    value = p.index(xs[:n], ())
    return run_loop(p, op, value(op["lower"]), value(op["upper"]), xs[n:])


def _arith(p: Programs, op: Operation, xs: list[Any]) -> list[Any]:
    rank = _rank(op.result)
    (got,) = arith.HANDLERS[op.name](p.ctx, op, [lift(x, rank) for x in xs])
    return [got.reshape(1) if got.dim() == 0 else got]


def _require(p: Programs, op: Operation, xs: list[Any]) -> list[Any]:
    cond, value = xs
    if p.active is not None:
        cond = cond | ~lift(p.active, cond.dim() - 1)
    if not bool(cond.all()):
        raise IndexError(op["message"])
    return [value]


_OPS: dict[str, Callable[[Programs, Operation, list[Any]], list[Any]]] = {
    **dict.fromkeys(arith.HANDLERS, _arith),
    "tile.part": _part, "tile.load": _load, "tile.store": _store, "tile.alloca": _alloca, "tile.sort": _sort,
    "tile.program_id": _program_id, "tile.index": _index,
    "tile.mask": _mask, "tile.full": _full, "tile.reduce": _reduce, "tile.scan": _scan, "tile.reshape": _reshape, "tile.transpose": _transpose,
    "tile.every": _every, "tile.dot": _dot, "tile.require": _require, "tile.for": _for, "tile.prefetch": lambda p, op, xs: [],
}


# -- launches ---------------------------------------------------------------------------------------------------------

def _kernel_of(ctx: Context, op: Operation) -> Operation:
    kernel = ctx.kernels.get(op["kernel"].name)
    if kernel is None:
        known = ", ".join(f"@{k}" for k in ctx.kernels)
        raise IRError(f"there is no kernel {op['kernel']} in the module; kernels: {known or 'none'}")
    given, taken = (len(op.operands), len(op.results)), (len(kernel.body.args) - kernel["outputs"], kernel["outputs"])
    if given != taken:
        raise IRError(f"@{kernel['sym_name']} has {taken[0]} inputs and {taken[1]} outputs, "
                      f"launched with {given[0]} and {given[1]}")
    return kernel


def _kernel_symbols(ctx: Context, kernel: Operation, op: Operation) -> dict[str, int]:
    """Values of the kernel's size symbols: by name, or else read off the shapes of its arguments."""
    symbols = dict(ctx.symbols)
    if set(kernel["symbols"]) - symbols.keys():
        for a, v in zip(kernel.body.args, [*op.operands, *op.results]):
            assert isinstance(a.type, BufferType)
            bind_shape(a.type.shape, ctx.shape(v.type), symbols, f"argument {a.index} of @{kernel['sym_name']}")
    return symbols


def _launch(ctx: Context, op: Operation, xs: list[Tensor]) -> list[Tensor]:
    kernel = _kernel_of(ctx, op)
    inner = replace(ctx, symbols=_kernel_symbols(ctx, kernel, op))
    types = [v.type for v in (*op.operands, *op.results)]
    layouts = [(ctx.shape(t), ctx.dims(t.layout)) for t in types if isinstance(t, TensorType)]
    memories = [Memory.holding(x, strides) for x, (_, strides) in zip(xs, layouts)]
    paired: dict[int, int] = {}
    for source, output in kernel["inplace"]:
        if output not in paired and source not in paired.values():
            paired[output] = source
    for i, r in enumerate(op.results, len(xs)):
        fresh = Memory.fresh(extent(*layouts[i]), ctx.dtype(r.type), check=ctx.check)
        source = memories[paired[i]].flat if i in paired else fresh.flat
        if source is not fresh.flat and (source.dtype, source.shape) == (fresh.flat.dtype, fresh.flat.shape):
            memories[paired[i]] = fresh = Memory(source, fresh.size, writers=fresh.writers)
        memories.append(fresh)
    for a, m in zip(kernel.body.args, memories, strict=True):
        assert isinstance(a.type, BufferType)
        if m.flat.dtype != inner.dtype(a.type) or extent(inner.shape(a.type), inner.dims(a.type.layout)) > m.size:
            raise IRError(f"argument {a.index} of @{kernel['sym_name']} is {a.type}, launched with {m.size} elements "
                          f"of {m.flat.dtype}")
    grid = inner.dims(kernel["grid"])
    total = math.prod(grid)
    tiles = {v.type for o in kernel.walk() for v in (*o.operands, *o.results) if isinstance(v.type, TileType)}
    largest = max([1, *(math.prod(inner.dims(t.shape)) for t in tiles)])
    written = frozenset(o.operands[0] for o in kernel.walk() if o.name == "tile.store")
    together = max(1, LANES // largest)
    try:
        for start in range(0, total, together):
            ids = torch.arange(start, min(start + together, total))
            env: dict[Value, Any] = dict(zip(kernel.body.args, memories))
            Programs(inner, grid, ids, torch.arange(len(ids)), env, written, largest).run(kernel.body)
    except (IRError, IndexError) as e:
        raise type(e)(f"in kernel @{kernel['sym_name']}: {e}") from e
    for i, r in enumerate(op.results, len(xs)):
        missing = memories[i].unwritten(*layouts[i]) if i not in paired else None
        if missing is not None:
            raise IRError(f"@{kernel['sym_name']} leaves element {missing} of output {r.index} unwritten")
    return [m.tensor(*layout) for m, layout in zip(memories[len(xs):], layouts[len(xs):])]


HANDLERS: dict[str, Handler] = {"tile.launch": _launch}
