"""What a call of a compiled function costs beside its work: native code, the executor, Dynamo's guards.

    python -m aicc.benchmarks.call_overhead [--inputs 1 8 64] [--layers 1 12 48]

The function adds one to a tensor of one element and has further small inputs that it sums. Microseconds of CPU time, the fastest of several runs:
  native      the compiled host function through ctypes, with a table that is ready
  graph       `CompiledGraph.__call__`: collects pointers, allocates results, calls
  compiled    `torch.compile`'s function: guards, wrappers, and all of the above
  eager       the same in eager

Then a model of `--layers` blocks (Linear 8 to 8, LayerNorm; four parameters each) on a batch of one, by what Dynamo checks before each call:
  graph       the call without Dynamo: what is left when nothing is checked
  dynamo      torch's own part, with all guards: a backend whose code does nothing but return a result that is there already
  all         the default
  no modules  without the guards on modules and parameters (`torch.compiler.skip_guard_on_all_nn_modules_unsafe`)
  none        without any (`torch.compiler.skip_all_guards_unsafe`)
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from . import contenders  # noqa: F401  # first: it names the caches before torch reads them

import torch  # isort: skip
from torch import nn  # isort: skip
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


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm(self.linear(x))


GUARDS: dict[str, Callable[[Any], list[bool]] | None] = {
    "all": None, "no modules": torch.compiler.skip_guard_on_all_nn_modules_unsafe, "none": torch.compiler.skip_all_guards_unsafe,
}


@torch.no_grad()
def measure_guards(layers: int) -> list[float]:
    """Microseconds of the graph alone, of Dynamo alone, and of the compiled model under each choice of guards."""
    model, x = nn.Sequential(*(Block() for _ in range(layers))).eval(), torch.ones(1, 8)
    times: list[float] = []
    ready = (model(x),)
    for keep in GUARDS.values():
        torch._dynamo.reset()
        seen: list[Compilation] = []
        with watching(compiled=seen.append):
            compiled = torch.compile(model, backend="aicc", options={} if keep is None else {"guard_filter_fn": keep})
            result = compiled(x)
        torch.testing.assert_close(result, model(x))
        if not times:
            graph = seen[0].graph
            assert graph is not None
            arguments = arguments_of(graph, model, x)
            times.append(microseconds(partial(graph, *arguments)))
            torch._dynamo.reset()
            nothing = torch.compile(model, backend=lambda gm, inputs: lambda *args: ready)
            times.append(microseconds(partial(nothing, x)))
        times.append(microseconds(partial(compiled, x)))
    return times


def arguments_of(graph: Any, model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The graph's arguments by position: the input where one has its shape, and the parameters in their order."""
    found = []
    parameters = list(model.parameters())
    for row in sorted(graph.manifest["inputs"], key=lambda row: row["position"]):
        found.append(x if row["shape"] == [1, 8] else parameters.pop(0))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 12, 48])
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'inputs':>6} {'native':>8} {'graph':>8} {'compiled':>8} {'eager':>8}")
    for count in options.inputs:
        print(f"{count:>6} " + " ".join(f"{t:>8.2f}" for t in measure(count)), flush=True)
    print(f"\n{'layers':>6} {'graph':>10} {'dynamo':>10} " + " ".join(f"{name:>10}" for name in GUARDS))
    for count in options.layers:
        print(f"{count:>6} " + " ".join(f"{t:>10.2f}" for t in measure_guards(count)), flush=True)


if __name__ == "__main__":
    main()
