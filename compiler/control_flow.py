"""Graphs with control flow in them: `cond`, `while_loop`, `scan`, `map` and torch's other operators that take graphs.

    run = compile_pieces(gm, compile_one, decompositions)

A `scan` on the CPU whose body is compiled whole is part of the graph: its loop is native (`frontend/scan.py`). The others are run in
Python, through torch's own dense implementation, with branches and bodies compiled like any other graph, as is all between two
of them. So such a loop costs a Python call per trip and kind of graph, and no operator is left to ATen because it stands beside a loop.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
from torch._guards import detect_fake_mode
from torch._ops import HigherOrderOperator
from torch.fx.experimental.proxy_tensor import make_fx

from ..frontend.errors import UnsupportedError
from ..frontend.importer import import_graph
from ..frontend.scan import body_of, may_import

__all__ = ["PieceCompiler", "compile_pieces", "has_control_flow"]

Table = Mapping[Any, Callable[..., Any]]
PieceCompiler = Callable[[fx.GraphModule, str, "list[fx.Node | None]"], Callable[..., Any]]
"""Compiles a graph called by a name; for each of its placeholders the one of the whole graph that it is, or None. Boxed."""

_ORDERED = torch.ops.higher_order.with_effects
_NATIVE = "aicc_native"
_COMPILED_BODIES = {"cond", "while_loop", "while_loop_stack_output", "scan", "map_impl", "invoke_subgraph"}
"""Operators that only call the graphs they are given. The others may transform them (vmap), and get them as they are."""


def has_control_flow(gm: fx.GraphModule) -> bool:
    return any(_is_control(n) for n in gm.graph.nodes)


def _is_control(node: fx.Node) -> bool:
    """An operator that takes graphs, and is no native loop."""
    return (node.op == "call_function" and isinstance(node.target, HigherOrderOperator) and node.target is not _ORDERED
            and not node.meta.get(_NATIVE))


def _mark_native(gm: fx.GraphModule, table: Table) -> None:
    """Scans that the importer takes are marked; their bodies are taken apart as the graph around them was."""
    for node in gm.graph.nodes:
        if not may_import(gm, node):
            continue
        name = str(node.args[0].target)
        body, decomposed = body_of(gm, node), _decomposed(body_of(gm, node), table)
        setattr(gm, name, decomposed)
        try:
            import_graph(_alone(gm, node))
            node.meta[_NATIVE] = True
        except UnsupportedError:
            setattr(gm, name, body)


def _alone(gm: fx.GraphModule, node: fx.Node) -> fx.GraphModule:
    """A graph of nothing but the node."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for a in node.all_input_nodes:
        copies[a] = graph.get_attr(str(a.target)) if _is_graph(gm, a) else graph.placeholder(a.name)
        copies[a].meta = dict(a.meta)
    made = graph.node_copy(node, copies.__getitem__)
    graph.output((graph.call_function(operator.getitem, (made, 0)),))
    return fx.GraphModule(gm, graph)


@dataclass
class _Step:
    """One call: `run` of the values of `inputs`; what it returns are the values of `outputs`. Then `dead` values are dropped."""

    run: Callable[[list[Any]], Sequence[Any]]
    inputs: list[fx.Node]
    outputs: list[fx.Node]
    dead: list[fx.Node] = field(default_factory=list)


class _Pieces:
    """The compiled graph: takes a list of arguments (which it empties) and returns a list."""

    def __init__(self, placeholders: list[fx.Node], steps: list[_Step], result: Any):
        self._boxed_call = True
        self._placeholders, self._steps, self._result = placeholders, steps, result

    def __call__(self, *args: Any) -> Any:
        given = args[0] if len(args) == 1 and type(args[0]) is list else list(args)
        values = dict(zip(self._placeholders, given, strict=True))
        given.clear()
        for step in self._steps:
            made = step.run([values[n] for n in step.inputs])
            values.update(zip(step.outputs, made, strict=True))
            for node in step.dead:
                values.pop(node, None)
        return fx.node.map_arg(self._result, lambda n: values[n])


def compile_pieces(gm: fx.GraphModule, compile_one: PieceCompiler, table: Table) -> Callable[..., Any]:
    """Compiles `gm` piece by piece; without control flow it is one piece. `table` has the decompositions, for graphs within."""
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    _mark_native(gm, table)
    if not has_control_flow(gm):
        return compile_one(gm, "", list(placeholders))
    output = next(n for n in gm.graph.nodes if n.op == "output")
    steps: list[_Step] = []
    for k, part in enumerate(_parts(gm)):
        if isinstance(part, fx.Node):
            steps.append(_control_step(gm, part, compile_one, table))
        else:
            steps.append(_compiled_step(gm, part, f"part{k}", placeholders, compile_one))
    _mark_dead(steps, output)
    return _Pieces(placeholders, steps, output.args[0])


