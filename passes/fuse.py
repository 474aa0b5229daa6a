"""Groups structured ops into kernels.

Every group has a *frame*: a list of loop dimensions that all members share, split into outer dimensions (parallel in every member) and inner
ones (reduced by some member, or absent from a member that computes once per outer point). A member has either all
frame dimensions or exactly the outer ones; each value passed between members is read at the point at which it was made. So a group becomes one
loop nest that keeps its intermediates in registers: softmax, norms and their backward are one group each.
A contraction starts a group of its own, and takes elementwise readers as its epilogue. On GPUs it also takes in what unpacks its operands
(`prologue.py`): weights of few bits then cross the memory bus as they are stored.

A reader joins a group only if no path leaves the group and comes back (that would be a cycle of kernels), and if joining does not
give up parallelism (a big elementwise op does not join a reduction to a handful of elements).
Invariant after the pass: every structured op is inside a `tensor.fused`, and function bodies are in topological order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ..ir import Block, Builder, Dim, Operation, Region, TensorType, Value
from ..ir.dialects.tensor import fill_of, parallel_dims
from ..ir.expr import free_symbols, product
from ..ir.opdef import Trait
from ..ir.passes import Pass, PassContext, register
from .prologue import makes_rows, unpacks
from .siblings import are_siblings
from .split_dimensions import reshaping_view
from .split_reductions import reduces_rows
from .structured import PARTIAL, body_ops, is_contraction, is_pointwise, plain_dims
from .topology import topological_sort
from .unpack import UNPACKS

SUMMED = 256
"""Columns of a sum that count as one program's: elements join it only where it has enough of these."""


@dataclass
class Group:
    """Members in order; `places[op]` gives the frame dimension of each dimension of the op (parallel, then reduced)."""

    frame: list[Dim]
    members: list[Operation] = field(default_factory=list)
    places: dict[Operation, tuple[int, ...]] = field(default_factory=dict)
    contraction: Operation | None = None
    values: set[Value] = field(default_factory=set)
    prologue: list[Operation] = field(default_factory=list)

    @property
    def everything(self) -> list[Operation]:
        return [*self.prologue, *self.members]

    def add(self, op: Operation, place: tuple[int, ...], frame: list[Dim]) -> None:
        self.frame = frame
        self.members.append(op)
        self.places[op] = place
        self.values.update(op.results)


def _is_reshape(op: Operation) -> bool:
    return op.name == "tensor.generic" and len(op.operands) == 1 and reshaping_view(op.operands[0]) is op


def _is_loop(g: Group) -> bool:
    """Not a scatter or scan, which are kernels by themselves."""
    return g.members[0].name == "tensor.generic"


def _is_bare(g: Group, rank: int, on_gpu: bool) -> bool:
    """A product alone, or (on CPUs) with pointwise ops behind it that read nothing but it and arguments: a bias."""
    inside = {r for m in g.members for r in m.results}
    return all(m is g.contraction or not on_gpu and not m["reductions"] and g.places[m] == tuple(range(rank)) and
               all(v in inside or v.defining_op is None for v in m.operands) for m in g.members)


def frame_of(op: Operation) -> Group:
    """A new group of one op, whose frame is the op's own iteration space."""
    g = Group(list(op["dims"]), contraction=op if is_contraction(op) else None)
    if g.contraction is not None:
        g.frame = list(parallel_dims(op))
    g.add(op, tuple(range(len(g.frame))), g.frame)
    return g


def split_frame(frame: list[Dim], members: list[Operation], places: dict[Operation, tuple[int, ...]]) -> frozenset[int] | None:
    """The inner dimensions, or None if the members do not fit one frame. Dimensions of size 1 fit anywhere."""
    wide = frozenset(i for i, d in enumerate(frame) if d != 1)
    parallel = {op: frozenset(places[op][:len(parallel_dims(op))]) & wide for op in members}
    outer = wide
    for p in parallel.values():
        if p < outer:
            outer = p
    for op in members:
        reduced = frozenset(places[op][len(parallel_dims(op)):]) & wide
        if parallel[op] not in (outer, wide) or (reduced and (reduced != wide - outer or parallel[op] != outer)):
            return None
    return wide - outer


