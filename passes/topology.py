"""Putting the ops of a block back into a valid order."""

from __future__ import annotations

import networkx as nx

from ..ir import Block, IRError, Operation, Trait


def topological_sort(block: Block) -> None:
    """Reorders the ops of `block` so that definitions come before uses, otherwise keeping the given order.

    IRError if the ops depend on each other in a circle.
    """
    ops = block.ops
    position = {op: i for i, op in enumerate(ops)}
    graph = nx.DiGraph()
    graph.add_nodes_from(ops)
    for op in ops:
        graph.add_edges_from((v.defining_op, op) for inner in op.walk() for v in inner.operands
                             if v.defining_op in position and v.defining_op is not op)
    terminator = ops[-1] if ops and ops[-1].has_trait(Trait.Terminator) else None
    if terminator is not None:
        graph.remove_node(terminator)
    try:
        order: list[Operation] = list(nx.lexicographical_topological_sort(graph, key=position.__getitem__))
    except nx.NetworkXUnfeasible:
        stuck = nx.find_cycle(graph)[0][0]
        raise IRError(f"ops depend on each other in a circle, one of them is '{stuck.name}' at {stuck.location}") from None
    for op in ops:
        op.detach()
    for op in [*order, *([terminator] if terminator is not None else [])]:
        block.append(op)
