"""Fits the model of tiles (`passes/tiling/gpu_tile_cost.py`) to products measured on the GPU at hand, and says what its choices cost elsewhere.

    python benchmarks/gpu_tile_fit.py measure --out tiles.json [--seconds 300] [--layouts nk,kn]    # on a GPU: 900 kernels, as fast as they compile
    python benchmarks/gpu_tile_fit.py fit tiles.json                                               # anywhere: constants, and the table of regrets

Bare 16-bit products are generated with every tile that a program could have, and timed from CUDA graphs of several launches. Constants are fitted to
the shapes FIT alone (the time lost by the tile that they choose, and the error of fast tiles' times); regret, time of the tile that the model takes /
time of the best - 1, is printed for these and for the shapes HELD, which the fit never saw. `nk`: the right operand lies as a linear layer's weight.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import product, zip_longest
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from aicc.compiler.candidates import candidate_module
from aicc.compiler.gpu import compile_cuda, cuda_target
from aicc.compiler.options import Options
from aicc.compiler.pipelines import pipeline
from aicc.frontend.decompositions import decomposition_table
from aicc.frontend.importer import import_graph
from aicc.ir import Operation, Target
from aicc.ir.passes import PassContext, parse_pipeline, run_pipeline
from aicc.passes.tiling.gpu_tile_cost import HOPPER, TileCosts, product_seconds
from aicc.passes.tiling.gpu_tiles import GpuTile, gemm_tiles_gpu, padded
from aicc.runtime.cuda_graph import CudaGraph
from scipy.optimize import minimize
from torch._dynamo.backends.common import aot_autograd

Shape = tuple[int, int, int, int]
FIT: list[Shape] = [
    (1, 128, 768, 768), (1, 128, 3072, 768), (1, 512, 1024, 1024), (1, 1024, 1024, 1024), (1, 2048, 2048, 2048), (1, 4096, 1024, 1024),
    (1, 256, 3072, 768), (1, 4096, 3072, 768), (1, 64, 4096, 4096), (1, 1024, 4096, 1024), (1, 32, 4096, 4096), (4, 128, 768, 768),
    (2, 512, 2048, 2048)]
HELD: list[Shape] = [
    (1, 4096, 768, 768), (1, 4096, 768, 3072), (1, 256, 768, 768), (1, 512, 4096, 4096), (1, 1000, 1000, 1000), (1, 300, 2304, 768),
    (1, 1536, 1536, 1536), (1, 96, 11008, 2048), (1, 768, 768, 4096), (1, 2048, 1024, 4096), (8, 256, 512, 512)]
SHAPES = [s for pair in zip_longest(FIT, HELD) for s in pair if s is not None]
"""Batch, m, n, k. Both kinds in turns, so that a run that ends early has some of each."""
ALONE = {"library", "library-operands", "split-reductions", "split-dimensions"}
"""Passes that would give the product away, or make two kernels of it."""
Job = tuple[Shape, str, tuple[GpuTile, ...]]
CHUNK = 8
"""Tiles that a process compiles before it asks for the device."""


def tiles(shape: Shape, processors: int) -> Iterator[GpuTile]:
    """All that are not absurd: at least a tenth of the multiprocessors busy, and at most two dozen programs for each."""
    batch, m, n, _ = shape
    for rows, columns in product((16, 32, 64, 128), (32, 64, 128, 256)):
        programs = batch * -(-m // rows) * -(-n // columns)
        if rows > padded(m) or columns > padded(n, 32) or rows * columns > 128 * 256 or not processors / 11 < programs < 24 * processors:
            continue
        if m > 64 and rows < 32:
            continue
        for step, stages, warps in product((64, 128), (3, 4), (4, 8)):
            if step == 128 and rows + columns > 160 or stages == 4 and rows * columns >= 128 * 256:
                continue
            if (rows * columns >= 128 * 256 and warps == 4) or (rows * columns < 128 * 128 and warps == 8):
                continue
            yield GpuTile(rows, columns, step, warps, stages)
    for rows, columns, step, stages in product((64, 128), (16, 32, 64), (64, 128), (3, 4, 6)):
        if columns >= padded(m) and processors / 11 < batch * -(-n // rows) < 24 * processors:
            yield GpuTile(rows, columns, step, 4, stages, True)


def bare_product(shape: Shape, layout: str, target: Target) -> Operation:
    """The fused group of a product and nothing else."""
    batch, m, n, k = shape
    lead = () if batch == 1 else (batch,)
    found: list[Operation] = []

    def compiler(gm: torch.fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        module = import_graph(gm)
        for stage in ("graph", "tensor"):
            names = [p for p in pipeline(stage, target, Options()).split(",") if p.partition("{")[0] not in ALONE]
            run_pipeline(module, parse_pipeline(",".join(names)), PassContext(target))
        found.extend(op for op in module.walk() if op.name == "tensor.fused")
        return lambda *_: [torch.empty(*lead, m, n, dtype=torch.bfloat16)]

    x = torch.empty(*lead, m, k, dtype=torch.bfloat16)
    w = torch.empty(*lead, *((n, k) if layout == "nk" else (k, n)), dtype=torch.bfloat16)
    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=compiler, inference_compiler=compiler, decompositions=decomposition_table())
    with torch.no_grad():
        torch.compile(lambda x, w: x @ (w.transpose(-1, -2) if layout == "nk" else w), backend=backend, dynamic=False)(x, w)
    (group,) = found
    return group


LOCK: list[AbstractContextManager[Any]] = []
"""Of a worker process: who holds it has the device."""


def worker(lock: AbstractContextManager[Any]) -> None:
    LOCK.append(lock)


def run_job(job: Job) -> list[dict[str, Any]]:
    """A row for each tile that compiles; others are named on stderr."""
    shape, layout, candidates = job
    target = cuda_target("cuda:0")
    ctx, calls = PassContext(target), {}
    group = bare_product(shape, layout, target)
    for tile in candidates:
        try:
            module = candidate_module(group, [tile], ctx)
            run_pipeline(module, parse_pipeline(pipeline("host", target, Options())), ctx)
            artifact = compile_cuda(module, target, threads=1)
            calls[tile] = CudaGraph(artifact.manifest, artifact.blobs, torch.device("cuda", torch.cuda.current_device()))
        except Exception as e:
            print(f"{shape} {layout} {tile}: {type(e).__name__}: {str(e)[:200]}", file=sys.stderr)
    with LOCK[0]:
        found = timed(shape, layout, calls)
        torch.cuda.synchronize()
    return found


def recorded(call: Callable[[], Any], launches: int) -> torch.cuda.CUDAGraph:
    """So many calls as one CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(launches):
            call()
    return graph


