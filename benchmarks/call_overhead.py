"""What a call of a compiled function costs beside its work: native code, the executor, Dynamo's guards.

    python -m aicc.benchmarks.call_overhead [--inputs 1 8 64]

The function adds one to a tensor of one element and has further small inputs that it sums. Microseconds of CPU time, the fastest of several runs:
  native      the compiled host function through ctypes, with a table that is ready
  graph       `CompiledGraph.__call__`: collects pointers, allocates results, calls
  compiled    `torch.compile`'s function: guards, wrappers, and all of the above
  eager       the same in eager
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

from . import contenders  # noqa: F401  # first: it names the caches before torch reads them

import torch  # isort: skip
from aicc.compiler.driver import Compilation, watching

CALLS, RUNS = 2000, 9


def microseconds(call: Callable[[], Any]) -> float:
    """The fastest of some runs."""
    call()
    best = float("inf")
    for _ in range(RUNS):
        start = time.thread_time()
        for _ in range(CALLS):
            call()
        best = min(best, (time.thread_time() - start) / CALLS)
    return best * 1e6


def total(*xs: torch.Tensor) -> torch.Tensor:
    result = xs[0] + 1
    for x in xs[1:]:
        result = result + x
    return result


@torch.no_grad()
def measure(count: int) -> list[float]:
    """Native, graph, compiled and eager microseconds for `count` inputs."""
    torch._dynamo.reset()
    xs = [torch.ones(1) for _ in range(count)]
    seen: list[Compilation] = []
    with watching(compiled=seen.append):
        compiled = torch.compile(total, backend="aicc")
        result = compiled(*xs)
    graph = seen[0].graph
    assert graph is not None and graph.library is not None and torch.equal(result, total(*xs))
    native = graph.library.function(next(step[1] for step in graph.manifest["steps"] if step[0] == "call"))
    table, address = graph._new_frame()
    graph._fill(table, 0, *(x.data_ptr() for x in xs), result.data_ptr(), *[0] * (len(table) - count - 1))
    symbols = graph._sizes(()).address
    return [microseconds(f) for f in (lambda: native(address, symbols), lambda: graph(*xs), lambda: compiled(*xs), lambda: total(*xs))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, nargs="+", default=[1, 8, 64])
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'inputs':>6} {'native':>8} {'graph':>8} {'compiled':>8} {'eager':>8}")
    for count in options.inputs:
        print(f"{count:>6} " + " ".join(f"{t:>8.2f}" for t in measure(count)), flush=True)


if __name__ == "__main__":
    main()
