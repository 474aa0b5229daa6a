"""`mode="max-autotune"`: the tiles of kernels are measured instead of modelled.

    tune_tiles(module, ctx, Tuner(options, cache_dir))       # a tensor-level module, after fusion

For each fused group, the few tiles that the model finds best are compiled (on a GPU all of a group side by side) and timed on random data;
the fastest is written to the group's attribute `tile`, which the pass `tile` obeys. Equal groups are measured once, and winners are kept on disk, by
the text of the group and the device (a CPU: with its number of threads): the next process measures nothing, and gets the same kernels.
`autotune_cpu.py` measures on CPUs; there another tile has to be MARGIN faster than the model's, so that noise changes no kernel.
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

from ..ir import IRError, Operation, TensorType
from ..ir.passes import PassContext, parse_pipeline, run_pipeline
from ..passes.structured import constant_values
from ..passes.tiling.cpu_candidates import CpuTile
from ..passes.tiling.gpu_tiles import GpuTile
from ..passes.tiling.lower import candidate_tiles, candidate_tiles_cpu
from ..runtime.cuda_graph import CudaGraph
from .autotune_cpu import measure_on_cpu
from .candidates import candidate_module, group_text, random_tensor
from .gpu import compile_cuda, triton_version
from .options import Options
from .pipelines import pipeline

__all__ = ["Tuner", "candidate_module", "measure", "tune_tiles"]

MOST = 6
"""Candidates of a group."""
MARGIN = 0.03
SMALL = 1 << 16
"""Bytes of a group below which nothing is measured: the time is that of the launch."""
Tile = GpuTile | CpuTile
Measure = Callable[[Operation, Sequence[Any], PassContext, Options], list[float]]
"""Milliseconds of a fused group with each tile; infinity where it does not compile."""


def tune_tiles(module: Operation, ctx: PassContext, tuner: Tuner) -> None:
    """Gives every fused group of constant sizes with a choice of tiles the one that is fastest."""
    for func in [f for f in module.body if f.name == "func"]:
        constant = constant_values(func)
        for op in func.body:
            if op.name == "tensor.fused" and not all(v in constant for v in op.operands):  # else it runs once
                tuner.tune(op, ctx)


@dataclass
class Tuner:
    """Winners so far, by key; `directory` keeps them (None: nowhere). `measure` is replaced in tests."""

    options: Options
    directory: Path | None = None
    measure: Measure | None = None
    winners: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def tune(self, fused: Operation, ctx: PassContext) -> None:
        on_gpu = ctx.target.is_gpu
        if not _is_static(fused) or _bytes(fused) < SMALL:
            return
        known: Sequence[Tile] = candidate_tiles(fused, ctx.target) if on_gpu else candidate_tiles_cpu(fused, ctx.target)
        tiles: list[Any] = list(dict.fromkeys(known))[:MOST]
        if len(tiles) < 2:
            return
        key = self._key(fused, ctx)
        tile = self.winners.get(key) or self._read(key, tiles)
        if tile is None:
            times = (self.measure or (measure if on_gpu else measure_on_cpu))(fused, tiles, ctx, self.options)
            best = min(range(len(tiles)), key=lambda i: (times[i], i))
            if not on_gpu and times[best] > times[0] * (1 - MARGIN):
                best = 0
            tile = astuple(tiles[best])
            shown = ", ".join(f"{'x'.join(map(str, astuple(t)[:3] if on_gpu else astuple(t)))}: {ms * 1000:.1f}"
                              for t, ms in zip(tiles, times, strict=True))
            ctx.remark("done", f"'{fused['kernel']}' measured with tiles of ({shown}) us", fused.location)
            self._write(key, tile)
        self.winners[key] = tile
        fused.attributes["tile"] = tile

    def _key(self, fused: Operation, ctx: PassContext) -> str:
        parts = [group_text(fused), ctx.target.digest, triton_version() if ctx.target.is_gpu else f"{torch.get_num_threads()} threads", str(MOST)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _read(self, key: str, tiles: Sequence[Tile]) -> tuple[int, ...] | None:
        """What was found before, if it is still one of the candidates."""
        try:
            found = json.loads((self.directory / "tiles" / f"{key}.json").read_text()) if self.directory is not None else None
        except (OSError, ValueError):
            return None
        return next((t for t in map(astuple, tiles) if isinstance(found, list) and t == tuple(found)), None)

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


def _bytes(fused: Operation) -> int:
    return sum(v.type.numel * v.type.dtype.bytes for v in (*fused.operands, *fused.results))  # type: ignore[attr-defined, no-any-return]


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
        inputs = [random_tensor(v.type, "cuda") for v in fused.operands]  # type: ignore[arg-type]
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
