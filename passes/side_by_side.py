"""Small launches that do not depend on each other are marked to run side by side, on CPUs with several threads (the "parallel wall").

A launch of a few microseconds is not worth being shared by itself, and a loop (a recurrent layer) is one chain of launches: the towers of
a network, the two directions of an LSTM, the branches of a block then run one after the other on one thread. Here they are shared as one.

Before: host functions with `host.alloc` (`bufferize` has run). After: launches and loops that belong together stand next to each other with the
same number `beside`; `plan-memory` keeps what any of them touches alive through all of them, `check-plan` proves that none touches bytes that
another writes, and the code generator makes one shared launch of their programs. Results do not depend on who computes what.

Dependences are those of memory: an op may move past another if neither writes a buffer (views count as what they are views of) that the
other touches. Members are launches estimated below SPLIT nanoseconds and loops; a group is kept if the model of `ir/launch_cost.py` says that two
threads gain at least GAIN. Operator calls are boundaries: they end a native segment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..ir.core import Operation, Value
from ..ir.expr import product
from ..ir.launch_cost import Share, estimated_nanoseconds, share_of, side_by_side_gain
from ..ir.passes import Pass, PassContext, register
from .liveness import base_of

__all__ = ["SideBySide", "buffers_of"]

SPLIT = 100_000
"""Launches longer than this share their own programs among threads well enough."""
GAIN = 2_000
WINDOW = 64
"""Ops that one may move past."""
MEMBERS = 32
ROOM = 16 << 20
"""Bytes of results that a group may have: all of them are alive at once."""


@register
@dataclass(frozen=True)
class SideBySide(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "side-by-side"

    def run(self, module: Operation, ctx: PassContext) -> None:
        kernels = {op["sym_name"]: op for op in module.body if op.name == "tile.kernel"}
        functions = {op["sym_name"]: op for op in module.body if op.name == "func"}
        count = 0
        for func in functions.values():
            groups = _Finder(func, kernels, functions).worthwhile()
            if groups:
                _cached_first(func)
            for number, g in enumerate(groups, 1):
                _gather(g.anchor, g.members)
                for op in g.members:
                    op.attributes["beside"] = number
            count += len(groups)
            for g in groups:
                names = ", ".join(str((op["kernel"] if op.name == "host.launch" else op["body"]).name) for op in g.members)
                ctx.remark("done", f"{len(g.members)} launches side by side: {names}; {g.gain()} ns less on two threads", g.members[0].location)
        if not count:
            ctx.remark("declined", "no launches that gain by running side by side")


def buffers_of(op: Operation) -> tuple[list[Value], list[Value]]:
    """(what it reads, what it writes) of a launch, loop, copy, library or operator call; memory that others are views of."""
    if op.name == "host.copy":
        split = 1
    elif op.name == "host.extern":
        split = op["inputs"]
    else:
        split = len(op.operands) - op["outputs"]
    bases = [base_of(v) for v in op.operands]
    return bases[:split], bases[split:]


@dataclass
class _Touched:
    """Buffers that some ops read and write."""

    reads: set[Value] = field(default_factory=set)
    writes: set[Value] = field(default_factory=set)

    def add(self, other: _Touched) -> None:
        self.reads |= other.reads
        self.writes |= other.writes

    def conflicts(self, other: _Touched) -> bool:
        return not (self.writes.isdisjoint(other.reads) and self.writes.isdisjoint(other.writes) and self.reads.isdisjoint(other.writes))


@dataclass(eq=False)
class _Group:
    """Launches next to `anchor`, one of them; `between` is what ops touch that come after it and are not members."""

    anchor: Operation
    at: int
    members: list[Operation]
    shares: list[Share]
    bytes: int
    touched: _Touched
    between: _Touched = field(default_factory=_Touched)

    def gain(self) -> int:
        return side_by_side_gain(self.shares) if len(self.members) > 1 else 0


class _Finder:
    """Greedy, in program order: an op joins the first group above that it may move up to, or that may move down to it."""

    def __init__(self, func: Operation, kernels: Mapping[str, Operation], functions: Mapping[str, Operation]):
        self.func, self.kernels, self.functions = func, kernels, functions
        self.alone: set[Operation] = set()

    def worthwhile(self) -> list[_Group]:
        """Groups that gain. Members of others stay where they are, which the moves of the rest must respect: so it is tried again without them."""
        while True:
            groups = [g for g in self.groups() if len(g.members) > 1]
            poor = [op for g in groups if g.gain() < GAIN for op in g.members]
            if not poor:
                return groups
            self.alone.update(poor)

    def groups(self) -> list[_Group]:
        found: list[_Group] = []
        near: list[_Group] = []
        at = 0
        for op in self.func.body:
            if op.name not in _STEPS or op.attributes.get("cached"):
                continue
            at += 1
            if op.name == "host.extern":
                near.clear()
                continue
            reads, writes = buffers_of(op)
            touched = _Touched(set(reads), set(writes))
            near = [g for g in near if at - g.at <= WINDOW]
            share = None if op in self.alone else self.share(op)
            home = None if share is None else self._join(op, at, touched, share, near)
            for g in near:
                if home is None or g.at < home.at:  # what has moved up is not after the groups that stand below its own (see `worthwhile`)
                    g.between.add(touched)
            if share is not None and home is None:
                home = _Group(op, at, [op], [share], _written_bytes(op), touched)
                found.append(home)
                near.append(home)
        return found

    def _join(self, op: Operation, at: int, touched: _Touched, share: Share, near: list[_Group]) -> _Group | None:
        size = _written_bytes(op)
        for g in near:
            if g.touched.conflicts(touched) or len(g.members) >= MEMBERS or g.bytes + size > ROOM:
                continue
            if g.between.conflicts(touched):
                if g.between.conflicts(g.touched):
                    continue
                g.anchor, g.at, g.between = op, at, _Touched()  # the members so far move down to `op`, past everything between
                for other in near:
                    if other is not g:
                        other.between.add(g.touched)
            g.members.append(op)
            g.shares.append(share)
            g.bytes += size
            g.touched.add(touched)
            return g
        return None

    def share(self, op: Operation) -> Share | None:
        """Of a launch or loop that may be a member."""
        if op.name == "host.launch":
            kernel = self.kernels.get(op["kernel"].name)
            if kernel is None:
                return None
            estimate, programs = estimated_nanoseconds(kernel), product(kernel["grid"])
            if not isinstance(estimate, int) or not isinstance(programs, int) or (estimate > SPLIT and programs > 1):
                return None
            share = share_of(estimate, programs)
        elif op.name == "host.loop":
            inner = [self.part(step) for step in self.functions[op["body"].name].body if step.name in ("host.launch", "host.loop")]
            trips = op["trips"]
            if not isinstance(trips, int) or any(s is None for s in inner):
                return None
            whole = trips * sum(s.whole for s in inner if s is not None)
            share = Share(whole, whole, trips * sum(s.apart for s in inner if s is not None))
        else:
            return None
        return share if all(isinstance(n, int) for n in _written_sizes(op)) else None

    def part(self, op: Operation) -> Share | None:
        """Of a launch of a loop's body, however long."""
        kernel = self.kernels.get(op["kernel"].name) if op.name == "host.launch" else None
        if kernel is None:
            return self.share(op)
        estimate, programs = estimated_nanoseconds(kernel), product(kernel["grid"])
        return share_of(estimate, programs) if isinstance(estimate, int) and isinstance(programs, int) else None


