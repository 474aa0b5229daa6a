"""The forward and backward graphs that the backend makes of a function, lowered but not run.

    graphs = training_graphs(f, inputs, target)      # {"forward": module, "backward": module}, at the host level
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from aicc import passes  # noqa: F401  (registers them)
from aicc.compiler.dynamo import aot_backend
from aicc.compiler.options import Options
from aicc.compiler.pipelines import STAGES, pipeline
from aicc.frontend.importer import import_graph
from aicc.ir import Operation, Target
from aicc.ir.passes import PassContext, parse_pipeline, run_pipeline
from functorch.compile import make_boxed_func

__all__ = ["kernels_of", "lower", "streams_of", "training_graphs"]


def lower(module: Operation, target: Target, upto: str = "host") -> Operation:
    for stage in STAGES[:STAGES.index(upto) + 1]:
        run_pipeline(module, parse_pipeline(pipeline(stage, target, Options())), PassContext(target))
    return module


def training_graphs(f: Callable[..., Any], inputs: Sequence[Any], target: Target, upto: str = "host") -> dict[str, Operation]:
    """The graphs of one call of `f` and its backward pass by role, lowered for `target`; nothing is computed."""
    made: dict[str, Operation] = {}

    def compiler(role: str) -> Callable[..., Any]:
        def compile_one(gm: torch.fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
            made[role] = lower(import_graph(gm), target, upto)
            return make_boxed_func(lambda *_: [_zeros(n) for n in gm.graph.output_node().args[0]])
        return compile_one

    torch._dynamo.reset()
    torch.compile(f, backend=aot_backend(compiler))(*inputs).sum().backward()
    return made


def _zeros(n: Any) -> Any:
    val = n.meta["val"] if isinstance(n, torch.fx.Node) else n
    return torch.empty_strided(val.shape, val.stride(), dtype=val.dtype).zero_() if isinstance(val, torch.Tensor) else val


def kernels_of(module: Operation) -> list[str]:
    """Names of the groups that become kernels, at the tensor level."""
    return [op["kernel"] for op in module.walk() if op.name == "tensor.fused"]


def streams_of(module: Operation) -> list[str]:
    """Of each stream "firsts + seconds [reductions]", at the tensor level."""
    found = [op["why"].removeprefix("streams ") for op in module.walk() if op.name == "tensor.fused" and op["why"]]
    return sorted(f"{w.split(' contractions')[0]} [{w.split('[')[1].split(']')[0]}]" for w in found)
