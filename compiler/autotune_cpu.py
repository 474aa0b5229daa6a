"""Times of a fused group with several tiles on this machine's CPU, with the number of threads that torch is set to.

    milliseconds = measure_on_cpu(fused, tiles, ctx, options)

Each tile's program is compiled by itself and called on the same random tensors, which are warm in the caches as far as they fit. The candidates
take turns, round after round, and the best round of each counts: a neighbour that takes the processor for a while disturbs all alike.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from ..backends.llvm import compile_module
from ..ir import IRError, Operation
from ..ir.passes import PassContext, parse_pipeline, run_pipeline
from ..passes.tiling.cpu_candidates import CpuTile
from ..runtime.executor import CompiledGraph
from .candidates import candidate_module, random_tensor
from .manifest import build_manifest
from .options import Options
from .pipelines import pipeline

__all__ = ["measure_on_cpu"]

ROUNDS = 5
ROUND_SECONDS = 0.004
"""How long a candidate is called in one round (once at least)."""
HOPELESS = 1.5
"""A candidate this many times slower than the best so far in its first calls is not measured further."""


def measure_on_cpu(fused: Operation, tiles: Sequence[CpuTile], ctx: PassContext, options: Options) -> list[float]:
    """Milliseconds with each tile; infinity where it does not compile. IRError if none does."""
    inputs = [random_tensor(v.type, "cpu") for v in fused.operands]  # type: ignore[arg-type]
    graphs: list[CompiledGraph | None] = []
    for tile in tiles:
        try:
            graphs.append(_compiled(fused, tile, ctx, options))
        except (IRError, NotImplementedError):
            graphs.append(None)
    if not any(graphs):
        raise IRError(f"no tile of '{fused['kernel']}' compiles")
    with torch.no_grad():
        times = [_seconds(graph, inputs, 2) if graph is not None else float("inf") for graph in graphs]
        for _ in range(ROUNDS):
            best = min(times)
            for i, graph in enumerate(graphs):
                if graph is not None and times[i] <= HOPELESS * best:
                    times[i] = min(times[i], _seconds(graph, inputs, max(1, int(ROUND_SECONDS / times[i]))))
    return [t * 1e3 for t in times]


def _compiled(fused: Operation, tile: CpuTile, ctx: PassContext, options: Options) -> CompiledGraph:
    module = candidate_module(fused, [tile], ctx)
    run_pipeline(module, parse_pipeline("cse,dce," + pipeline("host", ctx.target, options)), PassContext(ctx.target), verify_each=False)
    compiled = compile_module(module, ctx.target)
    return CompiledGraph(build_manifest(module, errors=compiled.errors), compiled.object_code)


def _seconds(graph: CompiledGraph, inputs: list[torch.Tensor], calls: int) -> float:
    """Per call, of `calls` of them after one more that warms the caches; the mean: single calls may be shorter than the clock sees."""
    graph(*inputs)
    start = time.perf_counter()
    for _ in range(calls):
        graph(*inputs)
    return (time.perf_counter() - start) / calls
