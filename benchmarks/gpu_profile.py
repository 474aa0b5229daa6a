"""Where the device time of whole models goes, for aicc and its peers: by class of kernels, and how long the device is idle.

    python -m aicc.benchmarks.gpu_profile --only gpt-train-b8,resnet50-train-b64 --peers inductor,aicc --rows 25

Rows are those of `gpu_models.py`. Each (row, contender) compiles in a process of its own, all at once; when all are ready (or `--compile-seconds` are
over, for those that are), they take turns on the device. torch's profiler (CUPTI) sees the kernels of every contender alike, also in CUDA graphs.
Times are microseconds per call; `span` is from the first kernel of a call to the first of the next (calls follow each other without waiting), `busy`
the time in which at least one kernel runs. A kernel that is launched programmatically starts while the one before still runs, and waits for it: to a
kernel counts only the time in which no kernel runs that started before it, so that the kernels' times add up to `busy`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("AICC_STRICT", "1")

import torch
from torch.profiler import ProfilerActivity, profile

from .gpu import milliseconds
from .gpu_models import ROWS, STEPS, Subject, contender

CLASSES = (
    ("reduction", r"^triton_(red|per)"),
    ("pointwise", r"^triton_poi"),
    ("attention", r"sdpa|fmha|flash|attention"),
    ("convolution", r"conv|fprop|dgrad|wgrad|xmma|cudnn"),
    ("product", r"nvjet|gemm|cutlass|split_?k|matmul|gemv|cublas|triton_(tem|mm)"),
    ("copy", r"^mem(cpy|set)|_copy_kernel|nchwToNhwc|nhwcToNchw|FillFunctor|^copy"),
    ("reduction", r"^(sum|max|min|prod|welford|logsumexp|online)|reduce|norm"),
    ("pointwise", r""),
)
"""By the first pattern that is found in a kernel's name."""
CALLS = 4


@dataclass(frozen=True)
class Kernels:
    """All kernels of one name in one call (the mean over calls): how many, and the microseconds in which none that started before them ran."""

    name: str
    count: float
    microseconds: float

    @property
    def family(self) -> str:
        return next(name for name, pattern in CLASSES if re.search(pattern, self.name, re.IGNORECASE))


