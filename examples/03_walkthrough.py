"""Writes docs/index.md: one small model through every level, from real output.

Run it: `python examples/03_walkthrough.py` prints the page, `make docs` writes it; a test compares the two, so that the page cannot go stale.
The target is fixed (x86-64 with AVX2), so that the text is the same on every machine.
"""

import argparse
import re
from pathlib import Path

import torch
from aicc.compiler.capture import Recorder, compile_and_run
from aicc.compiler.model_file import LoadedModel
from aicc.compiler.options import Options
from aicc.compiler.pipelines import STAGES, pipeline
from aicc.ir.core import Operation, equivalent
from aicc.ir.interpreter import interpret
from aicc.ir.parser import parse_module
from aicc.ir.printer import print_op


# [model]
class Block(torch.nn.Module):
    """A residual block: normalise, widen, activate, add."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(32)
        self.linear = torch.nn.Linear(32, 32)

    def forward(self, x):
        return x + torch.relu(self.linear(self.norm(x)))
# [end]


FEATURES = ("avx", "avx2", "fma", "sse", "sse2", "sse3", "sse4.1", "sse4.2", "ssse3")

PAGE = """\
# One small model through every level

This page is written by `examples/03_walkthrough.py` (`make docs`) from what the compiler really does; a test keeps it so.

A compiler is a row of small steps. Each step of aicc leaves text behind that you can read, change and feed back in. We follow one residual
block, on 4 rows of 32 numbers, down to machine code:

```python
{source}
compiled = torch.compile(Block(), backend="aicc")
```

## 0. Capture

On the first call torch itself (Dynamo, then AOTAutograd) turns the Python code into a graph of ATen operators without side effects, and hands it
to aicc with the arguments: here {arguments} tensors, of which {parameters} are parameters. `frontend/` turns the graph into IR of the first level.

The four levels are four small dialects of one IR (`ir/`). A module holds functions; a function holds ops in order; an op has operands (`%x`),
attributes (`{{...}}`), result types (after the colon), and sometimes a region of more ops. `aicc dump-ir model.py` prints them all, and
`aicc opt FILE --passes "..."` runs passes over what it printed.

## 1. graph: what is computed

Whole-tensor ops by their usual names. After `{graph_passes}`:

```
{graph}```

Every op also keeps the Python line that it comes from (left out here; `dump-ir` prints it). It is what `aicc explain` points at.

## 2. tensor: how each element is computed

Named ops are spelled out as loops without an order: `dims` are the sizes of the loops, `maps` say which element of each operand an iteration
reads, and the region computes one element. Views vanish into the maps, and ops that read each other's results end up in one group:
`tensor.fused` is one future kernel. After `{tensor_passes}`:

```
{tensor}```

From {graph_ops} graph ops, {groups} groups are left. What the passes decided, and declined, is in `aicc explain`.

## 3. tile: loops and vectors

Each group becomes a kernel: a grid of programs that may run side by side, loops over tiles, loads and stores. The tile sizes come from the
target; these are for a CPU with 8-lane vectors. After `{tile_passes}`, the kernel `{kernel_name}`:

```
{kernel}```

## 4. host: the program in order

What runs, in order, and where each buffer is: offsets in one arena, found by liveness. After `{host_passes}`:

```
{host}```

The arena has {arena} bytes. No plan can do with less than {bound}; without planning it would be {unplanned}.

## 5. Native code

`backends/llvm/` turns kernels and host program into LLVM modules, which threads compile to machine code. Python then makes one native call per graph:
it collects addresses, calls, and wraps the outputs ({calls} native call and {extern_calls} ATen calls for this block). The inner loop of
`{kernel_name}`, as LLVM IR, begins so:

```
{llvm}```

## Is it right?

Each level has a meaning of its own, given by the interpreter in `ir/interpreter/`, so each level can be run and compared:

| level | parses back to itself | largest difference from eager |
|---|---|---|
{checks}

That is also how a faulty pass is found: the first level that differs is the one that it broke.

## Where to go from here

