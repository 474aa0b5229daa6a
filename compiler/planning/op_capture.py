"""The ops of a model from one forward pass on the meta device: no weights, no arithmetic.

    captured = capture(loaded)           # a LoadedModel, on any device
    captured.blocks                      # [TracedKind("embedding", graph, count), TracedKind("block0", graph, 32), ..., TracedKind("head", graph)]

Two modes watch the pass. Functions that the planner costs as a whole (linear, attention, norms, loss) are taken at the level of
torch.nn.functional; all else as ATen operations. Module hooks say in which block an op is. Blocks that compute the same (`graph_hash`) are one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ...passes.shard.op_graph import Operand, OpGraph, OpNode, Tensor, graph_hash
from ...passes.shard.traced import TracedKind
from ..errors import UserError
from ..model_file import LoadedModel
from .op_rules import FUNCTIONS, Rule, rule_of

__all__ = ["Captured", "capture"]


@dataclass(frozen=True)
class Captured:
    """Blocks in order, embedding first and head last (either may be empty), and the batch that was traced."""

    blocks: tuple[TracedKind, ...]
    batch: int
    unknown: tuple[str, ...] = ()


@dataclass
class _Tape:
    """What was seen: ops in order, and the tensors behind the value numbers."""

    parameters: dict[int, str]
    values: list[Tensor] = field(default_factory=list)
    numbers: dict[int, int] = field(default_factory=dict)
    aliases: dict[int, torch.Tensor] = field(default_factory=dict)
    alive: list[Any] = field(default_factory=list)
    ops: list[OpNode] = field(default_factory=list)
    unknown: dict[str, None] = field(default_factory=dict)
    path: list[str] = field(default_factory=lambda: [""])
    paused: bool = False
    outputs: set[int] = field(default_factory=set)

    def number(self, tensor: torch.Tensor, grad: bool) -> int:
        """A new value for a tensor (in place: a new version of it)."""
        self.numbers[id(tensor)] = len(self.values)
        self.alive.append(tensor)
        self.values.append(Tensor(tuple(tensor.shape), tensor.element_size(), grad and tensor.is_floating_point()))
        return len(self.values) - 1

    def is_parameter(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self.parameters or id(tensor) in self.aliases

    def record(self, name: str, rule: Rule, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Add an op; ops on constants alone are none, and views of parameters are parameters."""
        # Empty tensors (a cache that holds nothing yet) change nothing.
        inputs = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.numel()]
        results = [t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        known = [t for t in inputs if id(t) in self.numbers]
        if not results:
            return
        if not known:
            if any(self.is_parameter(t) for t in inputs):
                if rule.free or name in ("_to_copy", "clone", "detach"):
                    for t in results:
                        self.aliases[id(t)] = t
                        self.alive.append(t)
                    return
            else:
                return
        loops, dims, result_dims, kind = rule.describe(inputs, results, args, kwargs)
        if kind == "unknown":
            self.unknown[name] = None
        operands = []
        for position, (tensor, row) in enumerate(zip(inputs, dims, strict=True)):
            if id(tensor) in self.numbers:
                operands.append(Operand(self.numbers[id(tensor)], row, rule.saves(position) and self.values[self.numbers[id(tensor)]].grad))
            elif self.is_parameter(tensor):
                operands.append(Operand(-1, row, False, Tensor(tuple(tensor.shape), tensor.element_size())))
        # Below autograd a result does not yet know that it requires a gradient.
        grad = any(self.values[self.numbers[id(t)]].grad if id(t) in self.numbers else self.is_parameter(t) for t in inputs)
        made = tuple(self.number(t, grad) for t in results)
        self.ops.append(OpNode(name, "memory" if kind == "unknown" else kind, loops, tuple(operands), made, result_dims, self.path[-1], rule.free))


class _Functions(TorchFunctionMode):
    def __init__(self, tape: _Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        rule = FUNCTIONS.get(func)
        if rule is None or self.tape.paused:
            return func(*args, **kwargs)
        self.tape.paused = True
        try:
            out = func(*args, **kwargs)
        finally:
            self.tape.paused = False
        self.tape.record(func.__name__, rule, args, kwargs, out)
        return out


class _Dispatch(TorchDispatchMode):
    def __init__(self, tape: _Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self.tape.paused:
            name = func._schema.name.removeprefix("aten::")
            self.tape.record(name, rule_of(name), args, kwargs, out)
        return out


@contextmanager
def _paths(module: torch.nn.Module, tape: _Tape) -> Iterator[None]:
    """Keeps the path of the module that runs on the tape."""
    handles = []
    for name, child in module.named_modules():
        handles.append(child.register_forward_pre_hook(lambda *_a, name=name: tape.path.append(name)))
        handles.append(child.register_forward_hook(lambda *_a: tape.path.pop() and None, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _to_meta(value: Any) -> Any:
    return value.detach().to("meta").requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value


def capture(found: LoadedModel) -> Captured:
    """Trace one forward pass. Raises UserError for what is no module, or cannot run without data (it looks at the values of tensors)."""
    module = found.model
    if not isinstance(module, torch.nn.Module):
        raise UserError(f"'{found.name}' is no torch.nn.Module: the planner needs its parameters")
    if any(p.device.type != "meta" for p in module.parameters()):
        module = module.to("meta")
    tape = _Tape({id(p): n for n, p in module.named_parameters(remove_duplicate=False)})
    args, kwargs = pytree.tree_map(_to_meta, (found.args, found.kwargs))
    first = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    for tensor in first:
        tape.number(tensor, True)  # as if a layer came before: then the first of equal layers is like the others
    try:
        with _paths(module, tape), _Functions(tape), _Dispatch(tape):
            out = module(*args, **kwargs)
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as e:
        raise UserError(f"'{found.name}' cannot run on the meta device: {type(e).__name__}: {str(e).splitlines()[0]}") from e
    leaves = [t for t in pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
    tape.outputs = {tape.numbers[id(t)] for t in leaves if id(t) in tape.numbers}
    tape.alive.clear()
    batch = first[0].shape[0] if first and first[0].ndim else 1
    return Captured(_blocks(module, tape), int(batch), tuple(tape.unknown))


def _containers(module: torch.nn.Module) -> list[str]:
    """The path of the list of layers with most parameters: where blocks are."""
    best, most = "", 0
    for name, child in module.named_modules():
        if isinstance(child, (torch.nn.ModuleList, torch.nn.Sequential)) and len(child) > 1:
            size = sum(p.numel() for p in child.parameters())
            if size > most:
                best, most = name, size
    return [best] if most else []


def _blocks(module: torch.nn.Module, tape: _Tape) -> tuple[TracedKind, ...]:
    """Cut the tape at the layers of the biggest list of modules; equal neighbours become one block."""
    containers = _containers(module)
    prefix = f"{containers[0]}." if containers and containers[0] else ""
    owners: list[str] = []
    for op in tape.ops:
        inside = bool(containers) and op.path.startswith(prefix) and op.path[len(prefix):].split(".")[0].isdigit()
        owners.append(prefix + op.path[len(prefix):].split(".")[0] if inside else "")
    layers = [i for i, owner in enumerate(owners) if owner]
    first, last = (layers[0], layers[-1]) if layers else (len(owners), len(owners))
    # Ops between the layers (there are few: masks, positions) belong to the layer before them.
    for i in range(first, min(last + 1, len(owners))):
        owners[i] = owners[i] or owners[i - 1]
    groups: list[tuple[str, int, int]] = []
    for i in range(first, min(last + 1, len(owners))):
        if groups and groups[-1][0] == owners[i]:
            groups[-1] = (owners[i], groups[-1][1], i + 1)
        else:
            groups.append((owners[i], i, i + 1))
    used = _uses(tape)
    cut = [("embedding", 0, first), *groups, ("head", last + 1, len(tape.ops))]
    graphs = [_graph(tape, start, end, used) for _, start, end in cut]
    kinds: dict[str, str] = {}
    blocks = [TracedKind("embedding", graphs[0], 1, ())]
    for (path, _, _), graph in zip(groups, graphs[1:-1], strict=True):
        kind = kinds.setdefault(graph_hash(graph), f"block{len(kinds)}")
        if blocks[-1].kind == kind:
            blocks[-1] = replace(blocks[-1], count=blocks[-1].count + 1, paths=(*blocks[-1].paths, path))
        else:
            blocks.append(TracedKind(kind, graph, 1, (path,)))
    return (*blocks, TracedKind("head", graphs[-1], 1, ()))


def _uses(tape: _Tape) -> dict[int, list[int]]:
    """Ops that read each value."""
    found: dict[int, list[int]] = {}
    for i, op in enumerate(tape.ops):
        for operand in op.operands:
            found.setdefault(operand.value, []).append(i)
    return found


def _graph(tape: _Tape, start: int, end: int, used: dict[int, list[int]]) -> OpGraph:
    """The ops of [start, end) with values numbered anew. The largest float input is the residual stream and comes first; outputs are
    what later ops read, the largest last.
    """
    ops = tape.ops[start:end]
    made = {v for op in ops for v in op.results}
    outside = list(dict.fromkeys(o.value for op in ops for o in op.operands if o.value >= 0 and o.value not in made))
    outside.sort(key=lambda v: -tape.values[v].elements * (1 if tape.values[v].grad else 0))
    leaving = [v for op in ops for v in op.results if v in tape.outputs or any(i >= end for i in used.get(v, ()))]
    leaving = sorted(dict.fromkeys(leaving), key=lambda v: tape.values[v].elements * tape.values[v].grad)
    order = {v: n for n, v in enumerate([*outside, *(v for op in ops for v in op.results)])}
    nodes = tuple(replace(op, path=op.path, results=tuple(order[v] for v in op.results),
                          operands=tuple(replace(o, value=order[o.value]) if o.value >= 0 else o for o in op.operands)) for op in ops)
    return OpGraph(tuple(tape.values[v] for v in order), nodes, tuple(order[v] for v in outside), tuple(order[v] for v in leaving))