def microseconds(graphs: dict[Any, torch.cuda.CUDAGraph], launches: int, rounds: int = 5) -> dict[Any, float]:
    """Median time of a launch of each, in turns."""
    found: dict[Any, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, graph in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            found[name].append(start.elapsed_time(end) * 1000 / launches)
    return {name: statistics.median(times) for name, times in found.items()}


def timed(shape: Shape, layout: str, calls: Mapping[GpuTile, CudaGraph]) -> list[dict[str, Any]]:
    """A row for each candidate; beside it, the library at the same time."""
    batch, m, n, k = shape
    lead = () if batch == 1 else (batch,)
    x = torch.randn(*lead, m, k, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(*lead, *((n, k) if layout == "nk" else (k, n)), device="cuda", dtype=torch.bfloat16)
    y = w.transpose(-1, -2) if layout == "nk" else w
    true = (x @ y).float()
    launches = 20 if 2 * batch * m * n * k < 2e10 else 8
    graphs: dict[Any, torch.cuda.CUDAGraph] = {"library": recorded(lambda: x @ y, launches)}
    for tile, call in calls.items():
        got = call(x, w)[0].float()
        if not float((got - true).abs().max()) < 0.02 * float(true.abs().max()):
            raise ValueError(f"{shape} {layout} {tile}: wrong numbers")
        graphs[tile] = recorded(lambda call=call: call(x, w), launches)
    times = microseconds(graphs, launches)
    library = times.pop("library")
    return [{"shape": shape, "layout": layout, "tile": dataclasses.astuple(tile), "us": us, "library": library} for tile, us in times.items()]


def measure(options: argparse.Namespace) -> int:
    begin, target = time.time(), cuda_target("cuda:0")
    jobs: list[Job] = []
    for shape, layout in product(SHAPES, options.layouts.split(",")):
        every = list(tiles(shape, target.multiprocessors))
        jobs += [(shape, layout, tuple(every[i:i + CHUNK])) for i in range(0, len(every), CHUNK)]
    rows: list[dict[str, Any]] = []
    context = get_context("spawn")
    with context.Pool(options.jobs or len(os.sched_getaffinity(0)), worker, (context.Lock(),)) as pool:
        for i, found in enumerate(pool.imap_unordered(run_job, jobs)):
            rows += found
            options.out.write_text(json.dumps({"device": torch.cuda.get_device_name(), "capability": target.capability,
                                               "multiprocessors": target.multiprocessors, "l2": target.l2, "rows": rows}))
            if time.time() - begin > options.seconds:
                print(f"{i + 1} of {len(jobs)} chunks in time", flush=True)
                break
    for shape, layout in dict.fromkeys((r["shape"], r["layout"]) for r in rows):
        print(best_line(shape, layout, rows), flush=True)
    return 0


def best_line(shape: Shape, layout: str, rows: Sequence[dict[str, Any]]) -> str:
    own = sorted((r for r in rows if (r["shape"], r["layout"]) == (shape, layout)), key=lambda r: r["us"])[:4]
    shown = "; ".join(f"{text(GpuTile(*r['tile']))} {r['us']:.2f}" for r in own)
    return f"{name_of(shape)} {layout}: library {own[0]['library']:.2f} us; {shown}" if own else f"{name_of(shape)} {layout}: none"


def name_of(shape: Shape) -> str:
    return "x".join(map(str, shape[1:] if shape[0] == 1 else shape))


def text(t: GpuTile) -> str:
    return f"{t.rows}x{t.columns}x{t.step} w{t.warps} s{t.stages}"


# -- fitting ---------------------------------------------------------------------------------------------------------------------

FITTED = [f.name for f in dataclasses.fields(TileCosts) if f.name not in ("flat", "memory")]
SOFT, ROUGH, STAY = 0.02, 0.3, 1e-3
"""Tiles whose modelled times differ by a share of SOFT are chosen with like probability; errors beyond ROUGH count as that; and what moving a
constant by a factor of e costs."""
TRIES, STEPS = 4, 4000


def costs_from(x: Iterable[float]) -> TileCosts:
    values = (float(v) for v in np.exp(list(x)))
    return dataclasses.replace(HOPPER, **dict(zip(FITTED, values, strict=True)))


def fitted(measured: Mapping[Shape, Mapping[GpuTile, float]], target: Target) -> TileCosts:
    """The constants that lose least time by the tile that they choose, and are not far off in time: of several descents, the best."""
    start = np.log([getattr(HOPPER, name) for name in FITTED])

    def loss(x: Iterable[float]) -> float:
        costs, lost = costs_from(x), 0.0
        for shape, times in measured.items():
            real = np.log(np.array(list(times.values())))
            modelled = np.log(np.array([product_seconds(target, shape, tile, costs=costs) * 1e6 for tile in times]))
            chosen, weight = np.exp((modelled.min() - modelled) / SOFT), np.exp(2 * (real.min() - real))
            lost += float((chosen * (real - real.min())).sum() / chosen.sum())
            lost += float((weight * np.minimum((modelled - real) ** 2, ROUGH**2)).sum() / weight.sum())
        return lost / len(measured) + STAY * float(np.square(np.array(list(x)) - start).mean())

    noise = np.random.default_rng(0)
    starts = [start, *(start + noise.normal(0, 0.3, len(start)) for _ in range(TRIES - 1))]
    tries = [minimize(loss, x, method="Nelder-Mead", options={"maxfev": STEPS, "adaptive": True}) for x in starts]
    return costs_from(min(tries, key=lambda r: r.fun).x)


def fit(options: argparse.Namespace) -> int:
    data = json.loads(options.data.read_text())
    target = Target(kind="cuda", name=f"sm_{data['capability']}", capability=data["capability"], multiprocessors=data["multiprocessors"],
                    l2=data.get("l2", 60 << 20))
    by_shape: dict[Shape, dict[GpuTile, float]] = {}
    library: dict[Shape, float] = {}
    for r in data["rows"]:
        if r["layout"] == options.layout and r["tile"][0] >= 64:  # fewer rows are no longer taken on Hopper
            by_shape.setdefault(tuple(r["shape"]), {})[GpuTile(*r["tile"])] = r["us"]
            library[tuple(r["shape"])] = r["library"]

    def modelled(costs: TileCosts, shape: Shape, tile: GpuTile) -> float:
        return product_seconds(target, shape, tile, costs=costs) * 1e6

    costs = fitted({shape: times for shape, times in by_shape.items() if shape in FIT}, target)
    print(costs)
    for kind, shapes in (("fitted", FIT), ("held out", HELD)):
        lost: dict[str, list[float]] = {"now": [], "then": []}
        off: list[float] = []
        for shape in (s for s in shapes if s in by_shape):
            times = by_shape[shape]
            best = min(times.values())
            taken = {"now": next(t for t in gemm_tiles_gpu(target, *shape, 2) if t in times),
                     "then": min(times, key=lambda t: modelled(costs, shape, t))}
            for which, tile in taken.items():
                lost[which].append(times[tile] / best)
            off += [math.log(modelled(costs, shape, t) / us) for t, us in times.items()]
            print(f"  {name_of(shape):16s} library {library[shape]:7.2f}  best {best:7.2f} {text(min(times, key=times.__getitem__)):20s} "
                  f"now {times[taken['now']]:7.2f} {text(taken['now']):20s} then {times[taken['then']]:7.2f} {text(taken['then'])}")
        if off:
            shown = "; ".join(f"regret {which} {statistics.geometric_mean(v) - 1:.1%}, worst {max(v) - 1:.1%}" for which, v in lost.items())
            print(f"{kind}: {shown}; times off by {math.sqrt(statistics.fmean(e * e for e in off)):.1%} (root mean square)")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("--out", type=Path, default=Path("tiles.json"))
    measuring.add_argument("--seconds", type=float, default=300)
    measuring.add_argument("--jobs", type=int, default=0, help="processes that compile (default: one per core)")
    measuring.add_argument("--layouts", default="nk")
    measuring.set_defaults(run=measure)
    fitting = commands.add_parser("fit")
    fitting.add_argument("data", type=Path)
    fitting.add_argument("--layout", default="nk")
    fitting.set_defaults(run=fit)
    options = parser.parse_args()
    return int(options.run(options))


if __name__ == "__main__":
    raise SystemExit(main())
