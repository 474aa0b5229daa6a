"""One fused group with one or several tiles as a program of its own, and random data to run it on: what tuning measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple

import torch

from ..ir import Block, Builder, Operation, Region, SymbolRef, TensorType, Value
from ..ir.passes import PassContext
from ..passes.tiling.cpu_candidates import CpuTile
from ..passes.tiling.gpu_tiles import GpuTile
from ..passes.tiling.lower import lower

__all__ = ["candidate_module", "group_text", "random_tensor"]


def group_text(fused: Operation) -> str:
    """Equal for groups that do the same to tensors of the same types, whatever their values are called and wherever they come from."""
    numbers: dict[Value, int] = {}
    parts = [str(v.type) for v in (*fused.operands, *fused.results)]
    for op in fused.walk():
        if op is fused:
            attributes: list[tuple[str, object]] = []
        else:
            attributes = sorted((k, str(v)) for k, v in op.attributes.items())
            parts.append(f"{op.name} {[numbers[v] for v in op.operands]} {attributes} {[str(r.type) for r in op.results]}")
        for v in (*op.results, *(a for region in op.regions for block in region.blocks for a in block.args)):
            numbers[v] = len(numbers)
            parts.append(str(v.type))
    return "\n".join(parts)


def candidate_module(fused: Operation, tiles: Sequence[GpuTile | CpuTile], ctx: PassContext) -> Operation:
    """A tile-level module of one function that runs the group once with each tile, and returns all results."""
    held = fused.attributes.get("tile")
    kernels = []
    for i, tile in enumerate(tiles):
        fused.attributes["tile"] = astuple(tile)
        kernel = lower(fused, {}, ctx)
        kernel.attributes["sym_name"] = f"{fused['kernel'] or 'kernel'}_{i}"
        kernels.append(kernel)
    if held is None:
        del fused.attributes["tile"]
    else:
        fused.attributes["tile"] = held
    block = Block([v.type for v in fused.operands], [f"in{i}" for i in range(len(fused.operands))])
    b = Builder.at_end(block)
    outputs = [r for kernel in kernels for r in b.create(
        "tile.launch", block.args, {"kernel": SymbolRef(kernel["sym_name"])}, [r.type for r in fused.results]).results]
    b.create("return", outputs)
    attrs = {"sym_name": "main", "arg_attrs": tuple({"name": a.name, "kind": "input", "position": i} for i, a in enumerate(block.args)),
             "result_attrs": tuple({"kind": "tensor", "strides": r.type.layout} for r in outputs)}  # type: ignore[attr-defined]
    func = Operation.create("func", (), attrs, (), [Region([block])])
    body = Block([])
    for op in (*kernels, func):
        body.append(op)
    return Operation.create("module", (), {"level": "tile"}, (), [Region([body])])


def random_tensor(t: TensorType, device: str) -> torch.Tensor:
    """Of constant sizes: floats are normal, integers zero, for they may be indices."""
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64, "i8": torch.int8, "u8": torch.uint8,
             "i16": torch.int16, "i32": torch.int32, "i64": torch.int64, "i1": torch.bool, "f8e4m3fn": torch.float8_e4m3fn,
             "f8e5m2": torch.float8_e5m2}[t.dtype.name]
    made = torch.empty_strided(tuple(int(n) for n in t.shape), tuple(int(n) for n in t.layout), dtype=dtype, device=device)  # type: ignore[arg-type]
    if dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return made.normal_()
    return made.zero_()
