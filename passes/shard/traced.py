"""A model that is known by its traced ops: blocks as `OpGraph`s, cut over the tensor axis as the integer program says.

Entry points: `TracedKind` (a block with its graph), `traced_config(name, kinds, ...)` -> a `ModelConfig` that the planner takes like any
other; `solve_kinds(...)` for the program alone. Equal blocks are one kind, so the program is solved once per kind and tensor degree,
with the residual stream whole between blocks (sp off) or cut along the sequence (sp on).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from types import MappingProxyType

from .cluster import Cluster
from .collectives import axis_group
from .hashing import hash_once
from .intra_op import IntraProblem, IntraResult, conversion, gemm_sizes, moved_bytes, solve
from .model import ELEMENT, CustomBlocks, ModelConfig, Params, Shard
from .op_graph import OpGraph, OpNode, fused_values
from .workload import BlockWork, Comm, Kernel, Saved

__all__ = ["TracedBlocks", "TracedKind", "cut_words", "solve_kinds", "traced_config"]


@dataclass(frozen=True)
class TracedKind:
    """Equal blocks in a row: kind (`embedding`, `head` or a name), graph, how many, and module paths."""

    kind: str
    graph: OpGraph
    count: int
    paths: tuple[str, ...] = ()


Solved = MappingProxyType[tuple[str, int, bool], IntraResult]


@hash_once
@dataclass(frozen=True)
class TracedBlocks(CustomBlocks):
    """The blocks of a traced model for the planner. solved: per (kind, tensor degree, sp); batch: that was traced."""

    kinds: tuple[TracedKind, ...]
    batch: int
    dtype: str
    solved: Solved = field(hash=False, compare=False)

    def runs(self) -> tuple[tuple[str, int], ...]:
        return tuple((k.kind, k.count) for k in self.kinds)

    def _graph(self, kind: str) -> OpGraph:
        return next(k.graph for k in self.kinds if k.kind == kind)

    def params(self, kind: str) -> Params:
        """Parameters that the program cuts at the highest tensor degree, and those it leaves whole."""
        graph = self._graph(kind)
        degrees = [key for key in self.solved if key[0] == kind and key[1] > 1]
        if not degrees:
            return Params(dense=float(graph.parameters()))
        result = self.solved[max(degrees, key=lambda key: key[1])]
        cut = sum(o.parameter.elements for node, choice in zip(graph.nodes, result.choices, strict=True)
                  for o, need in zip(node.operands, choice.strategy.operands, strict=True) if o.parameter is not None and need.value != "R")
        return Params(dense=float(cut), whole=float(graph.parameters() - cut))

    def work(self, kind: str, micro_batch: int, shard: Shard) -> BlockWork:
        """Kernels, collectives and saved activations on one device; all sizes grow with the micro-batch."""
        graph, scale, ways = self._graph(kind), micro_batch / self.batch, shard.tp
        result = self.solved.get((kind, ways, shard.sp))
        loops = [c.strategy.loop for c in result.choices] if result else [-1] * len(graph.nodes)
        kernels = tuple(k for node, loop in zip(graph.nodes, loops, strict=True) if (k := _kernel(node, graph, loop, ways, scale)))
        comms = tuple(_comms(graph, result, ways, scale)) if result else ()
        saved = tuple(_saved(graph, result, ways, scale))
        if kind in ("embedding", "head"):  # never recomputed
            return BlockWork(kernels, comms, saved, sum(s.nbytes for s in saved))
        stream = graph.values[graph.inputs[0]].nbytes * scale if graph.inputs else 0.0
        return BlockWork(kernels, comms, saved, stream / (ways if result is not None and result.residual != "R" else 1))

    def cut(self, kind: str, kernel: str, shard: Shard) -> str:
        """How the program cuts a GEMM's weight at this degree."""
        graph, result = self._graph(kind), self.solved.get((kind, shard.tp, shard.sp))
        index = next(i for i, node in enumerate(graph.nodes) if _name(node) == kernel)
        return cut_words(graph.nodes[index], result.choices[index].strategy.loop) if result else "whole"


def _name(node: OpNode) -> str:
    return f"{node.path}.{node.name}" if node.path else node.name


def cut_words(node: OpNode, loop: int) -> str:
    """`rows`, `columns`, `whole` or `whole (tokens cut)`: what cutting `loop` does to a GEMM's weight."""
    if loop < 0:
        return "whole"
    if node.loops[loop].kind == "reduction":
        return "rows"
    return "columns" if loop in node.operands[1].dims else "whole (tokens cut)"


def _kernel(node: OpNode, graph: OpGraph, loop: int, ways: int, scale: float) -> Kernel | None:
    if node.free:
        return None
    name = _name(node)
    extents = [v.extent / (ways if i == loop else 1) for i, v in enumerate(node.loops)]
    weight = any(o.parameter is not None for o in node.operands[:2])
    if node.kind in ("gemm", "convolution"):
        batch, m, n, k = gemm_sizes(node, extents)
        sizes = (batch, m * scale, n, k) if weight else (batch * scale, m, n, k)
        return Kernel(name, sizes, weight=weight)
    if node.kind == "attention":
        return Kernel(name, (extents[0] * extents[1] * extents[2] * scale, extents[3], extents[4], extents[5]), fused=True)
    moved = moved_bytes(node, graph, loop, ways) * scale
    return Kernel(name, forward=moved, backward=1.5 * moved) if moved else None


