"""Whether a stream may be one kernel: how its reductions depend on each other, and whether it waits for what it makes itself."""

from __future__ import annotations

from collections.abc import Sequence

import networkx as nx

from ..ir import Operation, Value
from .rescale import FREE, Declined, Dependence, Factor
from .stream_form import Stream

__all__ = ["check_dependence", "circle", "escapes", "waits_for_itself"]


def check_dependence(s: Stream) -> None:
    """Fills `shifts` and `scales`; Declined if some reduction cannot stream."""
    rules = Dependence(s.kind_of)
    for op in [*s.reductions, *s.seconds]:
        s.scales[op], s.shifts[op] = [], None
        if op in s.seconds:
            factors = [_operand_factor(rules, s, op)]
        else:
            factors = [rules.of(op, y) for y in op.body.terminator.operands]
        for kind, f in zip(op["combine"], factors, strict=True):
            if f.kind == "free":
                continue
            if kind != "sum" or f.kind != "product" or len(factors) != 1:
                raise Declined("a reduction depends on an earlier one in a way that cannot be rescaled")
            if f.value is not None and not _is_plain_maximum(s, rules, f.value):
                raise Declined("a reduction depends on an earlier one in a way that cannot be rescaled")
            s.shifts[op], s.scales[op] = f.value, list(f.scales)
            if f.guarded:
                s.guarded.add(op)
    if {w for rows in s.scales.values() for w, *_ in rows} & set(s.shifts.values()):
        raise Declined("a row value both shifts and scales")


def _operand_factor(rules: Dependence, s: Stream, op: Operation) -> Factor:
    v = s.streamed(op)
    made = v.defining_op
    assert made is not None
    if made in s.firsts:
        return FREE
    return rules.of(made, made.body.terminator.operands[made.results.index(v)])  # type: ignore[arg-type]


def _is_plain_maximum(s: Stream, rules: Dependence, m: Value) -> bool:
    op = m.defining_op
    return op in s.reductions and op["combine"] == ("max",) and rules.of(op, op.body.terminator.operands[0]).kind == "free"


def escapes(s: Stream, members: set[Operation]) -> bool:
    """Some value of the middle space has a reader outside all streams: it would be stored anyway."""
    return any(user not in members for op in [*s.firsts, *s.full] for r in op.results for user in r.users)


def waits_for_itself(s: Stream) -> bool:
    """What a member reads from outside depends on what some member makes."""
    stack = [v.defining_op for op in s.position for v in op.operands if v.defining_op is not None and v.defining_op not in s.position]
    seen: set[Operation] = set()
    while stack:
        op = stack.pop()
        if op in seen:
            continue
        seen.add(op)
        if op in s.position and op not in s.firsts and op not in s.full:
            return True
        stack.extend(v.defining_op for v in op.operands if v.defining_op is not None)
    return False


def circle(streams: Sequence[Stream]) -> Stream | None:
    """A stream that would need, by way of others, what it makes."""
    if len(streams) < 2:
        return None
    home = {op: next(s for s in streams if op in s.position) for s in streams for op in s.members}
    graph = nx.DiGraph()
    for reader in [*streams, *(op for op in streams[0].seconds[0].parent if op not in home)]:  # type: ignore[union-attr]
        inside = reader.members if isinstance(reader, Stream) else [reader]
        for v in {v: None for op in inside for inner in op.walk() for v in inner.operands}:
            made = v.defining_op
            if made is not None and (made in home or made.parent is streams[0].seconds[0].parent) and not (
                    isinstance(reader, Stream) and made in reader.position):
                graph.add_edge(id(home.get(made, made)), id(reader))
    by_key = {id(s): s for s in streams}
    try:
        found = nx.find_cycle(graph)
    except nx.NetworkXNoCycle:
        return None
    return next(by_key[a] for a, _ in found if a in by_key)