- `aicc dump-ir examples/gpt2.py -o DIR`: the same for a GPT-2, a file per level.
- `aicc opt DIR/graph0_inference.graph.aicc --passes "canonicalize,cse,decompose" --print-after-each`: one pass after the other.
- `compiler/pipelines.py`: the passes of each level, and why they are in that order. `passes/`: one pass a file.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page here instead of printing it")
    path = parser.parse_args().write
    page = make_page()
    if path is None:
        print(page, end="")
    else:
        path.parent.mkdir(exist_ok=True)
        path.write_text(page)


def make_page() -> str:
    """The text of the page."""
    torch.manual_seed(0)
    x = torch.randn(4, 32)
    options = Options(strict=True, cache=False, features=FEATURES)
    found = LoadedModel("block", Block(), (x,))
    recorder = Recorder()
    with recorder.watching():
        out = compile_and_run(found, options, dynamic=False)
    (graph,) = recorder.graphs
    compilation = graph.compilation
    with torch.no_grad():
        eager = found.model(x)
    func = function(graph.stages["graph"])
    kinds = [a["kind"] for a in func["arg_attrs"]]
    kernels = {op["sym_name"]: op for op in graph.stages["tile"].body if op.name == "tile.kernel"}
    kernel_name = next(n for n in kernels if "matmul" in n)
    memory = compilation.stats["memory"]
    return PAGE.format(
        source=source(), arguments=len(kinds), parameters=kinds.count("param"),
        **{f"{s}_passes": pipeline(s, compilation.target, options) for s in STAGES},
        graph=text(graph.stages["graph"]), tensor=text(graph.stages["tensor"]), kernel=text(kernels[kernel_name]),
        host=text(function(graph.stages["host"])), kernel_name=kernel_name,
        graph_ops=sum(op.name.startswith("graph.") for op in func.body),
        groups=sum(op.name != "return" for op in function(graph.stages["tensor"]).body),
        arena=memory["arena_bytes"], bound=memory["lower_bound"], unplanned=memory["unplanned_bytes"],
        calls=compilation.graph.calls, extern_calls=compilation.graph.extern_calls,
        llvm=inner_loop(compilation.llvm_ir, kernel_name),
        checks="\n".join([*checks(graph.stages, arguments(found, func), eager), f"| native | | {rounded(out, eager)} |"]),
    )


def source() -> str:
    """The model's part of this file."""
    return re.search(r"# \[model\]\n(.*?)# \[end\]", Path(__file__).read_text(), re.S)[1].rstrip() + "\n"


def function(module: Operation) -> Operation:
    return next(op for op in module.body if op.name == "func")


def text(op: Operation) -> str:
    """The IR, with paths as seen from the repository."""
    return print_op(op).replace(f"{Path(__file__).resolve().parents[1]}/", "")


def arguments(found: LoadedModel, func: Operation) -> list[torch.Tensor]:
    """What the function takes: parameters in the order in which AOTAutograd passes them, matched by shape and kind, and the input."""
    parameters = [p.detach() for p in found.model.parameters()]
    return [parameters.pop(0) if a["kind"] == "param" else found.args[0] for a in func["arg_attrs"]]


def checks(stages: dict[str, Operation], inputs: list[torch.Tensor], eager: torch.Tensor) -> list[str]:
    """A row of the table for each level."""
    rows = []
    for name, module in stages.items():
        same = equivalent(parse_module(print_op(module)), module)
        value = rounded(interpret(module, inputs)[0], eager) if name != "host" else "(the interpreter stops at tile)"
        rows.append(f"| {name} | {'yes' if same else 'NO'} | {value} |")
    return rows


def rounded(value: torch.Tensor, eager: torch.Tensor) -> str:
    """The power of ten below which the difference stays: exact digits differ between machines."""
    difference = (value - eager).abs().max().item()
    return next(f"below 1e-{d}" for d in range(6, -9, -1) if difference < 10.0 ** -d)


def inner_loop(llvm: str, kernel: str, lines: int = 14) -> str:
    """The first lines of the block of the kernel's function that has most multiply-adds."""
    body = next(m for m in re.findall(r"^define .*?^}", llvm, re.S | re.M) if kernel in m.splitlines()[0])
    block = max(re.split(r"\n(?=[\w.\"]+:)", body), key=lambda b: b.count("fmuladd"))
    return "\n".join(block.strip("\n").splitlines()[:lines]) + "\n"


if __name__ == "__main__":
    main()