def _comms(graph: OpGraph, result: IntraResult, ways: int, scale: float) -> Iterator[Comm]:
    kept = {o.value for node in graph.nodes for o in node.operands if o.saved}
    makers = {v: _name(node) for node in graph.nodes for v in node.results}
    for value, have, need, _ in result.conversions:
        readers = [_name(node) for node, choice in zip(graph.nodes, result.choices, strict=True)
                   for o, wanted in zip(node.operands, choice.strategy.operands, strict=True) if o.value == value and wanted == need]
        name = f"{makers.get(value, 'input')} to {', '.join(dict.fromkeys(readers)) or 'the next layer'}"
        tensor = graph.values[value]
        for phase, start, end in (("forward", have.value, need.value), ("backward", need.gradient, have.gradient)):
            kind = conversion(start, end) if phase == "forward" or tensor.grad else ""
            if kind:
                size = tensor.nbytes * scale / (ways if kind == "all_to_all" else 1)
                yield Comm(name, kind, "tp", size, phase)
                if phase == "forward" and kind == "all_gather" and value in kept:
                    yield Comm(f"{name} again", kind, "tp", size, "backward", "dgrad")


def _saved(graph: OpGraph, result: IntraResult | None, ways: int, scale: float) -> Iterator[Saved]:
    """Every value that backward reads, once per layout in which it is read. What was gathered is kept in its parts and gathered again
    (`_comms` has that exchange).
    """
    inside = fused_values(graph)
    parts = {(v, need.value): have.value for v, have, need, _ in result.conversions
             if conversion(have.value, need.value) == "all_gather"} if result else {}
    viewed = {v: n.operands[0].value for n in graph.nodes if n.free and n.operands for v in n.results}
    seen = set()
    for index, node in enumerate(graph.nodes):
        for position, operand in enumerate(node.operands):
            if not operand.saved or operand.value < 0 or operand.value in inside:
                continue
            layout = result.choices[index].strategy.operands[position].value if result else "R"
            layout = parts.get((operand.value, layout), layout)
            base = operand.value
            while base in viewed and graph.values[viewed[base]].elements >= graph.values[operand.value].elements:
                base = viewed[base]
            if (base, layout == "R") not in seen:
                seen.add((base, layout == "R"))
                tensor = graph.values[base]
                size = tensor.nbytes + (4 * tensor.elements if node.kind == "loss" else 0)
                yield Saved(f"value{base}", size * scale / (1 if layout == "R" else ways))


def solve_kinds(kinds: Sequence[TracedKind], cluster: Cluster, dtype: str, degrees: Sequence[int], train: bool = True) -> Solved:
    """The program of every kind, degree and sp. What cannot be (the residual stream has no such cut) is left out."""
    found: dict[tuple[str, int, bool], IntraResult] = {}
    for kind in kinds:
        for ways in degrees:
            for sp in (False, True):
                layout = 1 if sp else "R"
                ends = {"embedding": (None, layout), "head": (layout, None)}.get(kind.kind, (layout, None))
                stream = kind.graph.outputs[-1:] if kind.kind == "embedding" else kind.graph.inputs[:1]
                shape = kind.graph.values[stream[0]].shape if stream else ()
                if sp and (len(shape) != 3 or shape[1] % ways):
                    continue
                problem = IntraProblem(kind.graph, cluster.device, axis_group(cluster, 1, ways), dtype=dtype, residual=ends[0], end=ends[1],
                                       train=train, in_flight=0.0)
                found[kind.kind, ways, sp] = _lean(problem)
    return MappingProxyType(found)


def _lean(problem: IntraProblem) -> IntraResult:
    """The answer that cuts nearly all parameters, if there is one: a tensor degree is chosen to save memory as well as time."""
    state = (2 + problem.gradient_bytes + problem.optimizer_bytes) if problem.train else 2
    try:
        return solve(replace(problem, memory=1.1 * state * problem.graph.parameters() / problem.ways + 1e6))
    except ValueError:
        return solve(problem)


def traced_config(name: str, kinds: Sequence[TracedKind], batch: int, cluster: Cluster, dtype: str) -> ModelConfig:
    """A model for the planner. Tensor degrees are the powers of two that fit in a node; `heads` says the highest. Context parallelism and
    selective recomputation need a transformer that the planner knows by its sizes: pin cp=1 and leave them out.

    Raises ValueError for a model without blocks.
    """
    middle = [k for k in kinds if k.kind not in ("embedding", "head")]
    if not middle:
        raise ValueError(f"model {name}: no list of layers was found in it (a ModuleList or Sequential), so there is nothing to plan")
    degrees = [d for d in (2, 4, 8, 16) if d <= cluster.node_size]
    solved = solve_kinds(kinds, cluster, dtype, degrees)
    shape = middle[0].graph.values[middle[0].graph.inputs[0]].shape
    seq = shape[1] if len(shape) == 3 else 1
    unit = ELEMENT[dtype]
    stream = prod(shape[1:]) * middle[0].graph.values[middle[0].graph.inputs[0]].unit / unit
    return ModelConfig(name, hidden=max(1, round(stream / seq)), layers=sum(k.count for k in middle), heads=max([1, *degrees]), vocab=1,
                       seq=seq, tied=False, dtype=dtype, custom=TracedBlocks(tuple(kinds), batch, dtype, solved))
