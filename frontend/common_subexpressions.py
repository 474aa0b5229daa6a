"""Common subexpressions of a joint forward and backward graph, before it is partitioned.

torch's own pass (`torch._functorch.compile_utils.fx_graph_cse`) imports most of Inductor, over a second at the first training
step. This one is as careful: what writes, draws random numbers, calls graphs or gives memory to a result is left alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

__all__ = ["merge_common_subexpressions"]

_TAGS = ("recompute", "ac_graph_id", "partitioner_tag")
"""Checkpointing decides by these what is computed again: nodes that differ in them are not the same."""


def merge_common_subexpressions(graph: fx.Graph) -> int:
    """Replaces each pure node by an earlier one with the same operator and arguments. How many were."""
    returned = {_storage(n) for n in graph.output_node().all_input_nodes} - {None}
    seen: dict[Any, fx.Node] = {}
    merged = writes = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if node.target._schema.is_mutable:
            writes += 1  # what was read before is another value than what is read after
            continue
        if not _is_pure(node) or _storage(node) in returned:
            continue
        key = (node.target, writes, _hashable((node.args, node.kwargs)), tuple(str(node.meta.get(t)) for t in _TAGS))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
            merged += 1
    return merged


def _is_pure(node: fx.Node) -> bool:
    return (isinstance(node.meta.get("val"), torch.Tensor) and "unbacked_bindings" not in node.meta
            and torch.Tag.nondeterministic_seeded not in node.target.tags  # type: ignore[union-attr]
            and not str(node.target).startswith(("aten.empty", "aten.new_empty")) and not node.is_impure())


def _storage(node: fx.Node) -> int | None:
    """The identity of the memory of a node's value; several results count as none."""
    val = node.meta.get("val")
    try:
        return val.untyped_storage()._cdata if isinstance(val, torch.Tensor) else None
    except NotImplementedError:
        return None


def _hashable(args: Any) -> Any:
    leaves, spec = pytree.tree_flatten(args)
    return (str(spec), *((type(a), a.node.expr if isinstance(a, (torch.SymInt, torch.SymFloat, torch.SymBool)) else a) for a in leaves))
