"""Host programs step by step on CPU memory, their kernels by whatever a subclass says: no device, and no machine code of the host's.

    class Library(StepLibrary):
        def launch(self, kernel, addresses, env): ...
    CompiledGraph(manifest, library=Library(module))       # a module at the host level

Buffers are where the plan puts them: one that overlaps another spoils it. The body of a loop finds its arguments where native code would give
them: carried values in the loop's scratch memory by turns, slices in their tensors; what it returns starts poisoned.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ...ir.core import Operation
from ...ir.expr import evaluate
from ...ir.expr_json import json_to_expr
from ...ir.interpreter.context import TORCH_DTYPES
from ...ir.interpreter.memory import extent
from ...ir.types import BufferType
from .host import Copy, Launch, Loop, MatMul, Place, Program, Step, build_program

__all__ = ["LOOP_ALIGNMENT", "StepLibrary", "buffer_memory", "run_product"]

LOOP_ALIGNMENT = 64
"""Of the places in a loop's scratch memory, in bytes; as `plan-memory` counts them."""


class StepLibrary:
    """The functions of a host-level module with the executor's calling convention."""

    def __init__(self, module: Operation):
        self.program: Program = build_program(module, loops=True)
        self.constants = [ctypes.create_string_buffer(c, max(1, len(c))) for c in self.program.constants]
        self.symbols: list[str] = []

    def bind(self, symbols: Sequence[str]) -> None:
        self.symbols = list(symbols)

    def launch(self, kernel: str, addresses: Sequence[int], env: Mapping[str, int]) -> None:
        """Runs a kernel on buffers at these addresses. IndexError where an index in the data is out of range."""
        raise NotImplementedError

    def function(self, name: str) -> Callable[[int, int], int]:
        """Runs function `name`: 0, or 1 where an index is out of range."""
        steps = self.program.functions[name]

        def run(table: int, symbols: int) -> int:
            env = dict(zip(self.symbols, (ctypes.c_int64 * len(self.symbols)).from_address(symbols)[:])) if self.symbols else {}
            try:
                self._run(steps, lambda slot: int(ctypes.c_uint64.from_address(table + 8 * slot).value), env)
            except IndexError:
                return 1
            return 0

        return run

    def _run(self, steps: Sequence[Step | Loop], table: Callable[[int], int], env: Mapping[str, int]) -> None:
        def address(p: Place) -> int:
            base = ctypes.addressof(self.constants[p.slot]) if p.constant else table(p.slot)
            return base + int(evaluate(p.offset, env))

        for step in steps:
            if isinstance(step, Copy):
                ctypes.memmove(address(step.target), address(step.source), int(evaluate(step.bytes, env)))
            elif isinstance(step, Launch):
                self.launch(step.kernel, [address(p) for p in step.buffers], env)
            elif isinstance(step, Loop):
                self._loop(step, [address(p) for p in step.buffers], env)
            elif isinstance(step, MatMul):  # waits mean nothing: everything runs in order
                run_product(step.shape, {name: address(p) for name, p in step.places.items()}, env)

    def _loop(self, step: Loop, at: Sequence[int], env: Mapping[str, int]) -> None:
        n, m, first = step.carried, step.sliced, len(at) - step.outputs
        trips = int(evaluate(step.trips, env))
        sizes = [int(evaluate(t.numel * t.dtype.bytes, env)) for t in step.types]
        rows = [size // max(1, trips) for size in sizes]
        widths = [sizes[first + k] if k < n else rows[first + k] for k in range(len(step.results))]  # of what a trip returns
        need = 2 * sum(_aligned(w) for w in widths[:n])
        body = self.program.functions.get(step.body, [])
        if step.outputs > len(step.results):
            base = at[-1]
        else:  # memory is not planned yet
            own = ctypes.create_string_buffer(need + int(evaluate(step.arena, env)) + LOOP_ALIGNMENT)
            base = _aligned(ctypes.addressof(own))
        pairs, arena = [], base
        for w in widths[:n]:
            pairs.append((arena, arena + _aligned(w)))
            arena += 2 * _aligned(w)
        now = list(at[:n])
        for t in range(trips):
            back = trips - 1 - t
            given = [*now, *(at[n + j] + rows[n + j] * (back if j in step.reversed_operands else t) for j in range(m)), *at[n + m:first]]
            written = [w for (kind, _), w in zip(step.results, widths, strict=True) if kind == "buffer"]
            made = [ctypes.create_string_buffer(b"\xff" * w, max(1, w)) for w in written]
            table = [*given, *map(ctypes.addressof, made), arena]
            self._run(body, table.__getitem__, env)
            values = [ctypes.string_at(table[_argument(step.results, k)], w) for k, w in enumerate(widths)]
            for k, (value, pair) in enumerate(zip(values, pairs)):
                now[k] = pair[t % 2]
                ctypes.memmove(now[k], value, len(value))
            for j, value in enumerate(values[n:]):
                ctypes.memmove(at[first + n + j] + rows[first + n + j] * (back if j in step.reversed_results else t), value, len(value))
        for k in range(n):
            ctypes.memmove(at[first + k], now[k], widths[k])


def _aligned(n: int) -> int:
    return -(-n // LOOP_ALIGNMENT) * LOOP_ALIGNMENT


def _argument(results: Sequence[tuple[str, int]], k: int) -> int:
    """The body's argument that result k is, or is written to."""
    kind, where = results[k]
    return _argument(results, where) if kind == "same" else where


def buffer_memory(address: int, t: Any, env: Mapping[str, int]) -> torch.Tensor:
    """The memory of a buffer as a flat tensor."""
    assert isinstance(t, BufferType)
    dtype = TORCH_DTYPES[t.dtype.name]
    n = extent([int(evaluate(d, env)) for d in t.shape], [int(evaluate(d, env)) for d in t.layout])
    if n == 0:
        return torch.empty(0, dtype=dtype)
    return torch.frombuffer((ctypes.c_uint8 * (n * dtype.itemsize)).from_address(address), dtype=dtype)


def run_product(shape: Mapping[str, Any], addresses: Mapping[str, int], env: Mapping[str, int]) -> None:
    """A matrix product as cuBLASLt computes it (see `runtime/cublaslt.py`), on CPU memory."""

    def numbers(key: str) -> list[int]:
        return [int(evaluate(json_to_expr(e), env)) for e in shape[key]]

    batch, m, n, k = numbers("sizes")
    layouts: dict[str, tuple[tuple[int, ...], list[int]]] = {
        "a": ((batch, m, k), numbers("a")),
        "b": ((batch, k, n), numbers("b")),
        "d": ((batch, m, n), [*numbers("d"), 1]),
    }
    if shape["c"]:
        layouts["c"] = ((batch, m, n), [*numbers("c"), 1])
    if shape["bias"]:
        layouts["bias"] = ((n,), [1])
    if 0 in (batch, m, n):
        return
    x = {}
    for name, (sizes, strides) in layouts.items():
        dtype = TORCH_DTYPES[shape["types"][name]]
        size = extent(sizes, strides) * dtype.itemsize
        x[name] = torch.frombuffer((ctypes.c_uint8 * size).from_address(addresses[name]), dtype=dtype).as_strided(sizes, strides)
    total = x["a"].double() @ x["b"].double()
    total = total + sum(x[name].double() for name in ("bias", "c") if name in x)
    x["d"].copy_(total.relu() if shape["act"] == "relu" else total)
