"""torch's `scan` as a `loop`: its body becomes a private function of the module.

`import_body` is called by the importer; `may_import` says beforehand what is out of the question, and is run from Python instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx

from ..ir.core import Block, Operation, Value
from ..ir.types import TensorType
from .errors import Unsupported

__all__ = ["body_of", "import_body", "is_scan", "may_import"]

ImportBody = Callable[[fx.GraphModule, Block, str], Operation]
"""Imports a graph as a function at the end of a module's block."""


def is_scan(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is torch.ops.higher_order.scan


def body_of(gm: fx.GraphModule, node: fx.Node) -> fx.GraphModule:
    """The graph that a scan runs at every step."""
    named = node.args[0]
    assert isinstance(named, fx.Node)
    owner: Any = gm
    for part in str(named.target).split("."):
        owner = getattr(owner, part)
    return owner


def may_import(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node is a scan on the CPU over something, whose body draws no random numbers."""
    if not is_scan(node) or not node.args[2]:
        return False
    for inner in body_of(gm, node).graph.nodes:
        val = inner.meta.get("val")
        if torch.Tag.nondeterministic_seeded in getattr(inner.target, "tags", ()) or "rand" in str(inner.target):
            return False
        if isinstance(val, torch.Tensor) and val.device.type != "cpu":
            return False
    return True


def import_body(body: fx.GraphModule, block: Block, name: str, carried: Sequence[Value], run: ImportBody) -> Operation:
    """The private function that a loop carrying `carried` runs. Unsupported where native code cannot run it as it is."""
    func = run(_without_clones(body), block, name)
    func.attributes = {k: v for k, v in func.attributes.items() if k not in ("result_attrs", "symbol_args", "symbol_sources", "arg_attrs")}
    func.attributes["private"] = True
    for a in func.body.args:  # each trip is handed rows of row-major memory
        assert isinstance(a.type, TensorType)
        a.type = TensorType(a.type.shape, a.type.dtype)
    for inner in func.walk():
        if inner.name == "graph.extern":
            raise Unsupported(f"a scan whose body calls '{inner['target']}'")
        if inner.name == "graph.assign":
            raise Unsupported("a scan whose body writes to its arguments")
    returned = func.body.terminator.operands
    for i, v in enumerate(carried):
        before, after = v.type, returned[i].type
        assert isinstance(before, TensorType) and isinstance(after, TensorType)
        if (before.shape, before.dtype) != (after.shape, after.dtype):
            raise Unsupported(f"a scan whose carried value {i} changes from {before} to {after}")
    return func


def _without_clones(body: fx.GraphModule) -> fx.GraphModule:
    """A copy that returns what it returned copies of: values have no memory yet, and torch wants no result to be another."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(body.graph, {}))
    copy = fx.GraphModule(body, graph)
    output = next(n for n in copy.graph.nodes if n.op == "output")

    def source(n: fx.Node) -> fx.Node:
        while n.target in (torch.ops.aten.clone.default, torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            n = n.args[0]  # type: ignore[assignment]
        return n

    output.args = (fx.node.map_arg(output.args[0], source),)
    copy.graph.eliminate_dead_code()
    return copy
