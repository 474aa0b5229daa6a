"""Reference semantics of kernels: all programs of a grid at once.

A scalar of a kernel is a torch tensor of shape [P], a tile one of shape [P, *tile], where P is the number of programs that run
together, or 1 while the value is the same for all of them. Loops with equal bounds are Python loops; where bounds differ, programs
that are done are masked. `LANES` bounds the memory: larger grids run in pieces, in order.

Memory is laid out as the tensor types of the launch say. An output that `inplace` pairs with an input starts as a copy of it; all other
outputs start poisoned. See `memory.py` for what is checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..core import Block, IRError, Operation, Value
from ..expr import Dim
from ..types import BufferType, TensorType, TileType
from . import arith
from .context import WIDENED, Context, Handler, bind_shape, evaluate_index, failure
from .memory import Memory, extent
from .tensor import combine

Tensor = torch.Tensor

__all__ = ["HANDLERS", "LANES"]

LANES = 1 << 22
"""Elements of the largest tile of a kernel, times the programs that run together."""


def _rank(v: Value) -> int:
    return v.type.rank if isinstance(v.type, TileType) else 0


def _lift(x: Tensor, rank: int) -> Tensor:
    """A scalar of every program as a tile of size 1; tiles as they are."""
    return x.reshape(x.shape[0], *(1,) * rank) if x.dim() == 1 else x


@dataclass
class _Programs:
    """Programs that run together. `ids` [P] are their numbers in the grid; `active` [P] is false for those that are done with a loop."""

    ctx: Context
    grid: tuple[int, ...]
    ids: Tensor
    env: dict[Value, Any]
    active: Tensor | None = None

    @property
    def lanes(self) -> Tensor:
        return torch.arange(len(self.ids))

    def run(self, block: Block) -> None:
        """Runs all ops of `block` but its terminator."""
        terminator = block.terminator
        for op in block:
            if op is terminator:
                return
            values = [self.env[v] for v in op.operands]
            try:
                results = _run_op(self, op, values)
            except IndexError as e:
                raise IndexError(str(failure(op, str(e)))) from e
            except IRError as e:
                raise e if "\n  in " in str(e) else failure(op, str(e)) from e
            except (RuntimeError, TypeError, ValueError, KeyError) as e:
                raise failure(op, f"{type(e).__name__}: {e}") from e
            self.env.update(zip(op.results, results, strict=True))

    def index(self, indices: Sequence[Tensor], shape: Sequence[int]) -> Callable[[Dim], Tensor]:
        """A function from expressions over i0.., t0.. and sizes to values of full rank, broadcastable over programs and `shape`."""
        rank = len(shape)
        grids = {f"i{k}": _lift(x, rank).to(torch.int64) for k, x in enumerate(indices)}
        for k, n in enumerate(shape):
            grids[f"t{k}"] = torch.arange(n).reshape([1] + [n if j == k else 1 for j in range(rank)])

        def value(e: Dim) -> Tensor:
            got = evaluate_index(self.ctx, e, grids)
            return got.reshape((1,) * (rank + 1 - got.dim()) + got.shape)
        return value

    def wanted(self, op: Operation, value: Callable[[Dim], Tensor], rank: int) -> tuple[Tensor, Tensor]:
        """(where the op's mask holds, where besides the program is active)."""
        mask = _lift(_conjunction(op, value), rank)
        return mask, mask if self.active is None else mask & _lift(self.active, rank)


def _conjunction(op: Operation, value: Callable[[Dim], Tensor]) -> Tensor:
    mask = torch.ones(1, dtype=torch.bool)
    for a, b in op["mask"]:
        mask = mask & (value(a) < value(b))
    for a in op["mask_low"] if "mask_low" in op.opdef.attrs else ():
        mask = mask & (value(a) >= 0)
    return mask


# -- memory -----------------------------------------------------------------------------------------------------------

def _load(p: _Programs, op: Operation, xs: list[Any]) -> list[Any]:
    memory, *indices = xs
    shape = op["shape"]
    value = p.index(indices, shape)
    mask, wanted = p.wanted(op, value, len(shape))
    if op["check"]:
        outside = ~mask if p.active is None else _lift(p.active, len(shape)) & ~mask
        if bool(outside.any()):
            raise IndexError("an index given by the user is out of range")
    got = memory.load(value(op["offset"]), wanted, _lift(p.lanes, len(shape)), _lift(p.ids, len(shape)))
    if not bool(wanted.all()):
        got = torch.where(wanted, got, torch.tensor(op["other"], dtype=got.dtype))
    return [got.expand(-1, *shape)]


def _store(p: _Programs, op: Operation, xs: list[Any]) -> list[Any]:
    memory, stored, *indices = xs
    shape = op.operands[1].type.shape if _rank(op.operands[1]) else ()  # type: ignore[attr-defined]
    value = p.index(indices, shape)
    _, wanted = p.wanted(op, value, len(shape))
    memory.store(value(op["offset"]), wanted, _lift(stored, len(shape)), op["atomic"], _lift(p.lanes, len(shape)), _lift(p.ids, len(shape)))
    return []


def _alloca(p: _Programs, op: Operation, xs: list[Any]) -> list[Any]:
    t = op.result.type
    assert isinstance(t, BufferType)
    return [Memory.fresh(extent(p.ctx.dims(t.shape), p.ctx.dims(t.layout)), p.ctx.dtype(t), programs=len(p.ids))]


# -- values -----------------------------------------------------------------------------------------------------------

def _program_id(p: _Programs, op: Operation, xs: list[Any]) -> list[Any]:
    axis = op["axis"]
    return [p.ids // math.prod(p.grid[axis + 1:]) % p.grid[axis]]


def _index(p: _Programs, op: Operation, xs: list[Any]) -> list[Any]:
    shape = op["shape"]
    return [p.ctx.to_type(p.index(xs, shape)(op["expr"]).expand(-1, *shape), op.result.type)]


def _mask(p: _Programs, op: Operation, xs: list[Any]) -> list[Any]:
    shape = op["shape"]
    mask = _conjunction(op, p.index(xs, shape))
    return [_lift(mask, len(shape)).expand(-1, *shape)]


def _full(p: _Programs, op: Operation, xs: list[Any]) -> list[Any]:
    t = op.result.type
    assert isinstance(t, TileType)
    return [_lift(xs[0], t.rank).expand(-1, *t.shape)]


def _reduce(p: _Programs, op: Operation, xs: list[Any]) -> list[Any]:
    x, axis = xs[0], op["axis"] + 1
    return [combine(op["kind"], x.movedim(axis, -1), x.dim() - 1).unsqueeze(axis)]


def _reshape(p: _Programs, op: Operation, xs: list[Any]) -> list[Any]:
    shape = op.result.type.shape if _rank(op.result) else ()  # type: ignore[attr-defined]
    return [xs[0].reshape(-1, *shape)]


def _transpose(p: _Programs, op: Operation, xs: list[Any]) -> list[Any]:
    return [xs[0].transpose(1, 2)]


def _dot(p: _Programs, op: Operation, xs: list[Any]) -> list[Any]:
    a, b, acc = xs
    wide = torch.float32 if acc.dtype in WIDENED else acc.dtype
    if not wide.is_floating_point and a.dtype.itemsize <= 2:
        wide = torch.float64  # exact for sums of products of narrow integers, and much faster
    product = a.to(wide) @ b.to(wide)
    return [(acc.to(wide) + product).to(acc.dtype) if wide.is_floating_point and acc.is_floating_point() else acc + product.to(acc.dtype)]


def _for(p: _Programs, op: Operation, xs: list[Any]) -> list[Any]:
    n = op["indices"]
    value = p.index(xs[:n], ())
    lower, upper, step = value(op["lower"]), value(op["upper"]), op["step"]
    iv, *carried = op.body.args
    state = list(xs[n:])
    yielded = op.body.terminator.operands
    outer = p.active
    for at, active in _iterations(lower, upper, step, outer):
        p.env[iv] = at
        p.env.update(zip(carried, state))
        p.active = active
        p.run(op.body)
        new = [p.env[v] for v in yielded]
        if active is not outer:
            new = [torch.where(_lift(active, x.dim() - 1), x, old) for x, old in zip(new, state)]  # type: ignore[arg-type]
        state = new
    p.active = outer
    return state


def _iterations(lower: Tensor, upper: Tensor, step: int, active: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """(induction values, active programs) of each iteration."""
    if bool((lower == lower[0]).all()) and bool((upper == upper[0]).all()):
        for i in range(int(lower[0]), int(upper[0]), step):
            yield torch.tensor([i]), active
        return
    at = lower.expand(torch.broadcast_shapes(lower.shape, upper.shape))
    while True:
        running = at < upper if active is None else (at < upper) & active
        if not bool(running.any()):
            return
        yield at, running
        at = at + step


def _arith(p: _Programs, op: Operation, xs: list[Any]) -> list[Any]:
    rank = _rank(op.result)
    (got,) = arith.HANDLERS[op.name](p.ctx, op, [_lift(x, rank) for x in xs])
    return [got.reshape(1) if got.dim() == 0 else got]


_OPS: dict[str, Callable[[_Programs, Operation, list[Any]], list[Any]]] = {
    **dict.fromkeys(arith.HANDLERS, _arith),
    "tile.load": _load, "tile.store": _store, "tile.alloca": _alloca, "tile.program_id": _program_id, "tile.index": _index,
    "tile.mask": _mask, "tile.full": _full, "tile.reduce": _reduce, "tile.reshape": _reshape, "tile.transpose": _transpose,
    "tile.dot": _dot, "tile.for": _for,
}


def _run_op(p: _Programs, op: Operation, xs: list[Any]) -> list[Any]:
    handler = _OPS.get(op.name)
    if handler is None:
        raise IRError(f"'{op.name}' cannot stand in a kernel")
    return handler(p, op, xs)


# -- launches ---------------------------------------------------------------------------------------------------------

def _kernel_of(ctx: Context, op: Operation) -> Operation:
    kernel = ctx.kernels.get(op["kernel"].name)
    if kernel is None:
        raise IRError(f"there is no kernel {op['kernel']} in the module; kernels: {', '.join('@' + k for k in ctx.kernels) or 'none'}")
    given, taken = (len(op.operands), len(op.results)), (len(kernel.body.args) - kernel["outputs"], kernel["outputs"])
    if given != taken:
        raise IRError(f"@{kernel['sym_name']} takes {taken[0]} inputs and gives {taken[1]} outputs, launched with {given[0]} and {given[1]}")
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
    layouts = [(ctx.shape(v.type), ctx.dims(v.type.layout)) for v in (*op.operands, *op.results) if isinstance(v.type, TensorType)]
    memories = [Memory.holding(x, strides) for x, (_, strides) in zip(xs, layouts)]
    paired = {output: source for source, output in kernel["inplace"]}
    for i, r in enumerate(op.results, len(xs)):
        shape, strides = layouts[i]
        memories.append(Memory.holding(xs[paired[i]].reshape(shape), strides, check=ctx.check) if i in paired else
                        Memory.fresh(extent(shape, strides), ctx.dtype(r.type), check=ctx.check))
    for a, m in zip(kernel.body.args, memories, strict=True):
        assert isinstance(a.type, BufferType)
        if m.flat.dtype != inner.dtype(a.type) or extent(inner.shape(a.type), inner.dims(a.type.layout)) > m.size:
            raise IRError(f"argument {a.index} of @{kernel['sym_name']} is {a.type}, launched with {m.size} elements of {m.flat.dtype}")
    grid = inner.dims(kernel["grid"])
    total = math.prod(grid)
    largest = max((math.prod(v.type.shape) for o in kernel.walk() for v in (*o.operands, *o.results) if isinstance(v.type, TileType)), default=1)
    together = max(1, LANES // max(1, largest))
    try:
        for start in range(0, total, together):
            ids = torch.arange(start, min(start + together, total))
            _Programs(inner, grid, ids, dict(zip(kernel.body.args, memories))).run(kernel.body)
    except (IRError, IndexError) as e:
        raise type(e)(f"in kernel @{kernel['sym_name']}: {e}") from e
    for i, r in enumerate(op.results, len(xs)):
        missing = memories[i].unwritten(*layouts[i]) if i not in paired else None
        if missing is not None:
            raise IRError(f"@{kernel['sym_name']} leaves element {missing} of output {r.index} unwritten")
    return [m.tensor(*layout) for m, layout in zip(memories[len(xs):], layouts[len(xs):])]


HANDLERS: dict[str, Handler] = {"tile.launch": _launch}
