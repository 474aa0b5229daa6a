"""Each kernel of a case of the CPU suite, or of `memory_bound.py`, against the roofline of this machine.

    python -m aicc.benchmarks.roofline bert-b1-s128 softmax-2048x4096 [--threads 1] [--calls 20] [--plot roof.png] [--json roof.json]

The roof is the measured peak of float32 multiply-adds, the measured bandwidth of a copy (bytes in both directions) and of reading alone, all on as
many threads, and the rate of vector instructions, which is that of multiply-adds: two in a cycle on most processors. Of each launch the IR tells
the operations of products, the least bytes (each buffer that it is given once, or less where the kernel says that it reads less) and the vector
instructions (`vector_work.py`: an exponential is some twenty). `limit` names which of the four takes longest: compute, memory, read or vector.
The program is compiled once more with every launch a step of its own, whose best of `--calls` calls counts (with Python's part of a step, a
microsecond). `roof` is the time that the roof allows over the time that it took; data that lies in the caches can pass 100 %. Launches of one
kernel are added up.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import contenders  # noqa: F401  # first: it names the caches before torch reads them

import torch  # isort: skip
from aicc.backends.llvm import compile_module, host_target
from aicc.compiler.driver import Compilation, watching
from aicc.compiler.manifest import build_manifest
from aicc.ir import BufferType, Operation
from aicc.ir.parser import parse_module
from aicc.ir.printer import print_with_resources
from aicc.passes.storage import storage_bytes
from aicc.runtime.executor import CompiledGraph
from aicc.runtime.segments import Segments
from torch import nn

from . import cpu, memory_bound
from .gemm_kernel import make_peak
from .timing import environment
from .vector_work import vector_instructions

__all__ = ["CASES", "Point", "Roof", "launches", "least_bytes", "profile"]

CASES = {**memory_bound.CASES, **cpu.CASES}


@dataclass(frozen=True)
class Roof:
    """Operations and bytes per second."""

    peak: float
    bandwidth: float
    read: float = math.inf
    """Bytes per second where nothing is written: a core waits for what it reads, so this may be little more than half of a copy's."""
    instructions: float = math.inf
    """Vector instructions per second."""

    def seconds(self, flops: float, nbytes: float, read: float = 0, instructions: float = 0) -> float:
        """The least time: as long as the longest of them takes."""
        return max(flops / self.peak, nbytes / self.bandwidth, read / self.read, instructions / self.instructions)

    @property
    def ridge(self) -> float:
        """Operations per byte from which on operations are the limit."""
        return self.peak / self.bandwidth


@dataclass(frozen=True)
class Point:
    """A kernel: operations, least bytes and seconds of all its launches in one call; the part of the bytes that is read, and vector instructions."""

    name: str
    launches: int
    flops: int
    bytes: int
    seconds: float
    read: int = 0
    instructions: int = 0

    @property
    def intensity(self) -> float:
        return self.flops / max(self.bytes, 1)

    def limit(self, roof: Roof) -> str:
        """What the roof is made of here."""
        times = {"memory": self.bytes / roof.bandwidth, "compute": self.flops / roof.peak, "read": self.read / roof.read,
                 "vector": self.instructions / roof.instructions}
        return max(times, key=lambda name: times[name])

    def least(self, roof: Roof) -> float:
        """Seconds."""
        return roof.seconds(self.flops, self.bytes, self.read, self.instructions)

    def percent(self, roof: Roof) -> float:
        return 100 * self.least(roof) / self.seconds


def launches(module: Operation) -> list[Operation]:
    """What the main function runs in every call, in order."""
    func = next(op for op in module.body if op.name == "func" and op["sym_name"] == "main")
    return [op for op in func.body if op.name in ("host.launch", "host.copy", "host.loop") and not op.attributes.get("cached", False)]


def least_bytes(op: Operation, kernel: Operation | None) -> int:
    """Each buffer once; less where the kernel touches less of them. 0 where a size is symbolic."""
    total = 0
    for v in dict.fromkeys(op.operands):
        assert isinstance(v.type, BufferType)
        size = storage_bytes(v.type)
        total += size if isinstance(size, int) else 0
    moved = 0 if kernel is None else kernel["bytes"]
    return min(total, moved) if isinstance(moved, int) and moved else total


@torch.no_grad()
def profile(function: Callable[..., Any], args: tuple[Any, ...], calls: int) -> list[Point]:
    """The kernels of all graphs of a function, slowest first."""
    texts: list[tuple[str, dict[str, bytes]]] = []
    found: list[tuple[list[Operation], dict[str, Operation], list[list[float]]]] = []

    def observe(stage: str, p: Any, module: Operation) -> None:
        if stage == "host" and p is None:
            texts.append(print_with_resources(module))

    def compiled(compilation: Compilation) -> None:
        text, resources = texts[-1]
        module = parse_module(text, resources=resources)
        code = compile_module(module, compilation.target, stepwise=True)
        manifest = build_manifest(module, errors=code.errors, stepwise=True)
        graph = CompiledGraph(manifest, code.object_code)
        times: list[list[float]] = []
        segments = Segments(manifest["steps"], lambda name: _timed(graph._function(name), times), manifest["constants"], graph._positions,
                            manifest["inputs"], graph._specs, graph.device)
        assert compilation.graph is not None
        compilation.graph._run = lambda given: graph._run_steps(given, segments)
        found.append((launches(module), {op["sym_name"]: op for op in module.body if op.name == "tile.kernel"}, times))

    torch._dynamo.reset()
    model = torch.compile(function, backend="aicc", options={"strict": True, "cache": False})
    with watching(observe, compiled):
        for _ in range(calls + 1):
            model(*args)
    points: dict[str, Point] = {}
    for ops, kernels, times in found:
        if len(ops) != len(times):
            raise RuntimeError(f"{len(times)} steps for {len(ops)} launches")
        for op, seen in zip(ops, times, strict=True):
            name = op["kernel"].name if op.name == "host.launch" else op.name
            kernel = kernels.get(name)
            multiplies = kernel is not None and any(inner.name == "tile.dot" for inner in kernel.walk())
            flops = kernel["flops"] if kernel is not None and isinstance(kernel["flops"], int) and multiplies else 0
            moved, work = least_bytes(op, kernel), 0 if kernel is None else vector_instructions(kernel, host_target())
            written = sum(s for v in op.operands[len(op.operands) - op.attributes.get("outputs", 1):]
                          if isinstance(v.type, BufferType) and isinstance(s := storage_bytes(v.type), int))
            old = points.get(name, Point(name, 0, 0, 0, 0.0))
            points[name] = Point(name, old.launches + 1, old.flops + flops, old.bytes + moved, old.seconds + min(seen),
                                 old.read + max(0, moved - written), old.instructions + work)
    return sorted(points.values(), key=lambda p: -p.seconds)


