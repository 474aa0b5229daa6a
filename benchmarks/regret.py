"""How much slower the modelled tiles are than the best of all tiles, on this CPU: the price of choosing without measuring.

    python -m aicc.benchmarks.regret [--cases softmax,mlp] [--threads 1] [--seconds 600] [--small 262144] [--json FILE]

For each kernel of the suite's cases (`cpu.py`; equal kernels once), the model's tile, the few that `mode="max-autotune"` measures and
every one of the exhaustive list (`passes/tiling/cpu_candidates.py`) are timed, in turns, on the same tensors. Regret is the time of the
choice / the time of the best - 1; printed are that of the model and that of max-autotune per kernel, and their geometric means. The best
of many is the best of their noise as well, so the model's and the best are measured again by themselves; `noise` is how far the model's
two times differ. The suite's packing kernels run once per parameter and are left out. `gpu_regret.py` does the same for products on GPUs.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

from . import contenders  # noqa: F401  (first: it names the caches before torch reads them)

import torch  # isort: skip
from aicc.compiler.autotune import MOST, SMALL
from aicc.compiler.autotune_cpu import measure_on_cpu
from aicc.compiler.candidates import group_text
from aicc.compiler.driver import cpu_target, watching
from aicc.compiler.dynamo import aicc as aicc_backend
from aicc.compiler.options import Options
from aicc.ir import Operation, TensorType
from aicc.ir.passes import Pass, PassContext
from aicc.passes.structured import constant_values
from aicc.passes.tiling.lower import candidate_tiles_cpu

from .cpu import CASES
from .timing import environment, geometric_mean

__all__ = ["fused_groups"]


def fused_groups(function: Callable[..., Any], inputs: tuple[Any, ...], wanted: Callable[[Operation], bool]) -> list[Operation]:
    """The fused groups of a function that the pass `tile` is about to see and that are `wanted`; what runs once per parameter is not."""
    found: list[Operation] = []

    def observe(stage: str, after: Pass | None, module: Operation) -> None:
        if stage != "tensor" or after is not None:
            return
        for func in [f for f in module.body if f.name == "func"]:
            constant = constant_values(func)
            found.extend(op.clone() for op in func.body if op.name == "tensor.fused" and not all(v in constant for v in op.operands) and wanted(op))

    torch._dynamo.reset()
    with watching(observe=observe), torch.no_grad():
        torch.compile(function, backend=aicc_backend, dynamic=False)(*inputs)
    return found


def _size(op: Operation) -> int:
    types = [v.type for v in (*op.operands, *op.results)]
    if not all(isinstance(t, TensorType) and isinstance(t.numel, int) for t in types):
        return 0
    return sum(t.numel * t.dtype.bytes for t in types)  # type: ignore[union-attr, operator]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", help="names, or parts of them, separated by commas")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=600, help="no further kernel is begun after this")
    parser.add_argument("--small", type=int, default=SMALL, metavar="BYTES", help="leave out kernels that touch less")
    parser.add_argument("--most", type=int, default=200, metavar="N", help="at most this many tiles of a kernel, evenly taken from the list")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    target = cpu_target(Options())
    ctx, begin, seen, rows = PassContext(target), time.perf_counter(), set(), []
    print(f"{environment()['cpu']}, {options.threads} thread(s), load {environment()['load']}\n")
    print(f"{'case':<22} {'kernel':<34} {'tiles':>5} {'model us':>9} {'best us':>9} {'regret':>7} {'autotune':>8} {'noise':>6}  best tile")
    for name in dict.fromkeys(n for part in (options.cases or "").split(",") for n in CASES if part in n):
        torch.manual_seed(0)
        function, inputs = CASES[name].build()
        for group in fused_groups(function, inputs, lambda op: _size(op) >= options.small and len(candidate_tiles_cpu(op, target)) > 1):
            text = group_text(group)
            if text in seen:
                continue
            seen.add(text)
            if time.perf_counter() - begin > options.seconds:
                print(f"{name}: '{group['kernel']}' not measured: out of time")
                continue
            few = candidate_tiles_cpu(group, target)[:MOST]
            every = candidate_tiles_cpu(group, target, few=False)
            step = max(1, math.ceil(len(every) / options.most))
            tiles = list(dict.fromkeys([*few, *every[::step]]))
            times = measure_on_cpu(group, tiles, ctx, Options())
            best = min(range(len(tiles)), key=times.__getitem__)
            # The least of many measurements is partly luck: the two that matter are measured again, by themselves.
            again = measure_on_cpu(group, [tiles[0], tiles[best]], ctx, Options())
            model, least = min(times[0], again[0]), min(again[1], times[0], again[0])
            row = {"case": name, "kernel": group["kernel"], "tiles": len(tiles), "model_us": model * 1e3, "best_us": least * 1e3,
                   "regret": model / least - 1, "autotune_regret": max(1.0, min(times[:len(few)]) / max(least, times[best])) - 1,
                   "noise": abs(again[0] / times[0] - 1), "best": astuple(tiles[best])}
            rows.append(row)
            print(f"{name:<22} {str(group['kernel'])[:34]:<34} {len(tiles):>5} {row['model_us']:>9.1f} {row['best_us']:>9.1f} {row['regret']:>7.1%} "
                  f"{row['autotune_regret']:>8.1%} {row['noise']:>6.1%}  {'x'.join(map(str, row['best']))}", flush=True)
            if options.json:
                options.json.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=2) + "\n")
    if not rows:
        print("no kernel with a choice of tiles", file=sys.stderr)
        return 1
    model = geometric_mean([r["model_us"] / r["best_us"] for r in rows]) - 1
    tuned = geometric_mean([1 + r["autotune_regret"] for r in rows]) - 1
    total = sum(r["model_us"] for r in rows) / sum(r["best_us"] for r in rows) - 1
    worst = max(rows, key=lambda r: r["regret"])
    print(f"\nregret over {len(rows)} kernels: geometric mean {model:.1%} (max-autotune {tuned:.1%}), of the sum of times {total:.1%}, "
          f"worst {worst['regret']:.1%} ({worst['case']}, {worst['kernel']})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
