"""A failing module made small: only the ops that the failure needs, on the values that reach them.

    small = reduce(module, arguments, fails, seconds=60)

`fails(module, arguments)` says whether the fault shows. An op that goes leaves its value behind as an argument, so any choice of
ops is a program. The order of attempts: each op alone (most faults need no more), each op with its producers, then delta debugging (Zeller and
Hildebrandt 2002, "ddmin") of all that the failing result depends on. A single loop is then replaced by one of its trips (`loops.py`), a single
fused group is reduced inside in the same way, and a single kernel by storing earlier and earlier values of its body.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...ir import Builder, make_func, make_module
from ...ir.core import IRError, Operation, Value
from ...ir.expr import sym
from ...ir.opdef import Trait
from ...ir.passes import PassContext, run_pipeline
from ...ir.types import TensorType
from ...ir.verifier import verify
from ...passes.dce import DeadCodeElimination
from .evaluate import Trace, function_of, trace
from .loops import called, trips_of

__all__ = ["Reduced", "extract", "reduce"]

Fails = Callable[[Operation, Sequence[Any]], Any]
"""A truthy verdict when the fault shows."""


@dataclass(frozen=True)
class Reduced:
    """The smallest failing module found, its arguments, the verdict on it, and how many candidates were tried."""

    module: Operation
    arguments: list[Any]
    verdict: Any
    tried: int


def _free_values(op: Operation) -> list[Value]:
    """Values from outside that the op and its regions read."""
    inside = {v for o in op.walk() for v in o.results} | {a for o in op.walk() for r in o.regions for b in r.blocks for a in b.args}
    return [v for o in op.walk() for v in o.operands if v not in inside]


def _closed(chosen: Sequence[Operation], block: Any) -> list[Operation]:
    """`chosen` with the constants that it reads, and the ops that make what no argument can be (scalars), in order."""
    kept = set(chosen)
    pending = list(chosen)
    while pending:
        for v in _free_values(pending.pop()):
            d = v.defining_op
            if d is not None and d not in kept and d.parent is block and (d.has_trait(Trait.ConstantLike) or not isinstance(v.type, TensorType)):
                kept.add(d)
                pending.append(d)
    return [op for op in block if op in kept]


def extract(module: Operation, holder: Operation, chosen: Sequence[Operation], known: Trace) -> tuple[Operation, list[Any]]:
    """A module of `chosen` ops of the body of `holder` (the function, or a `tensor.fused` in it), and its arguments by value.

    It returns what is returned of them, and what other ops (or none) read. The size symbols are arguments at the end.
    """
    block = holder.body
    func = function_of(module)
    ops = _closed(chosen, block)
    kept = set(ops)
    own = {r for op in ops for r in op.results}
    outside = list(dict.fromkeys(v for op in ops for v in _free_values(op) if v not in own))
    returned = list(dict.fromkeys(v for v in block.terminator.operands if v in own))
    for op in ops:
        if not op.has_trait(Trait.ConstantLike) or op in chosen:
            used = any(_owner_in(user, block) in kept for r in op.results for user in r.users)
            wanted = [r for r in op.results if isinstance(r.type, TensorType) and (r.uses or len(op.results) == 1)]
            returned += [r for r in wanted if r not in returned and not used]
    made, top = make_module(module.attributes.get("level", ""))
    made.attributes.update(module.attributes)
    needed = called(module, ops)
    for kernel in module.body:
        if kernel.name == "tile.kernel" and kernel in needed:
            top.append(kernel.clone())
    symbols = dict(func["symbols"])
    n = len(outside)
    attrs: dict[str, Any] = {
        "arg_attrs": tuple({"name": v.name or f"a{i}", "kind": _kind(func, v, ops), "position": i} for i, v in enumerate(outside)),
        "result_attrs": tuple({"kind": "tensor"} for _ in returned)}
    if symbols:
        attrs |= {"symbols": symbols, "symbol_args": tuple({"position": n + i, "expr": sym(s)} for i, s in enumerate(symbols))}
    _, body = make_func(top, func["sym_name"], [v.type for v in outside], [v.name for v in outside], **attrs)
    mapping: dict[Value, Value] = dict(zip(outside, body.args))
    b = Builder.at_end(body)
    if holder is func:
        for op in ops:
            b.insert(op.clone(mapping))
        b.create("return", [mapping[v] for v in returned])
    else:
        b.create("return", _as_group(b, holder, ops, outside, returned, mapping))
    for private in module.body:
        if private.name == "func" and private in needed:
            top.append(private.clone())
    return made, [*(known.values[v] for v in outside), *(known.symbols[s] for s in symbols)]


def _as_group(b: Builder, holder: Operation, ops: Sequence[Operation], outside: Sequence[Value], returned: Sequence[Value],
              mapping: dict[Value, Value]) -> list[Value]:
    """The ops as one group like `holder`; gives its results."""
    group = Operation.create(holder.name, [mapping[v] for v in outside], dict(holder.attributes), [v.type for v in returned],
                             [_region_like(outside)], holder.location)
    inner: dict[Value, Value] = dict(zip(outside, group.body.args))
    body = Builder.at_end(group.body)
    for op in ops:
        body.insert(op.clone(inner))
    body.create("tensor.yield", [inner[v] for v in returned])
    return list(b.insert(group).results)


def _region_like(values: Sequence[Value]) -> Any:
    holder, _ = make_func(make_module()[1], "group", [v.type for v in values], [v.name for v in values])
    region = holder.regions.pop()
    region.parent = None
    return region


def _owner_in(op: Operation, block: Any) -> Operation | None:
    """The op of `block` that `op` is, or is inside."""
    current: Operation | None = op
    while current is not None and current.parent is not block:
        current = current.parent_op
    return current


def _kind(func: Operation, v: Value, ops: Sequence[Operation]) -> str:
    """'param' for what a launch that runs once reads; else the kind of the argument that it was."""
    if any("cached" in op.attributes and op["cached"] and v in op.operands for op in ops):
        return "param"
    attrs = func["arg_attrs"]
    if v in func.body.args and attrs:
        return str(attrs[v.index].get("kind", "input"))  # type: ignore[attr-defined]
    return "input"


class _Search:
    def __init__(self, fails: Fails, deadline: float):
        self.fails, self.deadline, self.tried = fails, deadline, 0

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def test(self, module: Operation, arguments: list[Any]) -> Any:
        """The verdict on a candidate; none for one that is no valid program."""
        self.tried += 1
        try:
            verify(module)
            return self.fails(module, arguments)
        except (IRError, IndexError, RuntimeError, NotImplementedError, ValueError, TypeError, KeyError, AssertionError):
            return None

    def attempt(self, module: Operation, holder: Operation, chosen: Sequence[Operation], known: Trace) -> Reduced | None:
        try:
            made, arguments = extract(module, holder, chosen, known)
        except (IRError, KeyError):  # a value that was not traced
            return None
        verdict = self.test(made, arguments)
        return Reduced(made, arguments, verdict, self.tried) if verdict else None


def reduce(module: Operation, arguments: Sequence[Any], fails: Fails, verdict: Any, *, seconds: float = 60) -> Reduced:
    """The smallest module found within `seconds` on which `fails` still says so; the module itself if there is none smaller."""
    search = _Search(fails, time.monotonic() + seconds)
    whole = Reduced(module, list(arguments), verdict, 0)
    best = _fewest(whole, function_of(module), search)
    ops = _ops(best)
    while len(ops) == 1 and ops[0].name == "loop":
        trips = trips_of(best.module, best.arguments, ops[0])
        found = next((Reduced(*trip, v, search.tried) for trip in trips if not search.late and (v := search.test(*trip))), None)
        if found is None:
            break
        best = _fewest(found, function_of(found.module), search)
        ops = _ops(best)
    if len(ops) == 1 and ops[0].name == "tensor.fused":
        best = _fewest(best, ops[0], search)
    elif len(ops) == 1 and ops[0].name == "tile.launch":
        best = _earliest_store(best, search)
    return Reduced(best.module, best.arguments, best.verdict, search.tried)


def _ops(found: Reduced) -> list[Operation]:
    func = function_of(found.module)
    return [op for op in func.body if not op.has_trait(Trait.ConstantLike) and op is not func.body.terminator]


def _fewest(start: Reduced, holder: Operation, search: _Search) -> Reduced:
    """`start` with as few ops in `holder` (its function, or a group in it) as fail."""
    block = holder.body
    ops = [op for op in block if not op.has_trait(Trait.ConstantLike) and op is not block.terminator]
    if len(ops) <= 1:
        return start
    try:
        known = trace(start.module, start.arguments)
    except (IRError, IndexError, RuntimeError):
        return start
    for chosen in _small_sets(ops):
        found = search.attempt(start.module, holder, chosen, known)
        if found is not None:
            return found
        if search.late:
            return start
    return _ddmin(start, holder, ops, known, search)


def _small_sets(ops: Sequence[Operation]) -> Iterator[list[Operation]]:
    """Each op alone; then each with the ops that make its operands."""
    for op in ops:
        yield [op]
    members = set(ops)
    for op in ops:
        producers = list(dict.fromkeys(v.defining_op for v in _free_values(op) if v.defining_op in members))
        if producers:
            yield [p for p in producers if p is not None] + [op]


def _ddmin(start: Reduced, holder: Operation, ops: list[Operation], known: Trace, search: _Search) -> Reduced:
    best, current, parts = start, ops, 2
    while len(current) > 1 and not search.late:
        size = -(-len(current) // parts)
        pieces = [current[i:i + size] for i in range(0, len(current), size)]
        rests = [[op for op in current if op not in set(piece)] for piece in pieces] if len(pieces) > 2 else []
        for chosen in [*pieces, *rests]:
            found = search.attempt(start.module, holder, chosen, known)
            if found is not None:
                best, current, parts = found, chosen, 2 if chosen in pieces else max(parts - 1, 2)
                break
            if search.late:
                break
        else:
            if size == 1:
                break
            parts = min(len(current), 2 * parts)
    return best


def _earliest_store(start: Reduced, search: _Search) -> Reduced:
    """The one kernel of `start`, storing the earliest value of its body with which it still fails."""
    kernels = [op for op in start.module.body if op.name == "tile.kernel"]
    stores = [op for op in kernels[0].walk() if op.name == "tile.store"] if len(kernels) == 1 else []
    if len(stores) != 1 or search.late:
        return start
    stored = stores[0].operands[1]
    place = list(kernels[0].walk()).index(stores[0])
    for number, op in enumerate(kernels[0].walk()):
        if op.parent is not stores[0].parent or number >= place or op.has_trait(Trait.ConstantLike) or search.late:
            continue
        if len(op.results) != 1 or op.result is stored or op.result.type != stored.type:
            continue
        candidate = start.module.clone()
        walked = list(next(k for k in candidate.body if k.name == "tile.kernel").walk())
        walked[place].set_operand(1, walked[number].result)
        run_pipeline(candidate, [DeadCodeElimination()], PassContext())
        verdict = search.test(candidate, start.arguments)
        if verdict:
            return Reduced(candidate, start.arguments, verdict, search.tried)
    return start


def tensors(arguments: Sequence[Any]) -> list[torch.Tensor]:
    """The tensors among arguments."""
    return [a for a in arguments if isinstance(a, torch.Tensor)]