def _timed(native: Callable[[int, int], int], times: list[list[float]]) -> Callable[[int, int], int]:
    """`native`, its seconds appended to a list of its own."""
    mine: list[float] = []
    times.append(mine)

    def run(table: int, symbols: int) -> int:
        start = time.perf_counter()
        code = native(table, symbols)
        mine.append(time.perf_counter() - start)
        return code
    return run


def table(points: Sequence[Point], roof: Roof) -> list[str]:
    """Lines, the slowest kernel first, then the whole."""
    total = sum(p.seconds for p in points)
    lines = [f"{'kernel':<44} {'launches':>8} {'ms':>9} {'share':>6} {'Mops':>9} {'MB':>8} {'op/byte':>8} {'GOP/s':>7} {'GB/s':>6} {'Ginst/s':>7} "
             f"limit   {'roof':>6}"]
    for p in points:
        lines.append(f"{p.name[:44]:<44} {p.launches:>8} {p.seconds * 1e3:>9.3f} {100 * p.seconds / total:>5.1f}% {p.flops / 1e6:>9.1f} "
                     f"{p.bytes / 1e6:>8.2f} {p.intensity:>8.2f} {p.flops / p.seconds / 1e9:>7.1f} {p.bytes / p.seconds / 1e9:>6.1f} "
                     f"{p.instructions / p.seconds / 1e9:>7.2f} {p.limit(roof):<7} {p.percent(roof):>5.0f}%")
    allowed = sum(p.least(roof) for p in points)
    return [*lines, f"{'all':<44} {sum(p.launches for p in points):>8} {total * 1e3:>9.3f} {'':>70} {100 * allowed / total:>12.0f}%"]


def plot(groups: dict[str, list[Point]], roof: Roof, path: Path) -> None:
    """Operations per second over operations per byte, both logarithmic; the area of a point is its time."""
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, axis = pyplot.subplots(figsize=(9, 6), layout="constrained")
    low, high = 2.0**-6, 2.0**10
    axis.plot([low, roof.ridge, high], [low * roof.bandwidth / 1e9, roof.peak / 1e9, roof.peak / 1e9], color="black", linewidth=1)
    for name, points in groups.items():
        shown = [p for p in points if p.flops and p.bytes]
        longest = max((p.seconds for p in shown), default=1.0)
        speeds, areas = [p.flops / p.seconds / 1e9 for p in shown], [20 + 300 * p.seconds / longest for p in shown]
        axis.scatter([p.intensity for p in shown], speeds, areas, alpha=0.5, label=name)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("operations per byte that must move")
    axis.set_ylabel("GOP/s")
    axis.legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", help=f"of {', '.join(CASES)}")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a picture (`pip install aicc[plot]`)")
    options = parser.parse_args()
    if unknown := [c for c in options.cases if c not in CASES]:
        parser.error(f"no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("matplotlib is missing: pip install aicc[plot]")
    torch.set_num_threads(options.threads)
    peak = make_peak(host_target())
    fastest = max(peak() for _ in range(5)) * 1e9 * options.threads
    copies = memory_bound.copy_bandwidth(0.4)
    roof = Roof(fastest, max(copies.values()), memory_bound.read_bandwidth(0.4), fastest / 2 / host_target().lanes(32))
    about = environment()
    print(f"{about['cpu']}, {options.threads} threads, load {about['load']}: {roof.peak / 1e9:.0f} GFLOP/s, {roof.bandwidth / 1e9:.1f} GB/s copied, "
          f"{roof.read / 1e9:.1f} read, {roof.instructions / 1e9:.1f}e9 vector instructions/s, ridge at {roof.ridge:.1f} operations per byte")
    groups: dict[str, list[Point]] = {}
    for case in options.cases:
        torch.manual_seed(0)
        function, args = CASES[case].build()
        if isinstance(function, nn.Module):
            function.eval()
        groups[case] = profile(function, args, options.calls)
        print(f"\n{case}", *table(groups[case], roof), sep="\n", flush=True)
    if options.json:
        rows = {c: [{**asdict(p), "percent": p.percent(roof)} for p in points] for c, points in groups.items()}
        options.json.write_text(json.dumps({"environment": about, "roof": asdict(roof), "cases": rows}, indent=1) + "\n")
    if options.plot:
        plot(groups, roof, options.plot)


if __name__ == "__main__":
    sys.exit(main())
