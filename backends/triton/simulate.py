"""Kernels in Triton's interpreter, on CPU tensors: what the generated text means, without a GPU.

    os.environ["TRITON_INTERPRET"] = "1"          # before anything imports triton
    outputs = simulate(module, inputs)            # a module at the tile level, as `ir.interpreter.interpret` takes it

Every `tile.launch` runs its kernel's Triton text; everything else is the reference interpreter's. Outputs start poisoned.
libdevice, which Triton's interpreter does not have, is replaced by torch's functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

from ...ir.core import IRError, Operation
from ...ir.interpreter import interpret
from ...ir.interpreter.context import Context
from ...ir.interpreter.memory import Memory, extent
from ...ir.types import TensorType
from .compile import default_cache, load_function
from .printer import print_kernel

__all__ = ["Libdevice", "simulate"]


def simulate(module: Operation, inputs: Sequence[Any], *, symbols: Mapping[str, int] | None = None, cache_dir: Path | None = None) -> list[torch.Tensor]:
    """Runs the module's only function. IndexError where a checked index fails; IRError if the interpreter is not on."""
    if not triton.knobs.runtime.interpret:
        raise IRError("set TRITON_INTERPRET=1 before triton is imported")
    folder = cache_dir or default_cache()
    return interpret(module, inputs, symbols=symbols, handlers={"tile.launch": lambda ctx, op, xs: _launch(ctx, op, xs, folder)})


def _launch(ctx: Context, op: Operation, xs: list[torch.Tensor], folder: Path) -> list[torch.Tensor]:
    kernel = ctx.kernels[op["kernel"].name]
    source = print_kernel(kernel)
    function = load_function(source, folder)
    function.fn.__globals__["libdevice"] = Libdevice()
    types = [v.type for v in (*op.operands, *op.results)]
    layouts = [(ctx.shape(t), ctx.dims(t.layout)) for t in types if isinstance(t, TensorType)]
    memories = [Memory.holding(x, strides) for x, (_, strides) in zip(xs, layouts)]
    paired = {output: given for given, output in kernel["inplace"]}
    for i, r in enumerate(op.results, len(xs)):
        shape, strides = layouts[i]
        memories.append(Memory.holding(xs[paired[i]].reshape(shape), strides) if i in paired else Memory.fresh(extent(shape, strides), ctx.dtype(r.type)))
    programs = math.prod(ctx.dims(kernel["grid"]))
    error = torch.zeros(1, dtype=torch.int32)
    if programs:
        with np.errstate(all="ignore"):
            function[(programs,)](*[m.flat for m in memories], *[ctx.symbols[s] for s in source.symbols], *([error] if source.checks else []))
    if int(error):
        raise IndexError(f"in kernel @{kernel['sym_name']}: an index given by the user is out of range")
    return [m.tensor(*layout) for m, layout in zip(memories[len(xs):], layouts[len(xs):])]


_FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "rint": torch.round, "sqrt_rn": torch.sqrt, "rcp_rn": torch.reciprocal, "div_rn": torch.div, "rsqrt": torch.rsqrt, "fma": lambda a, b, c: (
        a.double() * b.double() + c.double()).to(a.dtype)}


class Libdevice:
    """libdevice's functions on interpreted tensors, each by torch's function of the same name unless listed above."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = _FUNCTIONS.get(name) or getattr(torch, name)

        def call(*args: Any) -> Any:
            first = next(a for a in args if isinstance(a, tl.tensor))
            dtype = first.handle.data.dtype
            arrays = [np.asarray(a.handle.data if isinstance(a, tl.tensor) else a, dtype) for a in args]
            shape = np.broadcast_shapes(*(a.shape for a in arrays))
            made = function(*[torch.from_numpy(np.array(np.broadcast_to(a, shape))) for a in arrays]).numpy()
            scalar = first.type.scalar
            return tl.tensor(TensorHandle(made, scalar), tl.block_type(scalar, list(shape)) if shape and any(
                isinstance(a, tl.tensor) and a.type.is_block() for a in args) else scalar)

        return call
