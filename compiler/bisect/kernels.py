"""Compiled kernels one at a time: `tile.launch` by a backend, everything else by the reference interpreter.

    outputs = run_module(module, arguments, handlers={"tile.launch": NativeLaunch(target)})

Each kernel gets the inputs that the kernels before it made. Outputs start as NaN.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ...backends.llvm import compile_module
from ...ir import Builder, SymbolRef, Target, make_func, make_module
from ...ir.core import Operation
from ...ir.interpreter.context import Context
from ...ir.interpreter.memory import Memory, extent
from ...ir.types import BufferType, TensorType
from ...runtime.loader import load_object

__all__ = ["Launcher", "NativeLaunch", "native_launch"]


class Launcher:
    """Semantics of `tile.launch` by running the kernel on memory; `call` is the backend's."""

    def call(self, kernel: Operation, types: Sequence[Any], flat: Sequence[torch.Tensor], symbols: Mapping[str, int]) -> None:
        """Runs a kernel once on flat memory. IndexError where an index in the data is out of range."""
        raise NotImplementedError

    def __call__(self, ctx: Context, op: Operation, xs: list[torch.Tensor]) -> Sequence[torch.Tensor]:
        kernel = ctx.kernels[op["kernel"].name]
        types = [v.type for v in (*op.operands, *op.results)]
        layouts = [(ctx.shape(t), ctx.dims(t.layout)) for t in types if isinstance(t, TensorType)]
        paired: dict[int, int] = {}  # each input lends its memory once
        for given, output in kernel["inplace"]:
            if output not in paired and given not in paired.values():
                paired[output] = given
        memories = [Memory.holding(x, strides) for x, (_, strides) in zip(xs, layouts)]
        for i, r in enumerate(op.results, len(xs)):
            size = extent(*layouts[i])
            shared = i in paired and memories[paired[i]].size == size and xs[paired[i]].dtype == ctx.dtype(r.type)
            memories.append(memories[paired[i]] if shared else Memory.fresh(size, ctx.dtype(r.type)))
        self.call(kernel, types, [m.flat for m in memories], ctx.symbols)
        return [m.tensor(*layout) for m, layout in zip(memories[len(xs):], layouts[len(xs):])]


class NativeLaunch(Launcher):
    """By LLVM code for one target. Kernels are compiled when they are first launched."""

    def __init__(self, target: Target):
        self.target = target
        self.compiled: dict[Operation, Any] = {}

    def call(self, kernel: Operation, types: Sequence[Any], flat: Sequence[torch.Tensor], symbols: Mapping[str, int]) -> None:
        if kernel not in self.compiled:
            self.compiled[kernel] = _compiled(kernel, types, self.target)
        values = [symbols[s] for s in kernel["symbols"]]
        table = (ctypes.c_void_p * max(1, len(flat)))(*[x.data_ptr() for x in flat])
        sizes = (ctypes.c_int64 * max(1, len(values)))(*values)
        if self.compiled[kernel](ctypes.addressof(table), ctypes.addressof(sizes)):
            raise IndexError(f"in kernel @{kernel['sym_name']}: an index given by the user is out of range")


def native_launch(kernel: Operation, types: Sequence[TensorType]) -> Operation:
    """A host-level module whose function `main` launches a copy of the kernel on buffers of these types."""
    module, top = make_module("host")
    top.append(kernel.clone())
    bounds = {s: kernel["bounds"].get(s, (0, None)) for s in kernel["symbols"]}
    _, body = make_func(top, "main", [BufferType(t.shape, t.dtype, t.strides) for t in types], symbols=bounds)
    b = Builder.at_end(body)
    b.create("host.launch", list(body.args), {"kernel": SymbolRef(kernel["sym_name"]), "outputs": kernel["outputs"]})
    b.create("return")
    return module


def _compiled(kernel: Operation, types: Sequence[Any], target: Target) -> Callable[[int, int], int]:
    compiled = compile_module(native_launch(kernel, types), target)
    library = load_object(compiled.object_code, compiled.symbols)
    function = library.function("main_0")
    return lambda table, sizes, _library=library: function(table, sizes)  # type: ignore[misc]
