"""One ATen operator by itself: the smallest program on which the importer can go wrong."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from ...frontend.importer import import_graph
from ...ir.core import Operation
from .evaluate import run_fx, run_module
from .numerics import Difference, algebra_tolerance, difference

__all__ = ["NodeRepro", "check_node", "node_repro"]


@dataclass(frozen=True)
class NodeRepro:
    """An operator as "aten.name.overload", with its arguments by value."""

    target: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def node_repro(gm: torch.fx.GraphModule, node: torch.fx.Node, arguments: Sequence[Any]) -> NodeRepro | None:
    """The call that `node` makes when the graph runs on `arguments`; None for what is no ATen operator."""
    if node.target is operator.getitem:
        node = node.args[0]  # type: ignore[assignment]
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    known: dict[torch.fx.Node, Any] = {}
    run_fx(gm, arguments, None, known.__setitem__)
    args, kwargs = torch.fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: known[n])
    return NodeRepro(str(node.target), tuple(args), dict(kwargs))


def graph_of(repro: NodeRepro) -> tuple[torch.fx.GraphModule, list[torch.Tensor]]:
    """An FX graph of that call alone, and the tensors that it takes."""
    found: Any = torch.ops
    for part in repro.target.split("."):
        found = getattr(found, part)
    graph = torch.fx.Graph()
    tensors: list[torch.Tensor] = []
    with FakeTensorMode() as mode:
        def placeholder(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            node = graph.placeholder(f"x{len(tensors)}")
            node.meta["val"] = mode.from_tensor(x)
            tensors.append(x)
            return node
        args, kwargs = pytree.tree_map(placeholder, (list(repro.args), repro.kwargs))
        call = graph.call_function(found, tuple(args), kwargs)
        fake = torch.fx.node.map_arg((tuple(args), kwargs), lambda n: n.meta["val"])
        call.meta["val"] = found(*fake[0], **fake[1])
        results: list[torch.fx.Node] = [call]
        if isinstance(call.meta["val"], (tuple, list)):
            results = []
            for i, v in enumerate(call.meta["val"]):
                if isinstance(v, torch.Tensor):
                    item = graph.call_function(operator.getitem, (call, i))
                    item.meta["val"] = v
                    results.append(item)
        graph.output(tuple(results))
    return torch.fx.GraphModule(torch.nn.Module(), graph), tensors


def check_node(repro: NodeRepro) -> tuple[Operation, Difference | None]:
    """The module that the importer makes of the operator, and where it differs from ATen in float64."""
    gm, tensors = graph_of(repro)
    module = import_graph(gm)
    ran = run_fx(gm, tensors, torch.float64)
    want = [x for x in ran[:len(ran) - len(tensors)] if isinstance(x, torch.Tensor)]
    return module, difference(run_module(module, tensors, torch.float64), want, algebra_tolerance(want))