@register
@dataclass(frozen=True)
class Fuse(Pass):
    """See the module docstring. `by_columns`: a program takes many columns, where columns are summed (GPUs)."""

    name: ClassVar[str] = "fuse"
    max_members: int = 48
    max_values: int = 28
    parallel_enough: int = 32
    small: int = 1 << 14
    by_columns: bool = False

    def run(self, module: Operation, ctx: PassContext) -> None:
        names: dict[str, int] = {}
        for func in [f for f in module.body if f.name == "func"]:
            groups = self._group(func, ctx)
            for g in groups:
                _outline(g, names)
            topological_sort(func.body)
            ctx.remark("done", f"{sum(len(g.members) for g in groups)} structured ops in {len(groups)} kernels")

    def _group(self, func: Operation, ctx: PassContext) -> list[Group]:
        groups: list[Group] = []
        of: dict[Operation, Group] = {}
        position = {op: i for i, op in enumerate(func.body)}
        for op in func.body:
            if _is_reshape(op):
                continue  # of the result of a group, which gets that shape
            if op.name != "tensor.generic":
                if op.has_trait(Trait.Structured):
                    g = Group([])
                    g.add(op, (), [])
                    groups.append(g)
                    of[op] = g
                continue
            joined = None
            for g in self._candidates(op, of, position) if not op.attributes.get(UNPACKS) else ():
                fitted = self._fit(g, op)
                if fitted is None or _makes_cycle(g, op, of, position):
                    continue
                g.add(op, *fitted)
                joined = g
                break
            if joined is None:
                joined = frame_of(op)
                groups.append(joined)
            of[op] = joined
            if op is joined.contraction:
                self._take_prologue(joined, of, groups, ctx)
            if not op.attributes.get(UNPACKS):
                self._merge_producer_groups(op, joined, of, groups, position)
            self._merge_siblings(op, joined, of, groups, ctx.target.is_gpu)
        return groups

    def _take_prologue(self, g: Group, of: dict[Operation, Group], groups: list[Group], ctx: PassContext) -> None:
        """Ops that make an operand of the group's contraction for it alone, and that are a group by themselves."""
        assert g.contraction is not None
        for v in g.contraction.operands:
            maker = v.defining_op
            if maker is None or maker not in of or of[maker].everything != [maker]:
                continue
            if not unpacks(maker, g.contraction, ctx.target) and not makes_rows(maker, g.contraction, ctx.target):
                continue
            groups.remove(of[maker])
            of[maker] = g
            g.prologue.append(maker)
            g.values.update(maker.results)

    def _merge_siblings(self, op: Operation, g: Group, of: dict[Operation, Group], groups: list[Group], on_gpu: bool) -> None:
        """`op`, an epilogue of the group's contraction, also reads the result of another product of the same left operand (gate and up of a gated
        unit): both are computed side by side, and the left operand is read once."""
        if g.contraction is None or op is g.contraction:
            return
        for i, v in enumerate(op.operands):
            other = of.get(v.defining_op) if v.defining_op is not None else None
            if other is None or other is g or other.contraction is None or v.users != [op] or not _is_bare(other, len(g.frame), on_gpu):
                continue
            m = op["maps"][i]
            dims = plain_dims(m) if m is not None and fill_of(op, i) is None else None
            whole = dims is not None and [g.places[op][d] for d in dims] == list(range(len(g.frame)))
            if not whole or len([c for c in g.members if is_contraction(c)]) > 1 or not are_siblings(g.contraction, other.contraction, on_gpu):
                continue
            g.members[:0] = other.members
            g.places |= other.places
            g.values |= other.values
            g.prologue += other.prologue
            for member in other.everything:
                of[member] = g
            groups.remove(other)

    def _candidates(self, op: Operation, of: dict[Operation, Group], position: dict[Operation, int]) -> list[Group]:
        """Groups of the producers, that of a contraction first (an epilogue saves a pass over its result), then the one that saves most memory
        traffic and the latest among equals; then groups near by that read the same tensor."""
        producers = {v.defining_op: None for v in op.operands if v.defining_op in of}
        found = {id(of[p]): of[p] for p in sorted(producers, key=lambda p: (-_saved(of[p], op), -position[p]))}
        for v in op.operands:
            for user in v.users:
                if user in of and user is not op and position[op] - position[user] < 64 and not of[user].contraction:
                    found.setdefault(id(of[user]), of[user])
        return sorted((g for g in found.values() if _is_loop(g)), key=lambda g: g.contraction is None)

    def _merge_producer_groups(self, op: Operation, into: Group, of: dict[Operation, Group], groups: list[Group],
                               position: dict[Operation, int]) -> None:
        """Other groups that only feed this one, in the same frame, become part of it (two reductions of one row, say)."""
        for v in op.operands:
            other = of.get(v.defining_op) if v.defining_op is not None else None
            if other is None or other is into or other.contraction is not None or into.contraction is not None or not _is_loop(other):
                continue
            merged = self._union(other, into, op, v)
            if merged is None or _meet_outside(other, into, of, position):
                continue
            reduces = any(m["reductions"] for m in (*other.members, *into.members))
            if reduces and any(_makes_cycle(a, m, of, position) for a, b in ((other, into), (into, other)) for m in b.members):
                continue  # a row's statistics and what is made from them stay apart: else a loss in parts keeps the gradients of all its parts
            into.frame, into.places = merged
            into.members = sorted([*other.members, *into.members], key=position.__getitem__)
            into.values |= other.values
            for m in other.members:
                of[m] = into
            groups.remove(other)

    def _union(self, other: Group, into: Group, op: Operation, v: Value) -> tuple[list[Dim], dict[Operation, tuple[int, ...]]] | None:
        """Frame and places of the union, aligned through the read of `v` (made by `other`) by `op` (in `into`)."""
        producer = v.defining_op
        assert producer is not None
        to: dict[int, int] = {}
        for u, m in zip(op.operands, op["maps"], strict=True):
            if u is not v:
                continue
            wide = None if m is None else [(e, f) for e, f in zip(m, other.places[producer], strict=False) if other.frame[f] != 1]
            dims = plain_dims([e for e, _ in wide]) if wide is not None else None
            if wide is None or dims is None:
                return None
            for (_, a), d in zip(wide, dims, strict=True):
                b = into.places[op][d]
                if to.setdefault(a, b) != b or other.frame[a] != into.frame[b]:
                    return None
        free = [i for i in range(len(into.frame)) if i not in to.values()]
        for a, size in enumerate(other.frame):
            if a not in to:
                match = next((b for b in free if into.frame[b] == size), None)
                if match is None:
                    return None
                to[a] = match
                free.remove(match)
        places = dict(into.places)
        for m in other.members:
            places[m] = tuple(to[i] for i in other.places[m])
        members = [*other.members, *into.members]
        values = set().union(*(m.operands for m in members)) | other.values | into.values
        if len(members) > self.max_members or len(values) > 2 * self.max_values:
            return None
        if not _reads_agree(members, places) or split_frame(into.frame, members, places) is None:
            return None
        if not self._keeps_parallelism(into.frame, members, places) or self._counts_beside(into.frame, members, places):
            return None
        return into.frame, places

    def _fit(self, g: Group, op: Operation) -> tuple[tuple[int, ...], list[Dim]] | None:
        """The place of `op` in the (possibly extended) frame of `g`, or None if it does not fit."""
        if is_contraction(op) or len(g.members) >= self.max_members:
            return None
        if g.contraction is not None and PARTIAL in op.attributes:
            return (_place_of_part(g, op), g.frame) if _made_of(g, op) else None
        if g.contraction is not None and not (is_pointwise(op) and any(v in g.values for v in op.operands)):
            return None
        if len(set().union(*(m.operands for m in g.members), op.operands)) + len(g.values) > self.max_values:
            return None
        to = _alignment(g, op)
        if to is None:
            return None
        frame = list(g.frame)
        dims, parallel = op["dims"], len(parallel_dims(op))
        inner = split_frame(frame, g.members, g.places) or frozenset()
        free = [i for i in range(len(frame)) if i not in to.values()]
        for a in range(len(dims)):
            if a in to:
                continue
            match = next((b for b in free if frame[b] == dims[a] and (b in inner) >= (a >= parallel and bool(inner))), None)
            if match is not None:
                free.remove(match)
            elif g.contraction is not None:
                return None
            else:
                match = len(frame)
                frame.append(dims[a])
            to[a] = match
        place = tuple(to[a] for a in range(len(dims)))
        members, places = [*g.members, op], {**g.places, op: place}
        if g.contraction is not None:
            ok = sorted(place) == list(range(len(frame)))
        else:
            ok = (split_frame(frame, members, places) is not None and self._keeps_parallelism(frame, members, places)
                  and not self._counts_beside(frame, members, places))
        return (place, frame) if ok and _reads_agree(members, places) else None

    def _keeps_parallelism(self, frame: list[Dim], members: list[Operation], places: dict[Operation, tuple[int, ...]]) -> bool:
        inner = split_frame(frame, members, places)
        assert inner is not None
        if not inner or not any(is_pointwise(m) and len(set(places[m])) == len(frame) for m in members):
            return True
        outer, total = product(d for i, d in enumerate(frame) if i not in inner), product(frame)
        if isinstance(total, int) and total <= self.small:
            return True
        if not isinstance(outer, int):
            return True
        # What few programs get through in the time of some launches stays one kernel.
        long = isinstance(total, int) and total > 16 * self.small
        if self.by_columns and long and all(isinstance(n, int) for n in frame) and not any(reduces_rows(m) for m in members if m["reductions"]):
            outer //= SUMMED
        return outer >= self.parallel_enough

    def _counts_beside(self, frame: list[Dim], members: list[Operation], places: dict[Operation, tuple[int, ...]]) -> bool:
        """On GPUs: a number that takes the place of one that it is made from (the step of an optimizer) beside elements, with no sum that would need
        one kernel. All threads of a program read the old number, so it could not be written in place, and the copy is a launch as well."""
        if not self.by_columns or any(m["reductions"] for m in members):
            return False
        inner = split_frame(frame, members, places)
        numbers = [m for m in members if inner and not set(places[m]) & inner]
        return any(u.name == "tensor.assign" and u.operands[1] is r and u.operands[0] in m.operands
                   for m in numbers for r in m.results for u in r.users)


