"""Measures pointwise and reduction kernels of many shapes with every tile, for the rules of `passes/tiling/gpu_loop_tiles.py`.

    python benchmarks/gpu_loop_fit.py --out loops.json [--seconds 120] [--only gelu,softmax]     # on a GPU

Each fused group of a case is compiled with every tile that `loop_tiles` knows, and timed from CUDA graphs on random data; the fastest few whose rows
do not fit one tile are measured with unrolled loops too. A row of the result says the tile, its time, registers and programs per multiprocessor.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from aicc.backends.triton.occupancy import occupancy
from aicc.compiler.candidates import candidate_module, random_tensor
from aicc.compiler.gpu import compile_cuda, cuda_target
from aicc.compiler.options import Options
from aicc.compiler.pipelines import pipeline
from aicc.frontend.decompositions import decomposition_table
from aicc.frontend.importer import import_graph
from aicc.ir import Operation, Target
from aicc.ir.passes import PassContext, parse_pipeline, run_pipeline
from aicc.passes.structured import is_contraction
from aicc.passes.tiling.gpu_tiles import GpuTile
from aicc.passes.tiling.lower import candidate_tiles
from aicc.runtime.cuda_graph import CudaGraph
from gpu import quantise, rms_norm, rope
from gpu_tile_fit import recorded
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
MOST = 30
"""Tiles of a kernel."""
FINISHERS = 3
"""Tiles of a kernel with loops that are measured with other loops too."""


@dataclass(frozen=True)
class Case:
    """A function and the shapes and types of its arguments; `held`: the model was not fitted to it."""

    name: str
    function: Callable[..., Any]
    inputs: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    held: bool = False

    def build(self) -> tuple[Tensor, ...]:
        return tuple(torch.empty(shape, dtype=dtype) for shape, dtype in self.inputs)


def adamw(p: Tensor, g: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    m = m * 0.9 + g * 0.1
    v = v * 0.999 + g * g * 0.001
    return p * 0.9999 - 1e-3 * m / (v.sqrt() + 1e-8), m, v


def group_norm(groups: int) -> Callable[..., Tensor]:
    return lambda x, w, b: F.silu(F.group_norm(x, groups, w, b))


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    return torch.var_mean(x.float(), (0, 2, 3), correction=0)


def _of(dtype: torch.dtype, *shapes: tuple[int, ...]) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    return tuple((s, dtype) for s in shapes)


def _cases() -> Iterator[Case]:
    n, d = 16384, 4096
    loss = lambda rows, words, dtype: (((rows, words), dtype), ((rows,), torch.int64))  # noqa: E731
    norm = lambda rows, width, dtype: _of(dtype, (rows, width), (width,), (width,))  # noqa: E731
    layer = lambda x, w, b: F.layer_norm(x, (x.shape[-1],), w, b)  # noqa: E731
    soft = lambda x: x.softmax(-1)  # noqa: E731
    yield Case("cross-entropy-128256", F.cross_entropy, loss(8192, 128256, BF16))
    yield Case("groupnorm-silu-64", group_norm(32), _of(BF16, (16, 512, 64, 64), (512,), (512,)))
    yield Case("gelu-bf16", F.gelu, _of(BF16, (n * d,)))
    yield Case("softmax-8192-bf16", soft, _of(BF16, (n, 8192)))
    yield Case("bias-gelu-residual", lambda x, b, r: F.gelu(x + b) + r, _of(BF16, (n, d), (d,), (n, d)))
    yield Case("dropout-residual-norm", lambda x, r, w: F.layer_norm(r + F.dropout(x, 0.1), (d,), w), _of(BF16, (n, d), (n, d), (d,)))
    yield Case("add-rmsnorm-4096", rms_norm, _of(BF16, (n, d), (n, d), (d,)))
    yield Case("cross-entropy-32000", F.cross_entropy, loss(n, 32000, BF16))
    yield Case("gelu-tanh-f32", lambda x: F.gelu(x, approximate="tanh"), _of(F32, (n * d // 2,)), held=True)
    yield Case("softmax-32768-bf16", soft, _of(BF16, (4096, 32768)))
    yield Case("cross-entropy-50257", F.cross_entropy, loss(8192, 50257, BF16), held=True)
    yield Case("layernorm-1024-bf16", layer, norm(65536, 1024, BF16))
    yield Case("rope-bf16", rope, _of(BF16, (8, 32, 2048, 128), (2048, 128), (2048, 128)))
    yield Case("transpose-add-bf16", lambda x, y: x.t() + y, _of(BF16, (8192, 8192), (8192, 8192)))
    yield Case("dropout", lambda x: F.dropout(x, 0.1), _of(BF16, (n, d)))
    yield Case("full-sum-bf16", lambda x: x.float().sum(), _of(BF16, (n, d)))
    yield Case("column-sum-bf16", lambda x: x.sum(0), _of(BF16, (65536, 1024)))
    yield Case("swiglu", lambda g, u: F.silu(g) * u, _of(BF16, (n, 11008), (n, 11008)))
    yield Case("add-bf16", lambda x, y: x + y, _of(BF16, (n * d,), (n * d,)))
    yield Case("adamw-f32", adamw, _of(F32, *[(1 << 24,)] * 4))
    yield Case("layernorm-4096-f32", layer, norm(8192, 4096, F32))
    yield Case("softmax-1024-f32", soft, _of(F32, (32768, 1024)))
    yield Case("layernorm-8192-f16", layer, norm(8192, 8192, F16), held=True)
    yield Case("cross-entropy-8192-f32", F.cross_entropy, loss(n, 8192, F32), held=True)
    yield Case("cross-entropy-151936", F.cross_entropy, loss(4096, 151936, BF16), held=True)
    yield Case("groupnorm-silu-40", group_norm(32), _of(BF16, (8, 320, 64, 64), (320,), (320,)), held=True)
    yield Case("groupnorm-silu-256", group_norm(32), _of(F16, (2, 128, 256, 256), (128,), (128,)), held=True)
    yield Case("groupnorm-silu-32", group_norm(32), _of(BF16, (32, 256, 32, 32), (256,), (256,)))
    yield Case("silu-small", F.silu, _of(BF16, (2048 * 4096,)), held=True)
    yield Case("relu-square-f16", lambda x: F.relu(x).square(), _of(F16, (n * d,)), held=True)
    yield Case("cast-f32-bf16", lambda x: x.bfloat16(), _of(F32, (n * d,)), held=True)
    yield Case("add-f32", lambda x, y: x + y, _of(F32, (n * d // 2,), (n * d // 2,)))
    yield Case("bias-relu-768", lambda x, b: F.relu(x + b), _of(BF16, (65536, 768), (768,)), held=True)
    yield Case("softmax-4096-f32", soft, _of(F32, (n, 4096)), held=True)
    yield Case("softmax-16384-bf16", soft, _of(BF16, (8192, 16384)), held=True)
    yield Case("softmax-256-bf16", soft, _of(BF16, (1 << 18, 256)))
    yield Case("rmsnorm-16384-bf16", rms_norm, _of(BF16, (4096, 16384), (4096, 16384), (16384,)))
    yield Case("rmsnorm-5120-bf16", rms_norm, _of(BF16, (8192, 5120), (8192, 5120), (5120,)), held=True)
    yield Case("layernorm-768-bf16", layer, norm(65536, 768, BF16), held=True)
    yield Case("rmsnorm-2048-bf16", rms_norm, _of(BF16, (n, 2048), (n, 2048), (2048,)), held=True)
    yield Case("quantise-fp8", quantise, _of(BF16, (n, d)))
    yield Case("transpose-f32", lambda x: x.t().contiguous(), _of(F32, (8192, 4096)), held=True)
    yield Case("rope-64", rope, _of(F16, (16, 16, 2048, 64), (2048, 64), (2048, 64)), held=True)
    yield Case("column-sum-f32", lambda x: x.sum(0), _of(F32, (16384, 4096)), held=True)
    yield Case("full-sum-f32", lambda x: x.sum(), _of(F32, (n * d // 2,)), held=True)
    yield Case("batch-statistics", batch_statistics, _of(BF16, (64, 256, 56, 56)), held=True)
    yield Case("logsumexp-f32", lambda x: x.logsumexp(-1), _of(F32, (4096, 32000)), held=True)
    yield Case("gelu-small", F.gelu, _of(BF16, (512 * 3072,)))
    yield Case("layernorm-small", layer, norm(512, 768, BF16))
    for c in _later(loss, norm, layer, soft):
        yield dataclasses.replace(c, held=True, name="later-" + c.name)


def _later(loss: Any, norm: Any, layer: Any, soft: Any) -> Iterator[Case]:
    """Shapes that were first measured when the rules stood."""
    yield Case("cross-entropy-65536-f16", F.cross_entropy, loss(8192, 65536, F16))
    yield Case("softmax-50304", soft, _of(BF16, (4096, 50304)))
    yield Case("softmax-512-f16", soft, _of(F16, (1 << 17, 512)))
    yield Case("softmax-2048-bf16", soft, _of(BF16, (1 << 15, 2048)))
    yield Case("log-softmax-f32", lambda x: x.log_softmax(-1), _of(F32, (2048, 32768)))
    yield Case("layernorm-384-f32", layer, norm(1 << 17, 384, F32))
    yield Case("layernorm-12288", layer, norm(8192, 12288, BF16))
    yield Case("rmsnorm-7168", rms_norm, _of(BF16, (8192, 7168), (8192, 7168), (7168,)))
    yield Case("rmsnorm-8192-f32", rms_norm, _of(F32, (4096, 8192), (4096, 8192), (8192,)))
    yield Case("groupnorm-silu-96", group_norm(16), _of(F16, (8, 256, 96, 96), (256,), (256,)))
    yield Case("groupnorm-f32", group_norm(32), _of(F32, (16, 256, 64, 64), (256,), (256,)))
    yield Case("gelu-f16", F.gelu, _of(F16, (1 << 25,)))
    yield Case("bias-silu-11008", lambda x, b: F.silu(x + b), _of(BF16, (8192, 11008), (11008,)))
    yield Case("three-adds", lambda x, y, z, w: x + y * z - w, _of(BF16, *[(1 << 25,)] * 4))
    yield Case("exp-f32", lambda x, y: torch.exp(x) * y, _of(F32, (1 << 25,), (1 << 25,)))
    yield Case("transpose-scale", lambda x: x.t() * 2, _of(BF16, (4096, 12288)))
    yield Case("rows-sum", lambda x: x.float().sum(-1), _of(BF16, (4096, 32768)))
    yield Case("columns-mean", lambda x: x.float().mean(0), _of(F16, (32768, 2048)))
    yield Case("rope-heads", lambda x, c, s: rope(x.transpose(1, 2), c, s), _of(BF16, (8, 2048, 16, 128), (2048, 128), (2048, 128)))


CASES = list(_cases())


class _FoundError(Exception):
    pass


def groups(case: Case, target: Target) -> list[Operation]:
    """The case's fused groups that have a choice of loop tiles."""
    found: list[Operation] = []

    def compiler(gm: torch.fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        module = import_graph(gm)
        for stage in ("graph", "tensor"):
            run_pipeline(module, parse_pipeline(pipeline(stage, target, Options())), PassContext(target))
        found.extend(op for op in module.walk() if op.name == "tensor.fused" and not any(is_contraction(m) for m in op.body)
                     and len(candidate_tiles(op, target)) > 1)
        raise _FoundError

    backend = aot_autograd(fw_compiler=compiler, inference_compiler=compiler, decompositions=decomposition_table())
    torch._dynamo.reset()
    try:
        with torch.no_grad():
            torch.compile(case.function, backend=backend, dynamic=False)(*case.build())
    except Exception:
        if not found:
            raise
    return found


def likely(group: Operation, tiles: Sequence[GpuTile]) -> list[GpuTile]:
    """The model's choice and those of the others that are not absurd: a few rows where they are long, runs of memory that are not short."""
    widest = max(t.columns for t in tiles)
    tall = any(t.rows >= 32 and t.columns <= 64 for t in tiles[:1])  # two ways of walking memory, or a sum of columns
    found = []
    for t in tiles:
        each = t.rows * t.columns // (32 * t.warps)
        square = 32 <= t.rows <= 128 and 32 <= t.columns <= 256 and each <= 32
        flat = t.columns >= min(256, widest) and t.rows <= max(2, 4096 // t.columns) and (t.rows <= 16 or t.columns == widest)
        if t is tiles[0] or 8 <= each <= 64 and (square if tall else flat and (each <= 32 or t.rows == 1)):
            found.append(t)
    few = sum(v.type.numel for v in group.operands) < 1 << 18  # type: ignore[attr-defined]
    return found[:8 if few else MOST]


@dataclass(frozen=True)
class Candidate:
    """A compiled kernel, and what it takes of a multiprocessor."""

    tile: GpuTile
    call: CudaGraph
    registers: int
    spills: int
    programs: int
    loops: bool


def compiled(group: Operation, tile: GpuTile, target: Target) -> Candidate:
    ctx = PassContext(target)
    module = candidate_module(group, [tile], ctx)
    loops = any(op.name == "tile.for" for op in module.walk())
    run_pipeline(module, parse_pipeline(pipeline("host", target, Options())), ctx)
    artifact = compile_cuda(module, target, threads=1)
    (row,) = artifact.manifest["cuda"]["kernels"].values()
    held = occupancy(target.capability, row["threads"] // 32, row["registers"], row["shared"])
    return Candidate(tile, CudaGraph(artifact.manifest, artifact.blobs, torch.device("cuda", torch.cuda.current_device())), row["registers"],
                     row["spills"], held.programs, loops)


def microseconds(graph: torch.cuda.CUDAGraph, launches: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) * 1000 / launches


def timed(candidates: Sequence[Candidate], inputs: Sequence[Tensor], rounds: int = 5) -> list[float]:
    """Median microseconds of a launch of each, in turns."""
    moved = sum(x.numel() * x.element_size() for x in inputs)
    launches = 2 if moved > 1 << 28 else 4 if moved > 1 << 26 else 20
    graphs = [recorded(lambda c=c: c.call(*inputs), launches) for c in candidates]
    found: list[list[float]] = [[] for _ in candidates]
    for _ in range(rounds):
        for graph, times in zip(graphs, found, strict=True):
            times.append(microseconds(graph, launches))
    return [statistics.median(t) for t in found]


LOCK: list[AbstractContextManager[Any]] = []
"""Of a worker process: who holds it has the device."""


def worker(lock: AbstractContextManager[Any]) -> None:
    LOCK.append(lock)


def all_of(group: Operation, tiles: Sequence[GpuTile], target: Target, name: str) -> list[Candidate]:
    made = []
    for tile in tiles:
        try:
            made.append(compiled(group, tile, target))
        except Exception as e:
            print(f"{name} {tile}: {type(e).__name__}: {str(e)[:160]}", file=sys.stderr)
    return made


def run_case(number: int) -> list[dict[str, Any]]:
    """A row for each kernel of the case: its tiles with their times."""
    case, target = CASES[number], cuda_target("cuda:0")
    rows = []
    for group in groups(case, target):
        if number and "extract" in group["kernel"]:  # what a loss does with its rows: much the same for all
            continue
        tiles = likely(group, candidate_tiles(group, target))
        found = all_of(group, tiles, target, case.name)
        with LOCK[0]:
            inputs = [random_tensor(v.type, "cuda") for v in group.operands]  # type: ignore[arg-type]
            times = timed(found, inputs)
            torch.cuda.synchronize()
        best = sorted(zip(times, found, strict=True), key=lambda x: x[0])[:FINISHERS]
        others = [dataclasses.replace(c.tile, stages=n) for _, c in best if c.loops for n in (2, 4)]
        if others:
            more = all_of(group, others, target, case.name)
            with LOCK[0]:
                times += timed(more, inputs)
                torch.cuda.synchronize()
            found += more
        del inputs
        rows.append({"case": case.name, "held": case.held, "kernel": group["kernel"], "choice": dataclasses.astuple(tiles[0]), "tiles": [
            {"tile": dataclasses.astuple(c.tile), "us": us, "registers": c.registers, "spills": c.spills, "programs": c.programs, "loops": c.loops}
            for us, c in zip(times, found, strict=True)]})
        torch.cuda.empty_cache()
    return rows


def text(tile: Sequence[int]) -> str:
    return f"{tile[0]}x{tile[1]} w{tile[3]}" + (f" u{tile[4]}" if tile[4] > 1 else "")


def line(row: dict[str, Any]) -> str:
    """The choice of the tree beside the best ones."""
    tiles = sorted(row["tiles"], key=lambda t: t["us"])
    own = next((t for t in tiles if t["tile"] == row["choice"]), None)
    took = f"{text(own['tile'])} {own['us']:.1f} us, {own['us'] / tiles[0]['us'] - 1:.1%} over" if own else "its choice failed; of"
    best = "; ".join(f"{text(t['tile'])} {t['us']:.1f} ({t['registers']}r {t['programs']}p)" for t in tiles[:4])
    return f"{row['case']:24s} {row['kernel']:22.22s} {took} {len(tiles)}: {best}"


def measure(options: argparse.Namespace) -> int:
    begin, rows = time.time(), []
    wanted = [i for i, c in enumerate(CASES) if not options.only or any(o in c.name for o in options.only.split(","))]
    context = get_context("spawn")
    with context.Pool(options.jobs or len(os.sched_getaffinity(0)), worker, (context.Lock(),)) as pool:
        pending = {i: pool.apply_async(run_case, (i,)) for i in wanted}
        while pending and time.time() - begin < options.seconds:
            for i in [i for i, r in pending.items() if r.ready()]:
                try:
                    found = pending.pop(i).get()
                except Exception as e:
                    print(f"{CASES[i].name}: {type(e).__name__}: {str(e)[:300]}", flush=True)
                    continue
                for row in found:
                    print(line(row), flush=True)
                rows += found
                options.out.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}))
            time.sleep(0.2)
        if pending:
            print("out of time: " + ", ".join(CASES[i].name for i in pending), flush=True)
        pool.terminate()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=120, help="what is not ready then is left out")
    parser.add_argument("--only", default="", help="parts of names, separated by commas")
    parser.add_argument("--jobs", type=int, default=0, help="processes; 0: one per core")
    return measure(parser.parse_args())


if __name__ == "__main__":
    raise SystemExit(main())
