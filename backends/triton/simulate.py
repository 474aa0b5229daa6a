"""Kernels in Triton's interpreter, on CPU tensors: what the generated text means, without a GPU.

    os.environ["TRITON_INTERPRET"] = "1"          # before anything imports triton
    outputs = simulate(module, inputs)            # a module at the tile level, as `ir.interpreter.interpret` takes it
    library = SimulatedLibrary(module)            # a module at the host level; CompiledGraph(manifest, library=library)

Every `tile.launch` runs its kernel's Triton text; everything else is the reference interpreter's. Outputs start poisoned.
libdevice, which Triton's interpreter does not have, is replaced by torch's functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import TensorHandle, interpreter_builder
from triton.tools.tensor_descriptor import TensorDescriptor

from ...ir.core import IRError, Operation
from ...ir.expr import evaluate
from ...ir.interpreter import interpret
from ...ir.interpreter.context import Context
from ...ir.interpreter.memory import Memory, extent
from ...ir.types import TensorType
from .compile import default_cache, load_function
from .printer import KernelSource, print_kernel
from .steps import StepLibrary, buffer_memory

__all__ = ["Libdevice", "SimulatedLibrary", "simulate"]


def simulate(
    module: Operation, inputs: Sequence[Any], *, symbols: Mapping[str, int] | None = None, cache_dir: Path | None = None
) -> list[torch.Tensor]:
    """Runs the module's only function. IndexError where a checked index fails; IRError if the interpreter is not on."""
    if not triton.knobs.runtime.interpret:
        raise IRError("set TRITON_INTERPRET=1 before triton is imported")
    folder = cache_dir or default_cache()
    return interpret(
        module, inputs, symbols=symbols, handlers={"tile.launch": lambda ctx, op, xs: _launch(ctx, op, xs, folder)}
    )


def _launch(ctx: Context, op: Operation, xs: list[torch.Tensor], folder: Path) -> list[torch.Tensor]:
    kernel = ctx.kernels[op["kernel"].name]
    source = print_kernel(kernel)
    types = [v.type for v in (*op.operands, *op.results)]
    layouts = [(ctx.shape(t), ctx.dims(t.layout)) for t in types if isinstance(t, TensorType)]
    memories = [Memory.holding(x, strides) for x, (_, strides) in zip(xs, layouts)]
    paired = {output: given for given, output in kernel["inplace"]}
    for i, r in enumerate(op.results, len(xs)):
        shape, strides = layouts[i]
        memories.append(
            Memory.holding(xs[paired[i]].reshape(shape), strides)
            if i in paired
            else Memory.fresh(extent(shape, strides), ctx.dtype(r.type))
        )
    programs = math.prod(ctx.dims(kernel["grid"]))
    run_kernel(source, programs, [m.flat for m in memories], [ctx.symbols[s] for s in source.symbols], folder)
    return [m.tensor(*layout) for m, layout in zip(memories[len(xs) :], layouts[len(xs) :])]


def run_kernel(
    source: KernelSource, programs: int, buffers: Sequence[torch.Tensor], symbols: Sequence[int], folder: Path
) -> None:
    """One launch on flat CPU tensors. IndexError where a checked index fails."""
    function = load_function(source, folder)
    scope = function.fn.__globals__
    scope["libdevice"] = Libdevice()
    for name in ("tanh", "exp", "exp2", "log", "erf"):  # instructions that the interpreter has not
        scope[f"{name}_approx"] = getattr(Libdevice(), name)
    scope["sigmoid_approx"] = tl.sigmoid
    scope["multiply_words"] = lambda a, b: a * b
    scope["rounded_bf16"] = lambda x: x.to(tl.bfloat16).to(tl.float32)
    maps = [TensorDescriptor(buffers[m.buffer], [m.rows, m.columns], [m.stride, 1], list(m.block)) for m in source.descriptors]
    error = torch.zeros(1, dtype=torch.int32)
    if programs:
        with np.errstate(all="ignore"), _mended():
            function[(programs,)](*buffers, *symbols, *([error] if source.checks else []), *maps)
    if int(error):
        raise IndexError(f"in kernel '{source.name}': an index given by the user is out of range")


@contextmanager
def _mended() -> Iterator[None]:
    """Three faults of Triton's interpreter set right: it forgets that a comparison of scalars is boolean when it is broadcast, and it keeps
    bfloat16 as bit patterns, but multiplies matrices of them and converts integers to them as if they were integers."""
    original, dot = interpreter_builder.create_splat, interpreter_builder.create_dot
    signed, unsigned = interpreter_builder.create_si_to_fp, interpreter_builder.create_ui_to_fp

    def by_float32(convert: Any) -> Any:
        def converted(src: Any, dst_type: Any) -> Any:
            if dst_type.scalar != tl.bfloat16:
                return convert(src, dst_type)
            wide = tl.block_type(tl.float32, dst_type.shape) if dst_type.is_block() else tl.float32
            return interpreter_builder.cast_impl(convert(src, wide), dst_type)

        return converted

    def splat(ret_ty: Any, arg: Any) -> Any:
        if ret_ty.scalar == tl.int1:
            return TensorHandle(np.full(ret_ty.shape, np.asarray(arg.data).reshape(-1)[0], dtype=bool), tl.int1)
        return original(ret_ty, arg)

    def widened_dot(a: Any, b: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32) for x in (a, b))
        return dot(a, b, *rest)

    interpreter_builder.create_splat, interpreter_builder.create_dot = splat, widened_dot
    interpreter_builder.create_si_to_fp, interpreter_builder.create_ui_to_fp = by_float32(signed), by_float32(unsigned)
    try:
        yield
    finally:
        del interpreter_builder.create_splat, interpreter_builder.create_dot
        del interpreter_builder.create_si_to_fp, interpreter_builder.create_ui_to_fp


class SimulatedLibrary(StepLibrary):
    """The functions of a host-level module, each launch in Triton's interpreter on CPU memory."""

    def __init__(self, module: Operation, cache_dir: Path | None = None):
        super().__init__(module)
        self.sources = {name: print_kernel(k, self.program.divisible(name)) for name, k in self.program.kernels.items()}
        self.folder = cache_dir or default_cache()
        self.launches = 0

    def launch(self, kernel: str, addresses: Sequence[int], env: Mapping[str, int]) -> None:
        op, source = self.program.kernels[kernel], self.sources[kernel]
        flat = [buffer_memory(a, v.type, env) for a, v in zip(addresses, op.body.args, strict=True)]
        self.launches += 1
        run_kernel(source, math.prod(evaluate(g, env) for g in op["grid"]), flat, [env[s] for s in source.symbols], self.folder)


_FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "rint": torch.round,
    "sqrt_rn": torch.sqrt,
    "rcp_rn": torch.reciprocal,
    "div_rn": torch.div,
    "rsqrt": torch.rsqrt,
    "fma": lambda a, b, c: (a.double() * b.double() + c.double()).to(a.dtype),
}


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
            return tl.tensor(
                TensorHandle(made, scalar),
                tl.block_type(scalar, list(shape))
                if shape and any(isinstance(a, tl.tensor) and a.type.is_block() for a in args)
                else scalar,
            )

        return call