def _made_of(g: Group, op: Operation) -> bool:
    """The partial reduction reads what the product's group makes."""
    return any(v in g.values and PARTIAL not in v.defining_op.attributes for v in op.operands)  # type: ignore[union-attr]


def _place_of_part(g: Group, op: Operation) -> tuple[int, ...]:
    """The frame's dimension of each of a partial reduction's: the part, and the place in it, both are what is reduced."""
    place: dict[int, int] = {}
    for v, m in zip(op.operands, op["maps"], strict=True):
        if v in g.values and PARTIAL not in v.defining_op.attributes:  # type: ignore[union-attr]
            for x, f in zip(m, g.places[v.defining_op], strict=True):  # type: ignore[index]
                place |= dict.fromkeys((int(str(s)[1:]) for s in free_symbols(x)), f)
    return tuple(place.get(d, 0) for d in range(len(op["dims"])))


def _saved(g: Group, op: Operation) -> float:
    """Elements that need not be read (or stored) where `op` is in the group: what it makes, and what its loops read too."""
    read = set() if g.contraction is not None else {v for m in g.members for v in m.operands}
    return sum(_elements(v) for v in dict.fromkeys(op.operands) if v in g.values or v in read)


def _elements(v: Value) -> float:
    """How many elements a value has; more than any other where sizes are symbols."""
    n = v.type.numel  # type: ignore[attr-defined]
    return n if isinstance(n, int) else float("inf")