def _written_sizes(op: Operation) -> list[Any]:
    return [v.type.numel * v.type.dtype.bytes for v in op.operands[len(op.operands) - op["outputs"]:]]  # type: ignore[attr-defined]


def _written_bytes(op: Operation) -> int:
    return sum(n for n in _written_sizes(op) if isinstance(n, int))


_STEPS = ("host.launch", "host.loop", "host.copy", "host.library", "host.extern")


def _cached_first(func: Operation) -> None:
    """Launches that run once per parameter, and their buffers, to the front: whatever reads their results may move up then."""
    first = next(op for op in func.body if op.name in _STEPS and not op.attributes.get("cached"))
    ops = func.body.ops
    at = ops.index(first)
    before = set(ops[:at])
    for op in ops[at:]:
        if op.name == "host.launch" and op["cached"]:
            for v in op.operands:
                _lift(v, first, before)
            op.move_before(first)


def _gather(anchor: Operation, members: list[Operation]) -> None:
    """Moves all next to the anchor: those above it down, those below it up, with what makes their buffers."""
    assert anchor.parent is not None
    ops = anchor.parent.ops
    position = {op: i for i, op in enumerate(ops)}
    before = set(ops[:position[anchor]])
    ordered = sorted(members, key=position.__getitem__)
    for op in ordered:
        if position[op] > position[anchor]:
            for v in op.operands:
                _lift(v, anchor, before)
    following = anchor.next
    while following in members:
        following = following.next
    assert following is not None, "a function ends with 'return'"
    for op in ordered:
        op.move_before(following)


def _lift(v: Value, place: Operation, before: set[Operation]) -> None:
    """The op that makes a buffer, and those that it is a view of, stand before `place`."""
    made = v.defining_op
    if made is None or made in before:
        return
    for inner in made.operands:
        _lift(inner, place, before)
    made.move_before(place)
    before.add(made)
