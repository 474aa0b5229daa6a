"""`mode="max-autotune"` on a GPU: the tiles of kernels are measured instead of modelled.

    tune_tiles(module, ctx, Tuner(options, cache_dir))       # a tensor-level module, after fusion

For each fused group of contractions, pointwise ops or reductions, the few tiles that the model finds best are compiled (all of a group side by
side) and timed on random data; the fastest is written to the group's attribute `tile`, which the pass `tile` obeys. Equal groups are measured once,
and winners are kept on disk, by the text of the group and the device: the next process measures nothing, and gets the same kernels.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..ir import Block, Builder, IRError, Operation, Region, SymbolRef, TensorType
from ..ir.passes import PassContext, parse_pipeline, run_pipeline
from ..ir.printer import print_op
from ..passes.tiling.gpu_tiles import GpuTile
from ..passes.tiling.lower import candidate_tiles, lower
from ..runtime.cuda_graph import CudaGraph
from .gpu import compile_cuda, triton_version
from .options import Options
from .pipelines import pipeline

__all__ = ["Tuner", "candidate_module", "measure", "tune_tiles"]

MOST = 6
"""Candidates of a group."""
Measure = Callable[[Operation, Sequence[GpuTile], PassContext, Options], list[float]]
"""Milliseconds of a fused group with each tile; infinity where it does not compile."""


def tune_tiles(module: Operation, ctx: PassContext, tuner: Tuner) -> None:
    """Gives every fused group of constant sizes the tile that is fastest."""
    for func in [f for f in module.body if f.name == "func"]:
        for op in func.body:
            if op.name == "tensor.fused":
                tuner.tune(op, ctx)


@dataclass
class Tuner:
    """Winners so far, by key; `directory` keeps them (None: nowhere). `measure` is replaced in tests."""

    options: Options
    directory: Path | None = None
    measure: Measure | None = None
    winners: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def tune(self, fused: Operation, ctx: PassContext) -> None:
        tiles = list(dict.fromkeys(candidate_tiles(fused, ctx.target)))[:MOST] if _is_static(fused) else []
        if len(tiles) < 2:
            return
        key = self._key(fused, ctx)
        tile = self.winners.get(key) or self._read(key)
        if tile is None:
            times = (self.measure or measure)(fused, tiles, ctx, self.options)
            best = min(range(len(tiles)), key=lambda i: (times[i], i))
            tile = astuple(tiles[best])
            shown = ", ".join(f"{t.rows}x{t.columns}x{t.step}: {ms * 1000:.1f}" for t, ms in zip(tiles, times, strict=True))
            ctx.remark("done", f"'{fused['kernel']}' measured with tiles of ({shown}) us", fused.location)
            self._write(key, tile)
        self.winners[key] = tile
        fused.attributes["tile"] = tile

    def _key(self, fused: Operation, ctx: PassContext) -> str:
        text = [print_op(op) for op in fused.body]
        types = [str(v.type) for v in (*fused.operands, *fused.results)]
        parts = [*text, *types, ctx.target.digest, triton_version(), str(MOST)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _read(self, key: str) -> tuple[int, ...] | None:
        try:
            found = json.loads((self.directory / "tiles" / f"{key}.json").read_text()) if self.directory is not None else None
        except (OSError, ValueError):
            return None
        fits = isinstance(found, list) and len(found) == 5 and all(isinstance(n, int) and n > 0 for n in found)
        return tuple(found) if fits else None  # type: ignore[arg-type]

    def _write(self, key: str, tile: tuple[int, ...]) -> None:
        if self.directory is None:
            return
        folder = self.directory / "tiles"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            temporary = folder / f"{key}.{id(self)}.tmp"
            temporary.write_text(json.dumps(tile))
            temporary.replace(folder / f"{key}.json")
        except OSError:
            return  # measured again by the next process


def _is_static(fused: Operation) -> bool:
    types = [v.type for v in (*fused.operands, *fused.results)]
    return all(isinstance(t, TensorType) and all(isinstance(n, int) for n in (*t.shape, *t.layout)) for t in types)


def candidate_module(fused: Operation, tiles: Sequence[GpuTile], ctx: PassContext) -> Operation:
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


def measure(fused: Operation, tiles: Sequence[GpuTile], ctx: PassContext, options: Options,
            turn: AbstractContextManager[Any] | None = None) -> list[float]:
    """Median milliseconds with each tile on the current CUDA device. `turn` is held while the device is timed, and not while tiles compile."""
    with contextlib.suppress(IRError, RuntimeError):  # the one at fault shows below
        # All at once: the compiler works on them side by side, and finds them in its own cache afterwards.
        _compiled(candidate_module(fused, tiles, ctx), ctx, options)
    graphs: list[CudaGraph | None] = []
    for tile in tiles:
        try:
            graphs.append(_compiled(candidate_module(fused, [tile], ctx), ctx, options))
        except (IRError, RuntimeError):
            graphs.append(None)
    with turn or contextlib.nullcontext():
        inputs = [_random(v.type) for v in fused.operands]  # type: ignore[arg-type]
        times = [float("inf") if graph is None else _try(graph, inputs) for graph in graphs]
    if min(times) == float("inf"):
        raise IRError(f"no tile of '{fused['kernel']}' compiles and runs")
    return times


def _try(graph: CudaGraph, inputs: Sequence[torch.Tensor]) -> float:
    try:
        return _milliseconds(lambda: graph(*inputs))
    except RuntimeError:
        return float("inf")


def _compiled(module: Operation, ctx: PassContext, options: Options) -> CudaGraph:
    run_pipeline(module, parse_pipeline(pipeline("host", ctx.target, options)), PassContext(ctx.target))
    artifact = compile_cuda(module, ctx.target)
    return CudaGraph(artifact.manifest, artifact.blobs, torch.device("cuda", torch.cuda.current_device()))


def _random(t: TensorType) -> torch.Tensor:
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64, "i8": torch.int8, "u8": torch.uint8,
             "i16": torch.int16, "i32": torch.int32, "i64": torch.int64, "i1": torch.bool, "f8e4m3fn": torch.float8_e4m3fn,
             "f8e5m2": torch.float8_e5m2}[t.dtype.name]
    made = torch.empty_strided(tuple(int(n) for n in t.shape), tuple(int(n) for n in t.layout), dtype=dtype, device="cuda")  # type: ignore[arg-type]
    if dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return made.normal_()
    return made.zero_()  # integers may be indices


def _milliseconds(call: Callable[[], Any]) -> float:
    """Of the device alone: the call is replayed from a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    times = []
    for _ in range(7):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(5):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 5)
    return statistics.median(times)
