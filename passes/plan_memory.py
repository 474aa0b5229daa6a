"""Gives every temporary buffer a place in one arena.

Before: host functions with `host.alloc`. After: `host.slot` with byte offsets (multiples of 64) into an arena of `stats.arena_bytes`;
buffers whose size depends on a symbol that an extern defines (unknown when the arena is made) become arguments of kind "late",
which the executor allocates as soon as the symbol is known.

1. Live ranges: from the op that first writes a buffer (or a view of it) to its last use.
2. In-place reuse: where a kernel allows it (`inplace`) and an input of the same size dies at the launch, input and output are one group.
3. Offsets, for constant sizes: best fit in several orders, then hill climbing over orders while the arena is larger than
   the lower bound (largest number of live bytes at any time), and an exact search for small programs (`fit.py`).
4. Symbolic sizes: those that are constant multiples of one expression are packed with each other like constants, in that unit. Alternatively
   all are put into shared slots, largest first, a buffer going into a slot only if it is proved not to be larger. Both plans are right for all
   symbol values; the one that is smaller at representative values is kept. Sections follow each other at symbolic offsets.

Recorded in `stats`: arena_bytes, lower_bound, unplanned_bytes (sum of all temporaries), reused_in_place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from ..ir.builder import Builder
from ..ir.core import Operation, Value
from ..ir.expr import Bounds, Dim, Expr, free_symbols, known_less, maximum, product
from ..ir.passes import Pass, PassContext, register
from ..ir.types import BufferType
from .check_plan import check_plan
from .fit import Block, fit
from .storage import align, representative_symbols, size_at, symbol_bounds

__all__ = ["PlanMemory", "live_ranges"]

MAX_BOUND_TERMS = 8


@register
@dataclass(frozen=True)
class PlanMemory(Pass):
    """See the module docstring. `effort` bounds the search beyond best fit (number of tried orders); `check` verifies the plan."""

    name: ClassVar[str] = "plan-memory"
    effort: int = 200
    check: bool = True

    def run(self, module: Operation, ctx: PassContext) -> None:
        kernels = {op["sym_name"]: op for op in module.body if op.name == "tile.kernel"}
        for func in module.body:
            if func.name == "func":
                _make_late(func)
                self._plan(func, kernels, ctx)
                if self.check:
                    check_plan(func, kernels)

    def _plan(self, func: Operation, kernels: Mapping[str, Operation], ctx: PassContext) -> None:
        buffers = _groups(func, kernels)
        groups = list(dict.fromkeys(buffers.values()))
        symbols = representative_symbols(func)
        offsets, arena = _place(groups, symbol_bounds(func), symbols, self.effort)
        for value, group in buffers.items():
            op = value.defining_op
            assert op is not None
            slot = Builder.before_op(op).create("host.slot", (), {"offset": offsets[group], "bytes": op["bytes"]}, [value.type])
            slot.result.name = value.name
            value.replace_all_uses_with(slot.result)
            op.erase()
        unplanned: Dim = 0
        for group in groups:
            unplanned = unplanned + group.total
        bound = _lower_bound(groups, symbols)
        func.attributes["stats"] = {**func["stats"], "arena_bytes": arena, "lower_bound": bound, "unplanned_bytes": unplanned,
                                    "reused_in_place": len(buffers) - len(groups)}
        ctx.remark("done", f"'{func['sym_name']}': arena of {arena} bytes, lower bound {bound}, {unplanned} without planning, "
                           f"{len(buffers) - len(groups)} buffers reused in place")


def _make_late(func: Operation) -> None:
    """Allocations whose size an extern decides become arguments."""
    unknown = {s for op in func.body if op.name == "host.extern" for s in op["defines"]}
    if not unknown:
        return
    arg_attrs = list(func["arg_attrs"])
    for op in func.body.ops:
        if op.name == "host.alloc" and free_symbols(op["bytes"]) & unknown:
            op.result.replace_all_uses_with(func.body.add_arg(op.result.type, op.result.name))
            arg_attrs.append({"kind": "late"})
            op.erase()
    func.attributes["arg_attrs"] = tuple(arg_attrs)


@dataclass(eq=False)
class _Group:
    """Buffers that share one place: the same memory handed from launch to launch. Times are positions of ops, inclusive."""

    size: Dim
    start: int
    end: int
    total: Dim = 0  # bytes of all members, had each its own memory
    members: list[Value] = field(default_factory=list)


def live_ranges(func: Operation) -> dict[Value, tuple[int, int]]:
    """`host.alloc` result -> (position of the first, of the last op that touches it or a view of it)."""
    base: dict[Value, Value] = {}
    ranges: dict[Value, tuple[int, int]] = {}
    for at, op in enumerate(func.body):
        if op.name == "host.alloc":
            base[op.result] = op.result
        elif op.name == "host.view":
            if op.operands[0] in base:
                base[op.result] = base[op.operands[0]]
        else:
            for v in op.operands:
                if v in base:
                    first, _ = ranges.get(base[v], (at, at))
                    ranges[base[v]] = (first, at)
    return ranges


def _groups(func: Operation, kernels: Mapping[str, Operation]) -> dict[Value, _Group]:
    """Every allocation's group, after in-place reuse. Allocations that nothing touches are dropped."""
    ranges = live_ranges(func)
    for op in func.body.ops:
        if op.name == "host.alloc" and not op.result.uses:
            op.erase()
    found: dict[Value, _Group] = {}
    for v, (start, end) in ranges.items():
        size = align(_bytes(v))
        found[v] = _Group(size, start, end, size, [v])
    for at, op in enumerate(func.body):
        if op.name != "host.launch" or op["kernel"].name not in kernels:
            continue
        taken: set[_Group] = set()
        for i, j in kernels[op["kernel"].name]["inplace"]:
            source, target = found.get(op.operands[i]), found.get(op.operands[j])
            if (source is None or target is None or source in taken or source.end != at or target.start != at
                    or _bytes(op.operands[i]) != _bytes(op.operands[j]) or op.operands.count(op.operands[i]) > 1):
                continue
            taken.add(source)
            source.end = target.end
            source.total = source.total + target.total
            source.members += target.members
            for v in target.members:
                found[v] = source
    return found