def _alignment(g: Group, op: Operation) -> dict[int, int] | None:
    """Which frame dimension each dimension of `op` must be, by the values it shares with the group; None on conflict."""
    to: dict[int, int] = {}

    def align(dims: list[int] | None, frame_dims: list[int]) -> bool:
        if dims is None or len(dims) != len(frame_dims):
            return False
        return all(to.setdefault(d, f) == f and op["dims"][d] == g.frame[f] for d, f in zip(dims, frame_dims, strict=True))

    internal = False
    for i, (v, m) in enumerate(zip(op.operands, op["maps"], strict=True)):
        if v in g.values:
            internal = True
            producer = v.defining_op
            assert producer is not None
            if m is None or fill_of(op, i) is not None:
                return None
            place = g.places[producer]
            wide = [(e, f) for e, f in zip(m, place, strict=False) if g.frame[f] != 1]
            if not align(plain_dims([e for e, _ in wide]), [f for _, f in wide]):
                return None
    if internal:
        return to if len(set(to.values())) == len(to) else None
    for v, m in zip(op.operands, op["maps"], strict=True):  # siblings: align by a tensor that both read whole
        dims = plain_dims(m) if m is not None else None
        for member in g.members:
            if m is None or v not in member.operands or member.name != "tensor.generic":
                continue
            mine = member["maps"][member.operands.index(v)]
            if mine == m and member["dims"] == op["dims"] and member["reductions"] == op["reductions"]:
                return dict(enumerate(g.places[member]))
            theirs = plain_dims(mine) if mine is not None else None
            if dims is not None and theirs is not None and len(dims) == len(op["dims"]):
                return to if align(dims, [g.places[member][d] for d in theirs]) and len(set(to.values())) == len(to) else None
    return None


