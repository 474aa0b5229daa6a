"""How much slower the tile that the cost model chooses is than the best of all tiles, over the suite of `gpu.py`, on the GPU at hand.

    python benchmarks/gpu_regret.py                     # every generated kernel of every case, eight processes
    python benchmarks/gpu_regret.py --only memory,mm-16x4096x4096 --jobs 1 --exhaustive

For each fused group of a case that the pass `tile` is about to see: the model's tile and every other one that it knows (of products, with 3 and 4
loads in flight; `--exhaustive`: 2 to 5) are compiled and timed alone, on random data, replayed from a CUDA graph. Regret is time of the choice / time
of the best - 1; also that of the few best by the model together, which is what `mode="max-autotune"` measures. Processes compile side by side and
take turns to time.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

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

RESULT = "-- result -- "
GROUPS = "memory,attention,gemm,packed,scatter"


def alternatives(few: Sequence[GpuTile], stages: Sequence[int], most: int) -> list[GpuTile]:
    """The model's choice first, then everything else, at most so many."""
    piped = [dataclasses.replace(t, stages=s) for t in few for s in stages if t.stages > 1]
    return list(dict.fromkeys([*few[:MOST], *piped, *few]))[:most]


def groups(case: Case) -> list[Operation]:
    """Fused groups of the case that have candidates."""
    target = cuda_target("cuda:0")
    return fused_groups(*case.build(), lambda op: len(candidate_tiles(op, target)) > 1)


@contextmanager
def turn(path: str) -> Iterator[None]:
    """One process at a time."""
    with open(path, "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        try:
            yield
        finally:
            torch.cuda.synchronize()
            fcntl.flock(f, fcntl.LOCK_UN)


def regrets(case: Case, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each kernel of the case."""
    ctx = PassContext(cuda_target("cuda:0"))
    stages = (2, 3, 4, 5) if options.exhaustive else (3, 4)
    for group in groups(case):
        few = candidate_tiles(group, ctx.target)
        tiles = alternatives(few, stages, 200 if options.exhaustive else options.most)
        times = measure(group, tiles, ctx, Options(), turn(options.lock) if options.lock else None)
        best = min(range(len(tiles)), key=times.__getitem__)
        yield {"case": case.name, "family": case.group, "kernel": group["kernel"], "tiles": len(tiles), "model": text(tiles[0]),
               "us": times[0] * 1000, "best": text(tiles[best]), "best_us": times[best] * 1000, "regret": times[0] / times[best],
               "tuned": min(times[:min(MOST, len(few))]) / times[best]}


def text(t: GpuTile) -> str:
    return f"{t.rows}x{t.columns}" + (f"x{t.step} w{t.warps} s{t.stages}" if t.stages > 1 else f" w{t.warps}")


def show(row: dict[str, Any]) -> None:
    print(f"{row['case']:28s} {row['kernel']:24.24s} {row['us']:8.1f} us {row['model']:18s} best of {row['tiles']:3d} {row['best_us']:8.1f} us "
          f"{row['best']:18s} regret {row['regret'] - 1:6.1%}  of the best {MOST} {row['tuned'] - 1:6.1%}", flush=True)


def summarise(rows: Sequence[dict[str, Any]]) -> None:
    for family in [*dict.fromkeys(r["family"] for r in rows), "all"]:
        found = [r for r in rows if family in (r["family"], "all")]
        worst = max(found, key=lambda r: r["regret"])
        print(f"{family:10s} {len(found):3d} kernels: regret geomean {statistics.geometric_mean(r['regret'] for r in found) - 1:.1%}, "
              f"worst {worst['regret'] - 1:.1%} ({worst['case']}); of the best {MOST}: geomean "
              f"{statistics.geometric_mean(r['tuned'] for r in found) - 1:.1%}")


def own_part(cases: list[Case], options: argparse.Namespace, begin: float) -> None:
    """A process of `--jobs`: its share of the cases, a line for each kernel."""
    part, of = (int(n) for n in options.part.split("/"))
    for case in cases[part - 1::of]:
        if time.time() - begin > options.seconds:
            print(f"{case.name}: out of time", flush=True)
            continue
        try:
            for row in regrets(case, options):
                print(RESULT + json.dumps(row), flush=True)
        except Exception as e:
            print(f"{case.name}: {type(e).__name__}: {str(e)[:300]}", flush=True)
        torch.cuda.empty_cache()


def _read(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    """The rows of a process, shown as they come."""
    rows = []
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(RESULT):
            rows.append(json.loads(line.removeprefix(RESULT)))
            show(rows[-1])
        else:
            print(line.rstrip(), flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=GROUPS, help="groups or case names, separated by commas")
    parser.add_argument("--seconds", type=float, default=500, help="no further case is begun after this")
    parser.add_argument("--jobs", type=int, default=8, help="processes")
    parser.add_argument("--most", type=int, default=28, help="tiles of a kernel")
    parser.add_argument("--exhaustive", action="store_true", help="all tiles, with 2 to 5 loads in flight")
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)
    parser.add_argument("--lock", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 1
    begin, wanted = time.time(), set(options.only.split(","))
    cases = [c for c in CASES if c.name in wanted or c.group in wanted]
    if options.part:
        own_part(cases, options, begin)
        return 0
    given = sys.argv[1:]
    rows = []
    with tempfile.NamedTemporaryFile() as lock:
        jobs = max(1, min(options.jobs, len(cases)))
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        running = [subprocess.Popen([sys.executable, __file__, *given, "--part", f"{i + 1}/{jobs}", "--lock", lock.name], stdout=subprocess.PIPE,
                                    stderr=subprocess.DEVNULL, text=True, env=environment) for i in range(jobs)]
        with ThreadPoolExecutor(jobs) as readers:  # each line as it comes: a run that is cut off has shown what it found
            for found in readers.map(_read, running):
                rows += found
    if rows:
        summarise(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
