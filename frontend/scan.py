"""torch's `scan` as a `loop`: its body becomes a private function of the module.

`import_body` is called by the importer; `may_import` says beforehand what is out of the question, and is run from Python instead.
`mend_gradients` is for torch before 2.13, which loses gradients of scans.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx as fx

from ..ir.core import Block, Operation, Value
from ..ir.types import TensorType
from .errors import Unsupported

__all__ = ["body_of", "import_body", "is_scan", "may_import", "mend_gradients", "unstack_invariants"]

ImportBody = Callable[[fx.GraphModule, Block, str], Operation]
"""Imports a graph as a function at the end of a module's block."""


_LOSES_GRADIENTS = tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 13)


def mend_gradients(gm: fx.GraphModule) -> None:
    """Lets the scans of Dynamo's graph be differentiated rightly by torch before 2.13, in place.

    There a carried value whose initial one needs no gradient (zeros, say) is taken to need none in any step, and what reaches inputs and weights
    through earlier steps is lost without a word, in eager too. torch 2.13 does what `_scan` does (its `scan_autograd` says so).
    """
    if not _LOSES_GRADIENTS:
        return
    for inner in [m for m in gm.modules() if isinstance(m, fx.GraphModule)]:
        found = [n for n in inner.graph.nodes if is_scan(n)]
        for node in found:
            node.target = _scan
        if found:
            inner.recompile()


def _scan(body: Any, init: Sequence[Any], xs: Sequence[Any], more: Sequence[Any]) -> Any:
    """scan, all of whose floating operands need a gradient if any does. (Of one that does not, torch 2.11 returns the gradient 0 of a step as
    something saved, and says that the scan might be aliasing.)"""
    if torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in (*init, *xs, *more)):
        init, xs, more = (tuple(t.detach().requires_grad_() if _lacks_gradient(t) else t for t in given) for given in (init, xs, more))
    return torch.ops.higher_order.scan(body, tuple(init), tuple(xs), tuple(more))


def _lacks_gradient(t: Any) -> bool:
    return isinstance(t, torch.Tensor) and not t.requires_grad and (t.is_floating_point() or t.is_complex())


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


# -- what a scan stacks once per step though it never changes ---------------------------------------------------------------------

_VIEWS = {torch.ops.aten.t.default, torch.ops.aten.transpose.int, torch.ops.aten.permute.default, torch.ops.aten.clone.default,
          torch.ops.aten.detach.default, torch.ops.aten.alias.default}


def unstack_invariants(gm: fx.GraphModule) -> None:
    """Results of scans that are the same in every step become one expanded value, before the graph is parted into forward and backward.

    torch saves what the gradient of a step needs once per step; a transposed weight is such a value.
    """
    graph = gm.graph
    for node in [n for n in graph.nodes if is_scan(n)]:
        _, init, xs, more = node.args
        outputs = next(n for n in body_of(gm, node).graph.nodes if n.op == "output").args[0]
        inputs = [n for n in body_of(gm, node).graph.nodes if n.op == "placeholder"]
        outside = dict(zip(inputs[len(init) + len(xs):], more, strict=True))  # type: ignore[arg-type]
        for user in list(node.users):
            j = user.args[1]
            if user.target is not operator.getitem or j < len(init):  # type: ignore[arg-type,operator]
                continue
            chain, source = [], outputs[j]
            while source.target in _VIEWS:
                chain.append(source)
                source = source.args[0]
            value = outside.get(source)
            if not isinstance(value, fx.Node):
                continue
            with graph.inserting_before(user):
                for step in reversed(chain):
                    if step.target is not torch.ops.aten.clone.default:
                        value = _call(graph, step.target, value, *step.args[1:])
                value = _call(graph, torch.ops.aten.unsqueeze.default, value, 0)
                value = _call(graph, torch.ops.aten.expand.default, value, list(user.meta["val"].shape))
            user.replace_all_uses_with(value)
            graph.erase_node(user)


def _call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    made = graph.call_function(target, args)
    made.meta["val"] = target(*(a.meta["val"] if isinstance(a, fx.Node) else a for a in args))
    return made
