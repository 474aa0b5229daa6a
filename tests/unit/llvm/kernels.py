"""Helpers to build tile kernels by hand and to run them on torch tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from aicc.backends.llvm import CompiledObject, compile_module, host_target
from aicc.ir import Block, BufferType, Builder, Operation, Region, SymbolRef, TileType, Value, make_func, make_module
from aicc.ir.core import Block as IRBlock
from aicc.ir.target import Target
from aicc.ir.types import DTYPES, ScalarType, index
from aicc.runtime.loader import load_object

TORCH = {"f32": torch.float32, "f64": torch.float64, "bf16": torch.bfloat16, "f16": torch.float16, "i64": torch.int64,
         "i32": torch.int32,
         "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8, "i1": torch.bool}
NAMES = {v: k for k, v in TORCH.items()}


def buffer(shape: Sequence[Any], dtype: str = "f32", strides: Sequence[Any] | None = None) -> BufferType:
    return BufferType(tuple(shape), DTYPES[dtype], None if strides is None else tuple(strides))


def tile(shape: Sequence[int], dtype: str = "f32") -> Any:
    return TileType(tuple(shape), DTYPES[dtype]) if shape else ScalarType(DTYPES[dtype])


class K(Builder):
    """A builder with short forms of the tile ops."""

    def pid(self, axis: int = 0) -> Value:
        return self.op("tile.program_id", type=index, axis=axis)

    def load(self, buf: Value, offset: Any, *indices: Value, shape: Sequence[int] = (), **attrs: Any) -> Value:
        t = tile(shape, buf.type.dtype.name)  # type: ignore[attr-defined]
        return self.op("tile.load", buf, *indices, type=t, offset=offset, shape=tuple(shape), **attrs)

    def store(self, buf: Value, value: Value, offset: Any, *indices: Value, **attrs: Any) -> None:
        self.create("tile.store", [buf, value, *indices], {"offset": offset, **attrs})

    def full(self, value: Any, shape: Sequence[int], dtype: str = "f32") -> Value:
        v = value if isinstance(value, Value) else self.constant(value, DTYPES[dtype])
        return self.op("tile.full", v, type=TileType(tuple(shape), v.type.dtype))  # type: ignore[attr-defined]

    def reduce(self, x: Value, axis: int, kind: str) -> Value:
        shape = tuple(1 if d == axis else n for d, n in enumerate(x.type.shape))  # type: ignore[attr-defined]
        return self.op("tile.reduce", x, type=TileType(shape, x.type.dtype), axis=axis, kind=kind)  # type: ignore[attr-defined]

    def loop(self, lower: Any, upper: Any, step: int, inits: Sequence[Value], body: Callable[..., Sequence[Value]],
             *indices: Value,
             unroll: int = 1) -> list[Value]:
        block = Block([index, *(v.type for v in inits)])
        inner = K(block)
        inner.create("tile.yield", list(body(inner, *block.args)))
        made = self.create("tile.for", [*indices, *inits],
                           {"lower": lower, "upper": upper, "step": step, "indices": len(indices),
                                                            "unroll": unroll}, [v.type for v in inits], [Region([block])])
        return list(made.results)


def kernel(buffers: Sequence[BufferType], grid: Sequence[Any], build: Callable[..., None], *, symbols: Sequence[str] = (),
           name: str = "k",
           **attrs: Any) -> Operation:
    """A kernel whose body `build(k, *buffers)` writes."""
    block = IRBlock(list(buffers))
    k = K(block)
    build(k, *block.args)
    k.create("tile.yield")
    return Operation.create("tile.kernel", (), {"sym_name": name, "grid": tuple(grid), "symbols": tuple(symbols), **attrs}, (),
                            [Region([block])])


def module_of(kernel_op: Operation, sizes: Mapping[str, Any] | None = None) -> Operation:
    """A module whose function `main` launches the kernel on its arguments."""
    module, top = make_module("host")
    top.append(kernel_op)
    types = [a.type for a in kernel_op.body.args]
    _, body = make_func(top, "main", types, symbols=dict.fromkeys(sizes or {}, (0, None)))
    b = Builder.at_end(body)
    b.create("host.launch", list(body.args), {"kernel": SymbolRef(kernel_op["sym_name"]), "outputs": kernel_op["outputs"]})
    b.create("return")
    return module


def call(compiled: CompiledObject, name: str, pointers: Sequence[int], symbols: Sequence[int] = ()) -> int:
    library = load_object(compiled.object_code, compiled.symbols)
    table = (ctypes.c_void_p * max(1, len(pointers)))(*pointers)
    values = (ctypes.c_int64 * max(1, len(symbols)))(*symbols)
    return library.function(name)(ctypes.addressof(table), ctypes.addressof(values))


def run(kernel_op: Operation, tensors: Sequence[torch.Tensor], sizes: Mapping[str, int] | None = None,
        target: Target | None = None) -> int:
    """Runs a kernel once on the memory of `tensors`; gives the error word."""
    compiled = compile_module(module_of(kernel_op, sizes), target or host_target())
    return call(compiled, "main_0", [t.data_ptr() for t in tensors], list((sizes or {}).values()))
