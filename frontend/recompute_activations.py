"""Activations that products of the backward pass read again are computed again, where what they follow from is kept anyway.

    recompute_activations(joint, num_fwd_outputs)    # in place, before the joint graph is partitioned; how many there were

The gradient of a weight reads the layer's input: GELU(x), SiLU(g) * u. torch's min-cut keeps such a tensor, for a product wants it in memory in the
backward pass too, even where x is kept beside it, for the gradient of that function. Then it is memory for nothing but an elementwise pass: the
kernel that computes the function's gradient has read all that it needs, and writes it along. So the backward pass gets its own copy of these ops.
A norm's result is kept: its gradient has sums of rows, which come before all else, so that it would be a pass over memory of its own.

A value is computed again if the way back from it, over pointwise ops, ends at arguments and at values that the backward pass reads in other places as
well, after at most DEPTH ops.
"""

from __future__ import annotations

import torch
import torch.fx as fx

from .recompute import ancestors, is_pointwise

__all__ = ["recompute_activations"]

aten = torch.ops.aten
DEPTH = 8
LEAST = 1 << 16
"""Elements of a value that is worth it."""
_VIEWS = {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.permute.default, aten.t.default, aten.transpose.int,
          aten.expand.default, aten.unsqueeze.default, aten.alias.default}
_PRODUCTS = {aten.mm.default, aten.bmm.default, aten.addmm.default}
_SUMS = {aten.mean.dim, aten.sum.dim_IntList, aten.var_mean.correction, aten.var.correction}
"""Of rows, in norms that are spelled out: small values, kept if the backward pass reads them."""


def recompute_activations(joint: fx.GraphModule, num_fwd_outputs: int) -> int:
    """See the module docstring. `joint`: the graph whose first `num_fwd_outputs` outputs are the forward pass's."""
    graph = joint.graph
    outputs, = graph.output_node().args
    forward = ancestors(n for n in outputs[:num_fwd_outputs] if isinstance(n, fx.Node))  # type: ignore[index, union-attr]
    returned = set(graph.output_node().all_input_nodes)
    count = 0
    for node in [n for n in graph.nodes if n in forward]:
        family = _views_of(node, forward) if node.op == "call_function" and node.target not in _VIEWS else []
        readers = [(v, u) for v in family for u in v.users if u not in forward and u.op != "output"]
        if not readers or returned & set(family) or not _large(node) or not all(_feeds_products(u) for _, u in readers):
            continue
        cone = _cone(node, forward)
        if cone:
            _copy(graph, cone, family, readers)
            count += 1
    if count:
        graph.eliminate_dead_code()
        joint.recompile()
    return count


def _large(n: fx.Node) -> bool:
    value = n.meta.get("val")
    return isinstance(value, torch.Tensor) and all(isinstance(s, int) for s in value.shape) and value.numel() >= LEAST and value.is_floating_point()


def _views_of(n: fx.Node, forward: set[fx.Node]) -> list[fx.Node]:
    """The node and the forward pass's views of it, sources first."""
    found = [n]
    for v in found:
        found += [u for u in v.users if u in forward and u.target in _VIEWS and u not in found]
    return found


def _feeds_products(n: fx.Node) -> bool:
    """A product, or a view that only products read."""
    return n.target in _PRODUCTS or (n.target in _VIEWS and bool(n.users) and all(_feeds_products(u) for u in n.users))


def _cone(node: fx.Node, forward: set[fx.Node]) -> list[fx.Node]:
    """The ops to be repeated for `node`, in order; none if something is missing in the backward pass."""
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        n = stack.pop()
        if n in found:
            continue
        if not _repeats(n) or len(found) >= DEPTH:
            return []
        found.add(n)
        stack += [a for a in n.all_input_nodes if a not in found and not (a is not node and _kept(a, forward, found))]
    return [n for n in node.graph.nodes if n in found]


def _repeats(n: fx.Node) -> bool:
    if n.op != "call_function" or n.target in _SUMS or torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ()):
        return False
    return n.target in _VIEWS or is_pointwise(n)


def _kept(n: fx.Node, forward: set[fx.Node], repeated: set[fx.Node]) -> bool:
    """An argument, or there in the backward pass for other readers than products' operands."""
    if n.op in ("placeholder", "get_attr"):
        return True
    return any(u not in forward and u.op != "output" and not _feeds_products(u) for u in n.users)


def _copy(graph: fx.Graph, cone: list[fx.Node], family: list[fx.Node], readers: list[tuple[fx.Node, fx.Node]]) -> None:
    """Lets the readers read copies of the cone and of the views in between."""
    copies: dict[fx.Node, fx.Node] = {}
    wanted = ancestors(v for v, _ in readers)
    for n in [*cone, *(v for v in family[1:] if v in wanted)]:
        with graph.inserting_after(n):
            copies[n] = graph.node_copy(n, lambda a: copies.get(a, a))
            copies[n].meta = dict(n.meta)
    for v, u in readers:
        u.replace_input_with(v, copies[v])
