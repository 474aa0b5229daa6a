"""Gives every temporary buffer a place in one arena.

Before: host functions with `host.alloc`, loops without scratch memory. After: `host.slot` with byte offsets (multiples of 64) into an arena of
`stats.arena_bytes`; buffers whose size depends on a symbol that an extern defines (unknown when the arena is made) become
arguments of kind "late", which the executor allocates as soon as the symbol is known.

1. Live ranges, and in-place reuse: where a kernel allows it and an input of the same size dies at the launch, input and output
   are one group (`liveness.py`).
2. Outputs as scratch: until its first write the memory of an output is free, and groups that are dead by then live there
   (`scratch.py`): they become views of the output.
3. Offsets, for constant sizes: best fit in several orders, then hill climbing over orders while the arena is larger than
   the lower bound (largest number of live bytes at any time), and an exact search for small programs (`fit.py`).
4. Symbolic sizes: those that are constant multiples of one expression are packed with each other like constants, in that unit.
   Alternatively all are put into shared slots, largest first, a buffer going into a slot only if it is proved not to be larger.
   Both plans are right for all symbol values; the one that is smaller at representative values is kept. Sections follow each
   other at symbolic offsets.

Recorded in `stats`: arena_bytes, lower_bound (of what is in the arena), unplanned_bytes (sum of all temporaries),
reused_in_place and placed_in_outputs (numbers of buffers).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from ..ir.builder import Builder
from ..ir.core import Operation
from ..ir.expr import Dim, Expr, free_symbols, maximum, product
from ..ir.passes import Pass, PassContext, register
from ..ir.ranges import Bounds, known_less, known_nonnegative
from ..ir.types import DTYPES, BufferType
from .check_plan import check_plan
from .fit import Block, fit
from .liveness import Group, find_groups
from .scratch import find_scratch
from .storage import align, representative_symbols, size_at, symbol_bounds

__all__ = ["PlanMemory"]

MAX_BOUND_TERMS = 8


@register
@dataclass(frozen=True)
class PlanMemory(Pass):
    """See the module docstring.

    `effort` bounds the search beyond best fit (number of tried orders), `outputs` allows outputs as scratch, `check` verifies
    the plan.
    """

    name: ClassVar[str] = "plan-memory"
    effort: int = 200
    outputs: bool = True
    check: bool = True

    def run(self, module: Operation, ctx: PassContext) -> None:
        kernels = {op["sym_name"]: op for op in module.body if op.name == "tile.kernel"}
        functions = {op["sym_name"]: op for op in module.body if op.name == "func"}
        for func in _callees_first(functions):
            _make_late(func)
            _add_scratch(func, functions)
            self._plan(func, kernels, ctx)
            if self.check:
                check_plan(func, kernels)

    def _plan(self, func: Operation, kernels: Mapping[str, Operation], ctx: PassContext) -> None:
        for op in func.body.ops:
            if op.name == "host.alloc" and not op.result.uses:
                op.erase()
        buffers = find_groups(func, kernels)
        groups = list(dict.fromkeys(buffers.values()))
        symbols, bounds = representative_symbols(func), symbol_bounds(func)
        hosted = find_scratch(func, kernels, groups, bounds) if self.outputs else {}
        rest = [g for g in groups if g not in hosted]
        offsets, arena = _place(rest, bounds, symbols, self.effort)
        unplanned: Dim = 0
        for value, group in buffers.items():
            alloc = value.defining_op
            assert alloc is not None
            unplanned = unplanned + align(alloc["bytes"])
            b = Builder.before_op(alloc)
            if group in hosted:
                output, elements = hosted[group]
                placed = b.create("host.view", [output], {"offset": elements} if elements else {}, [value.type])
            else:
                placed = b.create("host.slot", (), {"offset": offsets[group], "bytes": alloc["bytes"]}, [value.type])
            placed.result.name = value.name
            value.replace_all_uses_with(placed.result)
            alloc.erase()
        bound = _lower_bound(rest, symbols)
        in_place, scratch = len(buffers) - len(groups), sum(g in hosted for g in buffers.values())
        func.attributes["stats"] = {**func["stats"], "arena_bytes": arena, "lower_bound": bound, "unplanned_bytes": unplanned,
                                    "reused_in_place": in_place, "placed_in_outputs": scratch}
        ctx.remark("done", f"'{func['sym_name']}': arena of {arena} bytes, lower bound {bound}, {unplanned} without planning, "
                           f"{in_place} buffers reused in place, {scratch} placed in outputs")


def _callees_first(functions: Mapping[str, Operation]) -> list[Operation]:
    """Functions after the bodies of their loops: a loop gives its body an arena."""
    done: dict[str, Operation] = {}

    def visit(func: Operation) -> None:
        for op in func.body:
            if op.name == "host.loop":
                visit(functions[op["body"].name])
        done.setdefault(func["sym_name"], func)

    for func in functions.values():
        visit(func)
    return list(done.values())


def _add_scratch(func: Operation, functions: Mapping[str, Operation]) -> None:
    """The last operand of each loop: two places for each carried value, then the arena of its body."""
    for op in func.body.ops:
        if op.name != "host.loop":
            continue
        ends = op.operands[len(op.operands) - op["outputs"]:][:op["carried"]]
        needed: Dim = functions[op["body"].name]["stats"].get("arena_bytes", 0)
        for v in ends:
            needed = needed + 2 * align(v.type.numel * v.type.dtype.bytes)  # type: ignore[attr-defined]
        scratch = Builder.before_op(op).op("host.alloc", type=BufferType((needed,), DTYPES["u8"]), bytes=needed)
        scratch.name = "scratch"
        op.set_operands([*op.operands, scratch])
        op.attributes["outputs"] = op["outputs"] + 1


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


# -- placement --------------------------------------------------------------------------------------------------------

Placement = tuple[dict[Group, Dim], Dim]
"""Offset of each group, and the size of the whole."""


def _place(groups: Sequence[Group], bounds: Bounds, symbols: Mapping[str, int], effort: int) -> Placement:
    candidates = [_by_unit(groups, effort)]
    symbolic = [g for g in groups if isinstance(g.size, Expr)]
    if symbolic:
        constant = [g for g in groups if not isinstance(g.size, Expr)]
        candidates.append(_stack([_by_unit(constant, effort), _by_slot(symbolic, bounds, symbols)]))
        candidates.append(_by_slot(groups, bounds, symbols))
    return min(candidates, key=lambda placed: size_at(placed[1], symbols))


def _stack(sections: Sequence[Placement]) -> Placement:
    offsets: dict[Group, Dim] = {}
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


def _by_unit(groups: Sequence[Group], effort: int) -> Placement:
    """Sizes that are multiples of one unit are packed together; the packings follow each other."""
    units: dict[Dim, list[tuple[int, Group]]] = {}
    for g in groups:
        k, unit = _unit(g.size)
        units.setdefault(unit, []).append((k, g))
    sections = []
    for unit, members in units.items():
        placed = fit([Block(k, g.start, g.end) for k, g in members], effort)
        sections.append(({g: offset * unit for (_, g), offset in zip(members, placed.offsets, strict=True)},
                         placed.size * unit))
    return _stack(sections)


def _by_slot(groups: Sequence[Group], bounds: Bounds, symbols: Mapping[str, int]) -> Placement:
    """Slots shared by groups that are never alive together; a slot's size is that of its provably largest group."""
    slots: list[tuple[Dim, list[Group]]] = []

    @cache
    def covers(large: Dim, small: Dim) -> bool:
        return large == small or known_less(small, large + 1, bounds)

    for g in sorted(groups, key=lambda g: (-size_at(g.size, symbols), g.start)):
        free = [i for i, (size, members) in enumerate(slots)
                if (covers(size, g.size) or covers(g.size, size)) and not any(g.meets(m) for m in members)]
        if free:
            i = min(free, key=lambda i: size_at(slots[i][0], symbols))
            size, members = slots[i]
            slots[i] = (size if covers(size, g.size) else g.size, [*members, g])
        else:
            slots.append((g.size, [g]))
    return _stack([(dict.fromkeys(members, 0), size) for size, members in slots])


def _lower_bound(groups: Sequence[Group], symbols: Mapping[str, int]) -> Dim:
    """The largest number of live bytes over time; of many incomparable sums, those that lead at representative values."""
    changes: dict[int, Dim] = {}
    for g in groups:
        changes[g.start] = changes.get(g.start, 0) + g.size
        changes[g.end + 1] = changes.get(g.end + 1, 0) - g.size
    live: Dim = 0
    totals: dict[Dim, None] = {0: None}
    for time in sorted(changes):
        live = live + changes[time]
        totals[live] = None
    leading: list[Dim] = []
    for total in sorted(totals, key=lambda e: -size_at(e, symbols)):
        if not any(known_nonnegative(other - total) for other in leading):  # else another time is always the worse one
            leading.append(total)
    return maximum(*leading[:MAX_BOUND_TERMS])
