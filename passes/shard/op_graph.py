"""A block of a model as ops over loops, and the ways in which one mesh axis may cut each op.

Entry points: `OpGraph`, `OpNode`, `strategies(node, ways)`, `conversion(kind pair)`.

An op is described like an einsum: loops with extents, and for every operand and result the loop that each of its dimensions runs over
(-1: none, the dimension is whole). A loop is `parallel` (it is in the result), a `reduction` (it is summed over, so a cut leaves partial
sums) or `whole` (it cannot be cut: the dimension that a softmax or a norm runs over). This one row per op says all that is needed: cutting
a parallel loop cuts the operands that have it and leaves the gradient of the others in partial sums, cutting a reduction leaves the result in
partial sums, and no cut replicates.

A layout of a tensor on the axis is `R` (whole on every rank), `P` (partial sums) or a dimension's number (cut along it). Values and
gradients have one each.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache

from .hashing import hash_once

__all__ = ["Layout", "Loop", "Need", "OpGraph", "OpNode", "Operand", "Strategy", "Tensor", "fused_values", "graph_hash", "strategies"]

Layout = int | str  # a dimension, "R" or "P"


@dataclass(frozen=True)
class Tensor:
    """A value: its shape, bytes per element, whether gradients flow to it, and whether it grows with the batch."""

    shape: tuple[int, ...]
    unit: int = 2
    grad: bool = True

    @property
    def elements(self) -> int:
        n = 1
        for extent in self.shape:
            n *= extent
        return n

    @property
    def nbytes(self) -> int:
        return self.elements * self.unit


@dataclass(frozen=True)
class Loop:
    """extent: how many steps. kind: parallel, reduction or whole."""

    extent: int
    kind: str


@dataclass(frozen=True)
class Operand:
    """value: index in the graph's values, or -1 for a parameter of this op's own, whose tensor is given. dims: loop per dimension.
    saved: the backward pass reads it again.
    """

    value: int
    dims: tuple[int, ...]
    saved: bool = False
    parameter: Tensor | None = None


@dataclass(frozen=True)
class OpNode:
    """One op. kind: gemm, convolution, attention, lookup (moves its result twice), loss (keeps its input
    in fp32 too) or memory (bound by bytes). results: indices of the values it makes, all over the same loops.
    result_dims: loop per dimension of the first result. path: the module that it is in.
    """

    name: str
    kind: str
    loops: tuple[Loop, ...]
    operands: tuple[Operand, ...]
    results: tuple[int, ...]
    result_dims: tuple[int, ...]
    path: str = ""
    free: bool = False  # a view: nothing moves


@hash_once
@dataclass(frozen=True)
class OpGraph:
    """Nodes in order. inputs: values from outside; the first is the residual stream, and the last of `outputs` is what becomes of it."""

    values: tuple[Tensor, ...]
    nodes: tuple[OpNode, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def parameters(self) -> int:
        """Elements of all parameters."""
        return sum(o.parameter.elements for n in self.nodes for o in n.operands if o.parameter is not None)


def graph_hash(graph: OpGraph) -> str:
    """Equal for blocks that compute the same: names and module paths do not count."""
    rows = [(n.kind, n.loops, n.operands, n.results, n.result_dims, n.free) for n in graph.nodes]
    return hashlib.sha256(repr((graph.values, rows, graph.inputs, graph.outputs)).encode()).hexdigest()[:16]


@lru_cache(maxsize=256)
def fused_values(graph: OpGraph) -> frozenset[int]:
    """Values that never reach memory, because the memory-bound ops that make and read them are one kernel."""
    maker = {v: n for n in graph.nodes for v in n.results}
    readers: dict[int, list[OpNode]] = {}
    for node in graph.nodes:
        for operand in node.operands:
            readers.setdefault(operand.value, []).append(node)
    return frozenset(v for v, node in maker.items() if node.kind == "memory" and not node.free and v not in graph.outputs
                     and readers.get(v) and all(r.kind == "memory" for r in readers[v]))


@dataclass(frozen=True)
class Need:
    """A value's layout and its gradient's at one end of an edge."""

    value: Layout
    gradient: Layout


@dataclass(frozen=True)
class Strategy:
    """One way to cut an op. loop: the loop that is cut, -1 for none. operands: what each must look like and what its gradient comes as.
    result: what comes out and what its gradient must look like.
    """

    loop: int
    operands: tuple[Need, ...]
    result: Need


def strategies(node: OpNode, ways: int) -> tuple[Strategy, ...]:
    """Every way to cut `node` over `ways` ranks: not at all, or along a loop whose extent `ways` divides."""
    whole = Need("R", "R")
    found = [Strategy(-1, tuple(whole for _ in node.operands), whole)]
    for index, loop in enumerate(node.loops):
        if loop.kind == "whole" or loop.extent % ways or loop.extent < ways:
            continue
        operands = tuple(Need(o.dims.index(index), o.dims.index(index)) if index in o.dims else
                         Need("R", "P" if loop.kind == "parallel" else "R") for o in node.operands)
        result = Need("P", "R") if loop.kind == "reduction" else Need(node.result_dims.index(index), node.result_dims.index(index))
        found.append(Strategy(index, operands, result))
    return tuple(found)