def _reads_agree(members: list[Operation], places: dict[Operation, tuple[int, ...]]) -> bool:
    """Every value passed between members is read at the frame point at which it was made."""
    made = {r: op for op in members for r in op.results}
    for op in members:
        for i, (v, m) in enumerate(zip(op.operands, op["maps"], strict=True)):
            if v not in made:
                continue
            producer = made[v]
            if m is None or fill_of(op, i) is not None:
                return False
            for e, f, size in zip(m, places[producer], parallel_dims(producer), strict=False):
                if e == 0 and size == 1:
                    continue
                dims = plain_dims([e])
                if dims is None or places[op][dims[0]] != f:
                    return False
    return True


def _makes_cycle(g: Group, op: Operation, of: dict[Operation, Group], position: dict[Operation, int]) -> bool:
    """True if `op` depends on `g` through an op outside of it."""
    first = min(position[m] for m in g.everything)
    stack = [v.defining_op for v in op.operands if v.defining_op is not None and v not in g.values]
    seen: set[Operation] = set()
    while stack:
        p = stack.pop()
        if p in seen or (position[p] < first and p not in of):
            continue
        seen.add(p)
        group = of.get(p)
        if group is g:
            return True
        around = group.everything if group is not None else [p]
        if group is not None and max(position[m] for m in around) < first:
            continue
        seen.update(around)
        for m in around:
            for v in m.operands:
                if v.defining_op is None:
                    continue
                if v in g.values:
                    return True
                stack.append(v.defining_op)
    return False


def _meet_outside(one: Group, two: Group, of: dict[Operation, Group], position: dict[Operation, int]) -> bool:
    """True if a path leaves the two groups and comes back: as one kernel they would need what is made from their own results."""
    inside = {*one.everything, *two.everything}
    first = min(position[m] for m in inside)
    stack = [v.defining_op for m in inside for v in m.operands if v.defining_op is not None and v.defining_op not in inside]
    seen: set[Operation] = set()
    while stack:
        p = stack.pop()
        if p in inside:
            return True
        if p in seen or (position[p] < first and p not in of):
            continue
        group = of.get(p)
        around = group.everything if group is not None else [p]
        seen.update(around)
        if max(position[m] for m in around) >= first:
            stack += [v.defining_op for m in around for v in m.operands if v.defining_op is not None]
    return False


def _outline(g: Group, names: dict[str, int]) -> None:
    """Moves the members into a `tensor.fused` placed at the last of them."""
    inside = set(g.everything)
    inputs = list(dict.fromkeys(v for op in g.everything for v in op.operands if v.defining_op not in inside))
    outputs = [r for op in g.everything for r in op.results if any(u not in inside for u in r.users)]
    last = g.members[-1]
    block = Block([v.type for v in inputs], [v.name for v in inputs])
    region = Region([block])
    assert isinstance(last.parent, Block)
    shown = [view.result if (view := reshaping_view(r)) is not None else r for r in outputs]
    types = [TensorType(r.type.shape, r.type.dtype, r.type.strides) for r in shown]  # type: ignore[attr-defined]
    with_loc = Builder(last.parent, last, g.members[0].location)
    fused = with_loc.create("tensor.fused", inputs, {"kernel": _kernel_name(g, names)}, types, [region])
    for old, seen, new in zip(outputs, shown, fused.results, strict=True):
        new.name = seen.name
        seen.replace_uses_if(new, lambda user: user not in inside and user is not fused)
        if seen is not old:
            assert seen.defining_op is not None
            seen.defining_op.erase()
    for v, arg in zip(inputs, block.args, strict=True):
        v.replace_uses_if(arg, lambda user: user in inside)
    for op in g.everything:
        block.append(op.detach())
    Builder(block, None, last.location).create("tensor.yield", outputs)


def _kernel_name(g: Group, names: dict[str, int]) -> str:
    """A readable name from what the kernel does, numbered when it repeats."""
    parts: list[str] = []
    for op in g.members:
        if is_contraction(op):
            parts.append("matmul")
        elif op.name != "tensor.generic":
            parts.append(op.name.removeprefix("tensor."))
        elif op["reductions"]:
            parts.extend(op["combine"])
        parts.extend(o.name.removeprefix("arith.") for o in body_ops(op) if o.name not in (
            "arith.constant", "arith.cast", "arith.select", "tensor.index", "tensor.sym") and not is_contraction(op))
    name = "_".join(list(dict.fromkeys(p for p in parts if p != "none"))[:6]) or "copy"
    n = names[name] = names.get(name, 0) + 1
    return name if n == 1 else f"{name}_{n}"
