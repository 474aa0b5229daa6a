"""A host-level program on real memory, its kernels by the reference interpreter.

    outputs = run_host(module, arguments)            # after plan-memory; after bufferize too, with a plan that shares nothing
    outputs = run_native(module, arguments, target)  # the same program, compiled

Both go through the manifest and the executor, as a compiled graph does: buffers have addresses, and one that overlaps another spoils it. Memory is
filled with NaN before anything is written, and so is an output that overlaps an input of its launch without the kernel's leave (`inplace`):
the programs of a launch run in any order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ...backends.llvm import compile_module
from ...backends.triton.steps import StepLibrary, buffer_memory
from ...ir import Target
from ...ir.core import IRError, Operation, Value
from ...ir.expr import Dim, ceildiv
from ...ir.interpreter import HANDLERS
from ...ir.interpreter.context import Context
from ...ir.interpreter.memory import Memory
from ...ir.interpreter.tile import LANES, Programs
from ...ir.types import TileType
from ...runtime.arena import ArenaPool
from ...runtime.executor import CompiledGraph
from ..manifest import build_manifest
from .capture import copied
from .evaluate import SEED

__all__ = ["InterpretedLibrary", "poisoned_run", "run_host", "run_native", "without_sharing"]

_ALIGNMENT = 64


class _Poisoned(ArenaPool):
    """Arenas full of NaN (and of -1)."""

    def acquire(self, size: int) -> torch.Tensor:
        return torch.full((max(1, size),), 0xFF, dtype=torch.uint8)

    def release(self, arena: torch.Tensor) -> None:
        pass


def _poisoned_output(shape: Any, strides: Any, dtype: torch.dtype) -> torch.Tensor:
    made = torch.empty_strided(shape, strides, dtype=dtype)
    return made.fill_(float("nan")) if made.is_floating_point() else made.fill_(True) if dtype == torch.bool else made.fill_(77)


def poisoned_run(make: Callable[[ArenaPool], CompiledGraph], arguments: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """(what the graph that `make` gives returns, its arguments afterwards); arenas and outputs start as NaN."""
    graph = make(_Poisoned())
    graph._empty = _poisoned_output
    graph._run = graph._run_steps  # the path that makes outputs by `_empty`
    given = [copied(a) for a in arguments]
    torch.manual_seed(SEED)
    return graph(*given), given


def run_host(module: Operation, arguments: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """(what the program returns, its arguments afterwards); every buffer has memory of its own where the plan is still to be made."""
    if any(op.name == "host.alloc" for func in module.body if func.name == "func" for op in func.body):
        module = without_sharing(module)
    manifest = build_manifest(module)
    return poisoned_run(lambda arenas: CompiledGraph(manifest, library=InterpretedLibrary(module), arenas=arenas), arguments)


def run_native(module: Operation, arguments: Sequence[Any], target: Target) -> tuple[list[Any], list[Any]]:
    """The same, compiled for the host CPU."""
    compiled = compile_module(module, target)
    manifest = build_manifest(module, errors=compiled.errors)
    return poisoned_run(lambda arenas: CompiledGraph(manifest, compiled.object_code, arenas=arenas), arguments)


def without_sharing(module: Operation) -> Operation:
    """A copy whose `host.alloc`s are slots one after the other, in loops' bodies too."""
    made = module.clone()
    for func in [op for op in made.body if op.name == "func"]:
        top: Dim = 0
        for op in list(func.body):
            if op.name != "host.alloc":
                continue
            slot = Operation.create("host.slot", (), {"offset": top, "bytes": op["bytes"]}, [op.result.type], location=op.location)
            func.body.insert_before(op, slot)
            op.result.replace_all_uses_with(slot.result)
            op.erase()
            top = top + ceildiv(slot["bytes"], _ALIGNMENT) * _ALIGNMENT
        func.attributes["stats"] = {**func["stats"], "arena_bytes": top}
    return made


class InterpretedLibrary(StepLibrary):
    """The functions of a host-level module, each launch interpreted on the memory itself."""

    def launch(self, kernel: str, addresses: Sequence[int], env: Mapping[str, int]) -> None:
        launch(self.program.kernels[kernel], addresses, env)


def launch(kernel: Operation, addresses: Sequence[int], env: Mapping[str, int]) -> None:
    """Runs one kernel on memory. IndexError where an index in the data is out of range, IRError where the kernel leaves its buffers."""
    args = kernel.body.args
    flat = [buffer_memory(a, v.type, env) for a, v in zip(addresses, args, strict=True)]
    _spoil_overlaps(kernel, addresses, flat)
    ctx = Context(HANDLERS, symbols=dict(env))
    grid = ctx.dims(kernel["grid"])
    tiles = {v.type for o in kernel.walk() for v in (*o.operands, *o.results) if isinstance(v.type, TileType)}
    largest = max([1, *(math.prod(ctx.dims(t.shape)) for t in tiles)])
    written = frozenset(o.operands[0] for o in kernel.walk() if o.name == "tile.store")
    together = max(1, LANES // largest)
    total = math.prod(grid)
    for start in range(0, total, together):
        ids = torch.arange(start, min(start + together, total))
        values: dict[Value, Any] = {a: Memory(x, x.numel()) for a, x in zip(args, flat, strict=True)}
        Programs(ctx, grid, ids, torch.arange(len(ids)), values, written, largest).run(kernel.body)
        for a, x in zip(args, flat, strict=True):
            if values[a].flat is not x:  # atomic stores make a new tensor
                x.copy_(values[a].flat)


def _spoil_overlaps(kernel: Operation, addresses: Sequence[int], flat: Sequence[torch.Tensor]) -> None:
    """Fills outputs that overlap an input which the kernel does not let them share memory with."""
    first = len(flat) - kernel["outputs"]
    allowed = {tuple(pair) for pair in kernel["inplace"]}
    for out in range(first, len(flat)):
        low, high = addresses[out], addresses[out] + flat[out].nbytes
        for given in range(first):
            start, end = addresses[given], addresses[given] + flat[given].nbytes
            if low < end and start < high and ((given, out) not in allowed or (start, end) != (low, high)):
                flat[out].view(torch.uint8).fill_(0xFF if flat[out].dtype != torch.bool else 1)
    if any(x.numel() and a == 0 for a, x in zip(addresses, flat)):
        raise IRError(f"@{kernel['sym_name']} is launched on a buffer without memory")
