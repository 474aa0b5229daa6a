"""How much slower the modelled tile of a matrix product is than the best of all tiles, on the GPU at hand.

    python benchmarks/gpu_regret.py                     # generated products of the groups gemm and packed of `gpu.py`
    python benchmarks/gpu_regret.py --only mm-4096x4096x4096 --no-library

Exhaustive: every tile that the model knows, with 2 to 5 loads in flight. Regret is time of the choice / time of the best - 1; also printed is that of
the few best by the model together, which is what `mode="max-autotune"` measures.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time

import torch
from aicc.benchmarks.regret import fused_groups
from aicc.compiler.autotune import MOST, measure
from aicc.compiler.gpu import cuda_target
from aicc.compiler.options import Options
from aicc.ir import Operation
from aicc.ir.passes import PassContext
from aicc.passes.tiling.gpu_tiles import GpuTile
from aicc.passes.tiling.lower import candidate_tiles
from gpu import CASES, Case

STAGES = (2, 3, 4, 5)


def exhaustive(tiles: list[GpuTile]) -> list[GpuTile]:
    """The model's choice first, then everything else."""
    return list(dict.fromkeys([*tiles, *(dataclasses.replace(t, stages=s) for t in tiles for s in STAGES)]))


def groups(case: Case) -> list[Operation]:
    """Fused groups of the case that the pass `tile` is about to see."""
    target = cuda_target("cuda:0")
    return fused_groups(*case.build(), lambda op: bool(candidate_tiles(op, target)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="gemm,packed", help="groups or case names, separated by commas")
    parser.add_argument("--seconds", type=float, default=500, help="no further case is begun after this")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 1
    begin, wanted, ratios = time.time(), set(options.only.split(",")), []
    ctx = PassContext(cuda_target("cuda:0"))
    for case in CASES:
        if case.name not in wanted and case.group not in wanted:
            continue
        if time.time() - begin > options.seconds:
            print(f"{case.name}: out of time")
            continue
        for group in groups(case):
            few = candidate_tiles(group, ctx.target)
            tiles = exhaustive(few)
            times = measure(group, tiles, ctx, Options())
            best = min(range(len(tiles)), key=times.__getitem__)
            ratios.append(times[0] / times[best])
            print(f"{case.name:30s} model {_text(tiles[0])} {times[0] * 1000:.1f} us  best {_text(tiles[best])} {times[best] * 1000:.1f} us  "
                  f"regret {ratios[-1] - 1:.1%}  of the best {min(MOST, len(few))}: {min(times[:MOST]) / times[best] - 1:.1%}", flush=True)
    if ratios:
        print(f"regret over {len(ratios)} products: mean {statistics.fmean(ratios) - 1:.1%}, worst {max(ratios) - 1:.1%}")
    return 0


def _text(t: GpuTile) -> str:
    return f"{t.rows}x{t.columns}x{t.step} w{t.warps} s{t.stages}"


if __name__ == "__main__":
    raise SystemExit(main())