def _bytes(v: Value) -> Dim:
    assert v.defining_op is not None
    return v.defining_op["bytes"]


# -- placement --------------------------------------------------------------------------------------------------------

Placement = tuple[dict[_Group, Dim], Dim]
"""Offset of each group, and the size of the whole."""


def _place(groups: Sequence[_Group], bounds: Bounds, symbols: Mapping[str, int], effort: int) -> Placement:
    candidates = [_by_unit(groups, effort)]
    symbolic = [g for g in groups if isinstance(g.size, Expr)]
    if symbolic:
        constant = [g for g in groups if not isinstance(g.size, Expr)]
        candidates.append(_stack([_by_unit(constant, effort), _by_slot(symbolic, bounds, symbols)]))
        candidates.append(_by_slot(groups, bounds, symbols))
    return min(candidates, key=lambda placed: size_at(placed[1], symbols))


def _stack(sections: Sequence[Placement]) -> Placement:
    offsets: dict[_Group, Dim] = {}
    base: Dim = 0
    for placed, size in sections:
        for group, offset in placed.items():
            offsets[group] = base + offset
        base = base + size
    return offsets, base


def _unit(size: Dim) -> tuple[int, Dim]:
    """(k, u) with size == k * u, where u is 1, one monomial, or the expression itself."""
    if isinstance(size, int):
        return size, 1
    if len(size.terms) == 1 and size.const == 0:
        (monomial, k), = size.terms
        return k, product(Expr((((atom,), 1),), 0) for atom in monomial)
    return 1, size


def _by_unit(groups: Sequence[_Group], effort: int) -> Placement:
    """Sizes that are multiples of one unit are packed together; the packings follow each other."""
    units: dict[Dim, list[tuple[int, _Group]]] = {}
    for g in groups:
        k, unit = _unit(g.size)
        units.setdefault(unit, []).append((k, g))
    sections = []
    for unit, members in units.items():
        placed = fit([Block(k, g.start, g.end) for k, g in members], effort)
        sections.append(({g: offset * unit for (_, g), offset in zip(members, placed.offsets, strict=True)}, placed.size * unit))
    return _stack(sections)


def _by_slot(groups: Sequence[_Group], bounds: Bounds, symbols: Mapping[str, int]) -> Placement:
    """Slots shared by groups that are never alive together; the first, and provably largest, of a slot's groups gives its size."""
    slots: list[tuple[Dim, list[_Group]]] = []
    for g in sorted(groups, key=lambda g: (-size_at(g.size, symbols), g.start)):
        fitting = [(size_at(size, symbols), i) for i, (size, members) in enumerate(slots)
                   if (size == g.size or known_less(g.size, size + 1, bounds)) and all(g.end < m.start or m.end < g.start for m in members)]
        if fitting:
            slots[min(fitting)[1]][1].append(g)
        else:
            slots.append((g.size, [g]))
    return _stack([(dict.fromkeys(members, 0), size) for size, members in slots])


def _lower_bound(groups: Sequence[_Group], symbols: Mapping[str, int]) -> Dim:
    """The largest number of live bytes over time; of many incomparable symbolic sums, those that lead at representative values."""
    changes: dict[int, Dim] = {}
    for g in groups:
        changes[g.start] = changes.get(g.start, 0) + g.size
        changes[g.end + 1] = changes.get(g.end + 1, 0) - g.size
    live: Dim = 0
    totals: dict[Dim, None] = {0: None}
    for time in sorted(changes):
        live = live + changes[time]
        totals[live] = None
    leading = sorted(totals, key=lambda e: -size_at(e, symbols))[:MAX_BOUND_TERMS]
    return maximum(*[e for e in leading if e != 0]) if len(leading) > 1 else 0
