"""Cuts an exported forward graph into the parts of a pipeline.

    parts = cut_stages(exported, counts)        # blocks per part, as in a plan's `split`
    parts[p].exported                           # the part's graph: its parameters, the inputs it reads, activations in; activations out

Blocks are found by module path: the ModuleList whose members have the most entries. What comes before the first block goes with the
first part, what comes after the last with the last, the loss included. Values that depend on no parameter (masks, positions) are computed
anew in every part that reads them; the others cross from part to part, through all parts in between.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.fx as fx

from ..errors import UserError
from .joint import Argument, Exported

__all__ = ["StagePart", "block_count", "cut_stages", "even_counts"]

_NUMBERED = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True)
class StagePart:
    """inputs: for each 'input' argument of `exported`, its number among the whole model's; received, sent: how many activations come in
    (they are the last arguments) and go out.
    """

    exported: Exported
    inputs: tuple[int, ...]
    received: int
    sent: int


def _path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return next(reversed(stack.values()))[0] if stack else ""


def _blocks(graph: fx.Graph) -> dict[fx.Node, int]:
    """The block that a node is part of, for nodes inside blocks."""
    members: dict[str, dict[int, list[fx.Node]]] = {}
    for node in graph.nodes:
        path = str(_path(node))
        found = _NUMBERED.search(path)
        if node.op == "call_function" and found is not None:
            members.setdefault(path[:found.start()], {}).setdefault(int(found.group(1)), []).append(node)
    if not members:
        return {}
    best = max(members.values(), key=len)
    return {node: rank for rank, (_, nodes) in enumerate(sorted(best.items())) for node in nodes}


def block_count(exported: Exported) -> int:
    """How many repeated blocks the model has."""
    blocks = _blocks(exported.graph.graph)
    return 1 + max(blocks.values(), default=-1)


def even_counts(blocks: int, parts: int) -> tuple[int, ...]:
    """Blocks per part, as even as possible; the outer parts, which hold embedding and head, are the first to get fewer."""
    base, extra = divmod(blocks, parts)
    order = [*range(1, parts - 1), 0, parts - 1] if parts > 1 else [0]
    more = set(order[:extra])
    return tuple(base + (i in more) for i in range(parts))


def cut_stages(exported: Exported, counts: Sequence[int]) -> list[StagePart]:
    """See the module docstring. UserError if the model has no blocks, or not as many as `counts` add up to."""
    graph = exported.graph.graph
    blocks = _blocks(graph)
    total = 1 + max(blocks.values(), default=-1)
    if total != sum(counts):
        raise UserError(f"the plan splits {sum(counts)} blocks over {len(counts)} parts; {total} repeated blocks were found in the model")
    part = _parts(graph, blocks, counts)
    cheap = _cheap(graph, exported.arguments)
    last = len(counts) - 1
    crossing: list[list[fx.Node]] = [[] for _ in range(len(counts) + 1)]  # crossing[p]: what part p receives
    for node in graph.nodes:
        if node.op != "call_function" or node in cheap:
            continue
        furthest = max((last if u.op == "output" else part[u] for u in node.users), default=part[node])
        for p in range(part[node] + 1, furthest + 1):
            crossing[p].append(node)
    return [_Part(exported, graph, part, cheap, p, crossing[p], crossing[p + 1] if p < last else None).build() for p in range(len(counts))]


def _parts(graph: fx.Graph, blocks: dict[fx.Node, int], counts: Sequence[int]) -> dict[fx.Node, int]:
    """The part of every computed node: it goes up where the first node of a part's first block comes."""
    first: list[int] = []
    for i in range(len(counts)):
        first.append(sum(counts[:i]))
    part: dict[fx.Node, int] = {}
    current = 0
    for node in graph.nodes:
        if node in blocks:
            while current + 1 < len(counts) and blocks[node] >= first[current + 1] and counts[current + 1] > 0:
                current += 1
        if node.op == "call_function":
            part[node] = current
    return part


def _cheap(graph: fx.Graph, arguments: Sequence[Argument]) -> set[fx.Node]:
    """Nodes that depend on no parameter."""
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    found = {n for n, a in zip(placeholders, arguments, strict=True) if a.kind != "param"}
    for node in graph.nodes:
        if node.op in ("call_function", "get_attr") and all(n in found for n in node.all_input_nodes):
            found.add(node)
    return found


class _Part:
    def __init__(self, exported: Exported, graph: fx.Graph, part: dict[fx.Node, int], cheap: set[fx.Node], p: int,
                 received: list[fx.Node], sent: list[fx.Node] | None):
        self.exported, self.graph, self.part, self.cheap, self.p = exported, graph, part, cheap, p
        self.received, self.sent = received, sent
        self.new = fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}

    def build(self) -> StagePart:
        output = next(n for n in self.graph.nodes if n.op == "output")
        results: list[Any] = list(output.args[0]) if self.sent is None else list(self.sent)  # type: ignore[arg-type]
        needed = self._needed([n for n in results if isinstance(n, fx.Node)])
        arguments: list[Argument] = []
        inputs: list[int] = []
        placeholders = [n for n in self.graph.nodes if n.op == "placeholder"]
        number = 0
        for node, a in zip(placeholders, self.exported.arguments, strict=True):
            if node in needed:
                self.env[node] = self._placeholder(node)
                arguments.append(a)
                if a.kind == "input":
                    inputs.append(number)
            number += a.kind == "input"
        for node in self.received:
            val = node.meta["val"]
            self.env[node] = self._placeholder(node)
            arguments.append(Argument("input", node.name, tuple(int(s) for s in val.shape), val.dtype))
        for node in self.graph.nodes:
            if node in needed and node not in self.env:
                self.env[node] = self.new.node_copy(node, lambda n: self.env[n])
        self.new.output(tuple(self.env[n] if isinstance(n, fx.Node) else n for n in results))
        module = fx.GraphModule(self.exported.graph, self.new)
        return StagePart(Exported(module, arguments, self.exported.constants, len(results)), tuple(inputs), len(self.received), len(results))

    def _placeholder(self, node: fx.Node) -> fx.Node:
        made = self.new.placeholder(node.name)
        made.meta = dict(node.meta)
        return made

    def _needed(self, results: list[fx.Node]) -> set[fx.Node]:
        """Everything that the results need and this part computes, up to what it receives."""
        stop, found, wanted = set(self.received), set(), list(results)
        while wanted:
            node = wanted.pop()
            if node in found or node in stop:
                continue
            found.add(node)
            wanted.extend(node.all_input_nodes)
        return found