def span_and_busy(intervals: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """From the first start to the last end, and how much of that is covered by (start, end) intervals."""
    busy, end = 0.0, float("-inf")
    for a, b in sorted(intervals):
        busy += max(0.0, b - max(a, end))
        end = max(end, b)
    return (end - min(a for a, _ in intervals), busy) if intervals else (0.0, 0.0)


def gaps(intervals: Sequence[tuple[float, float]], bounds: Sequence[float] = (2.0, 10.0)) -> list[float]:
    """Idle time between intervals, by the length of each gap: up to the first bound, up to the next, and longer."""
    found, end = [0.0] * (len(bounds) + 1), float("inf")
    for a, b in sorted(intervals):
        if a > end:
            found[sum(a - end > x for x in bounds)] += a - end
        end = b if end == float("inf") else max(end, b)
    return found


def measure(row: str, name: str, turn: Path) -> dict[str, Any]:
    """Kernels of a contender's calls. Compiles first, then says so (`turn`.ready) and waits for its turn on the device (`turn`.go)."""
    subject = Subject(next(r for r in ROWS if r.name == row))
    start = time.perf_counter()
    made = contender(subject.model, name)
    for _ in range(3):
        subject.call(made)
    torch.cuda.synchronize()
    compiled = time.perf_counter() - start
    turn.with_suffix(".ready").touch()
    while not turn.with_suffix(".go").exists():
        time.sleep(0.05)
    (ms,) = milliseconds([lambda: subject.call(made)], 100, STEPS if subject.row.train else 1)
    with profile(activities=[ProfilerActivity.CUDA]):  # the tracer itself warms up
        subject.call(made)
        torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(CALLS):
            subject.call(made)
        torch.cuda.synchronize()
    events = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    intervals = [(e.time_range.start, e.time_range.end) for e in events]
    named: dict[str, list[float]] = {}
    end = float("-inf")
    for e in sorted(events, key=lambda e: e.time_range.start):
        named.setdefault(e.name, []).append(max(0.0, e.time_range.end - max(e.time_range.start, end)))
        end = max(end, e.time_range.end)
    kernels = sorted((Kernels(k, len(v) / CALLS, sum(v) / CALLS) for k, v in named.items()), key=lambda k: -k.microseconds)
    span, busy = span_and_busy(intervals)
    return {"row": row, "contender": name, "ms": ms, "first_calls_s": compiled, "span": span / CALLS, "busy": busy / CALLS,
            "gaps": [g / CALLS for g in gaps(intervals)], "launches": len(events) / CALLS, "kernels": [asdict(k) for k in kernels]}


def table(found: dict[str, Any], rows: int) -> list[str]:
    """Lines of text."""
    kernels = [Kernels(**k) for k in found["kernels"]]
    short, middle, long = found["gaps"]
    lines = [
        f"{found['row']} {found['contender']}: {found['ms']:.3f} ms a call ({found['first_calls_s']:.0f} s until ready); traced: span "
        f"{found['span']:.0f} us, busy {found['busy']:.0f}, {found['launches']:.0f} kernels; idle in gaps up to 2 us {short:.0f}, "
        f"up to 10 us {middle:.0f}, longer {long:.0f}"]
    sums = {family: [k for k in kernels if k.family == family] for family in dict.fromkeys(name for name, _ in CLASSES)}
    lines.append("   " + "; ".join(f"{family} {sum(k.microseconds for k in of):.0f} us in {sum(k.count for k in of):.0f}"
                                   for family, of in sums.items() if of))
    for k in kernels[:rows]:
        lines.append(f"   {k.microseconds:8.1f} us {k.count:5.1f} x {k.microseconds / k.count:7.1f}  {k.family[:5]:5s} {k.name[:110]}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="gpt-train-b8,bert-train-b32,resnet50-train-b64", help="rows, separated by commas")
    parser.add_argument("--peers", default="inductor,aicc", help="contenders, separated by commas")
    parser.add_argument("--rows", type=int, default=20, help="kernels to print for each")
    parser.add_argument("--compile-seconds", type=float, default=600, help="how long to wait for all before the first is measured")
    parser.add_argument("--seconds", type=float, default=1e9, help="what is not ready after this is left out")
    parser.add_argument("--json", type=Path, help="where the kernels of all go, one line of JSON for each contender of a row")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA device", file=sys.stderr)
        return 1
    if options.one:
        row, peer, turn = options.one
        print(json.dumps(measure(row, peer, Path(turn))), flush=True)
        return 0
    begin = time.time()
    command = [sys.executable, "-m", "aicc.benchmarks.gpu_profile", "--one"]
    wanted = [(row, peer) for row in options.only.split(",") for peer in options.peers.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for row, peer in wanted:
            base = Path(folder) / f"{row}-{peer}"
            with base.with_suffix(".out").open("w") as told, base.with_suffix(".err").open("w") as said:  # pipes would fill up
                running.append((row, peer, base, subprocess.Popen([*command, row, peer, str(base)], stdout=told, stderr=said)))
        while time.time() - begin < options.compile_seconds and any(
                p.poll() is None and not base.with_suffix(".ready").exists() for *_, base, p in running):
            time.sleep(0.1)
        for row, peer, base, p in sorted(running, key=lambda r: not r[2].with_suffix(".ready").exists()):
            base.with_suffix(".go").touch()
            try:
                p.wait(max(0.1, begin + options.seconds - time.time()))
            except subprocess.TimeoutExpired:
                p.kill()
                print(f"{row} {peer}: not ready after {time.time() - begin:.0f} s", flush=True)
                continue
            if p.returncode:
                print(f"{row} {peer} failed: {base.with_suffix('.err').read_text()[-1500:]}", flush=True)
                continue
            text = base.with_suffix(".out").read_text().strip().splitlines()[-1]
            print("\n".join(table(json.loads(text), options.rows)), flush=True)
            if options.json:
                with options.json.open("a") as f:
                    f.write(text + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
