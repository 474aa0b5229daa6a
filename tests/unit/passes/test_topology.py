"""The order of ops after some have moved."""

from __future__ import annotations

import random

import networkx as nx
import pytest
from aicc.ir import DTYPES, Block, Builder, IRError, Operation, ScalarType
from aicc.passes.topology import topological_sort

F32 = ScalarType(DTYPES["f32"])


def shuffled(seed: int) -> tuple[Block, list[Operation], nx.DiGraph]:
    """A block of sums in no order, as it stands, and who needs whom."""
    rng = random.Random(seed)
    block = Block([F32])
    builder = Builder(block)
    values, graph = [block.args[0]], nx.DiGraph()
    made: list[Operation] = []
    for _ in range(rng.randint(1, 30)):
        made.append(builder.create("arith.add", [rng.choice(values), rng.choice(values)], {}, [F32]))
        values.append(made[-1].result)
    rng.shuffle(made)
    for op in made:
        op.detach()
    for op in made:
        block.append(op)
    graph.add_nodes_from(made)
    graph.add_edges_from((v.defining_op, op) for op in made for v in op.operands if v.defining_op is not None)
    return block, made, graph


@pytest.mark.parametrize("seed", range(40))
def test_the_first_that_may_comes_next(seed: int) -> None:
    block, stood, graph = shuffled(seed)
    wanted = list(nx.lexicographical_topological_sort(graph, key=stood.index))
    topological_sort(block)
    assert block.ops == wanted
    topological_sort(block)
    assert block.ops == wanted


def test_a_circle_is_named() -> None:
    block, _, _ = shuffled(1)
    first, *_, last = sorted(block.ops, key=lambda op: len(nx.ancestors(nx.DiGraph(
        [(v.defining_op, o) for o in block.ops for v in o.operands if v.defining_op is not None] + [(op, op)]), op)))
    first.set_operands([last.result, last.result])
    last.set_operands([first.result, first.result])
    with pytest.raises(IRError, match="in a circle, one of them is 'arith.add'"):
        topological_sort(block)