def _parts(gm: fx.GraphModule) -> Iterator[fx.Node | list[fx.Node]]:
    """Control nodes, and the runs of other nodes between them, in order."""
    run: list[fx.Node] = []
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output") or _is_graph(gm, node) or _is_item_of_control(node):
            continue
        if not _is_control(node):
            run.append(node)
            continue
        if run:
            yield run
        yield node
        run = []
    if run:
        yield run


def _is_graph(gm: fx.GraphModule, node: fx.Node) -> bool:
    return node.op == "get_attr" and isinstance(_attribute(gm, node), fx.GraphModule)


def _attribute(gm: fx.GraphModule, node: fx.Node) -> Any:
    owner: Any = gm
    for part in str(node.target).split("."):
        owner = getattr(owner, part)
    return owner


def _is_item_of_control(node: fx.Node) -> bool:
    while node.op == "call_function" and node.target is operator.getitem:
        node = node.args[0]  # type: ignore[assignment]
        if _is_control(node):
            return True
    return False


# -- compiled pieces -------------------------------------------------------------------------------------------------------------

def _compiled_step(gm: fx.GraphModule, nodes: list[fx.Node], name: str, placeholders: list[fx.Node], compile_one: PieceCompiler) -> _Step:
    inside = set(nodes)
    inputs = list(dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in inside and not _is_graph(gm, a)))
    inputs += [p for p in placeholders if p not in inputs and isinstance(p.meta.get("val"), torch.SymInt)]  # sizes that shapes may name
    outputs = [n for n in nodes if any(user not in inside for user in n.users)]
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in dict.fromkeys(a for n in nodes for a in n.all_input_nodes if _is_graph(gm, a)):
        copies[node] = graph.get_attr(str(node.target))
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[n] for n in outputs))
    compiled = compile_one(fx.GraphModule(gm, graph), name, [n if n.op == "placeholder" else None for n in inputs])
    return _Step(compiled, inputs, outputs)


# -- control flow ----------------------------------------------------------------------------------------------------------------

def _control_step(gm: fx.GraphModule, node: fx.Node, compile_one: PieceCompiler, table: Table) -> _Step:
    """The operator itself, and the items taken out of what it returns."""
    target: Any = node.target
    graphs: dict[fx.Node, Any] = {}
    for a in node.all_input_nodes:
        if _is_graph(gm, a):
            graphs[a] = _attribute(gm, a)
            if target.name() in _COMPILED_BODIES:
                body = _decomposed(graphs[a], table)
                graphs[a] = _function(body, compile_pieces(body, _named(compile_one, str(a.target)), table))
        elif a.op == "get_attr":
            graphs[a] = _attribute(gm, a)
    inputs = [a for a in node.all_input_nodes if a not in graphs]
    outputs, paths = [node], [()]
    for value, path in ((v, p) for v, p in _items(node)):
        outputs.append(value)
        paths.append(path)

    def run(values: list[Any]) -> list[Any]:
        known = {**graphs, **dict(zip(inputs, values, strict=True))}
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():  # autograd has its own graph for the backward pass
            made = target(*args, **kwargs)
        return [_at(made, path) for path in paths]

    return _Step(run, inputs, outputs)


def _decomposed(body: fx.GraphModule, table: Table) -> fx.GraphModule:
    """AOTAutograd does not take apart what the gradients of bodies consist of: done here."""
    if not any(n.target in table for n in body.graph.nodes):
        return body
    values = [n.meta["val"] for n in body.graph.nodes if n.op == "placeholder"]
    mode = detect_fake_mode(values)
    with nullcontext() if mode is None else mode:
        return make_fx(body, decomposition_table=dict(table))(*values)


def _named(compile_one: PieceCompiler, prefix: str) -> PieceCompiler:
    return lambda gm, name, origins: compile_one(gm, f"{prefix}_{name}" if name else prefix, [None] * len(origins))


def _items(node: fx.Node, path: tuple[Any, ...] = ()) -> Iterator[tuple[fx.Node, tuple[Any, ...]]]:
    for user in node.users:
        if user.op == "call_function" and user.target is operator.getitem and user.args[0] is node:
            yield user, (*path, user.args[1])
            yield from _items(user, (*path, user.args[1]))


def _at(value: Any, path: tuple[Any, ...]) -> Any:
    for i in path:
        value = value[i]
    return value


def _function(body: fx.GraphModule, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled body with the signature of `body`: several results are a tuple."""
    returned = next(n for n in body.graph.nodes if n.op == "output").args[0]
    if isinstance(returned, (tuple, list)):
        return lambda *args: tuple(compiled(list(args)))
    return lambda *args: compiled(list(args))[0]


def _mark_dead(steps: list[_Step], output: fx.Node) -> None:
    """Each value goes after the last step that reads it."""
    needed = set(output.all_input_nodes)
    for step in reversed(steps):
        step.dead = [n for n in dict.fromkeys([*step.inputs, *step.outputs]) if n not in needed]
        needed.update(step.inputs)
