"""Streaming: chains contraction -> pointwise and row reductions -> contraction as one pass over the shared dimension.

The space in the middle, (batch, rows, stream), is never stored: a kernel walks `stream` in steps and keeps, for each row, the running
reductions and the running second contraction. A reduction may depend on an earlier one if the dependence can be rescaled (`rescale.py`).

Softmax times values with any elementwise change of the scores, any mask, and its backward (where log-sum-exp is an input) all have this form; no op
is recognised by name. Values of the middle space are computed anew by every stream that needs them.

After the pass `stream`, each such chain is a `tensor.fused` of its own; `analyse(ops)` finds the stream that the members of one form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import networkx as nx

from ..ir import Block, Builder, Dim, Operation, Region, Target, TensorType, Value, element_type, sym
from ..ir.dialects.tensor import fill_of, parallel_dims
from ..ir.expr import free_symbols, product, simplify, substitute
from ..ir.passes import Pass, PassContext, register
from .dead_region import Alive, dead_where
from .rescale import FREE, Declined, Dependence, Factor
from .stream_access import why_slow
from .structured import is_contraction, is_pointwise, plain_dims
from .topology import topological_sort

__all__ = ["Stream", "analyse"]

MAX_WIDTH = 256
"""Elements of the first contraction's summed dimension and of the second one's own: both are held whole by a program."""
MIN_ROWS = 16
"""With fewer rows there is nothing to reuse: the plain kernels are as good."""


@dataclass
class Stream:
    """One kernel. The frame's dimensions f0, f1, ... are split into `batch`, `rows` and `stream`; `sizes` has their extents.

    `position[op]` gives the op's parallel dimensions over the frame; columns of the seconds and of `tail` are n0, n1, ...
    """

    sizes: dict[str, Dim]
    batch: tuple[str, ...]
    rows: tuple[str, ...]
    stream: tuple[str, ...]
    columns: tuple[Dim, ...]
    position: dict[Operation, tuple[Dim, ...]] = field(default_factory=dict)
    firsts: list[Operation] = field(default_factory=list)
    full: list[Operation] = field(default_factory=list)
    reductions: list[Operation] = field(default_factory=list)
    row: list[Operation] = field(default_factory=list)
    seconds: list[Operation] = field(default_factory=list)
    tail: list[Operation] = field(default_factory=list)
    shifts: dict[Operation, Value | None] = field(default_factory=dict)
    scales: dict[Operation, list[tuple[Value, str, bool]]] = field(default_factory=dict)
    guarded: set[Operation] = field(default_factory=set)  # sums of products in which a select of 0 hides exp(-inf + inf)
    alive: Alive = field(default_factory=Alive)

    @property
    def members(self) -> list[Operation]:
        return [*self.firsts, *self.full, *self.reductions, *self.row, *self.seconds, *self.tail]

    def kind_of(self, v: Value) -> str:
        """Where an internal value lives: "first", "full", "reduction", "row", "second", "tail"; "" for a value from outside."""
        op = v.defining_op
        for kind, ops in (("first", self.firsts), ("full", self.full), ("reduction", self.reductions), ("row", self.row),
                          ("second", self.seconds), ("tail", self.tail)):
            if op in ops:
                return kind
        return ""

    def streamed(self, op: Operation) -> Value:
        """The operand of a second contraction that the stream computes; the other one is `op`'s own."""
        return next(v for v in op.operands if self.kind_of(v) in ("first", "full"))

    @property
    def row_count(self) -> Dim:
        return product(self.sizes[f] for f in self.rows)

    @property
    def length(self) -> Dim:
        return product(self.sizes[f] for f in self.stream)


# -- growing a stream from its second contraction -----------------------------------------------------------------------------


def _dims_of(m: Iterable[Dim]) -> set[int]:
    """Numbers of the dimensions that a map reads."""
    return {int(x[1:]) for e in m for x in free_symbols(e) if x[0] == "d" and x[1:].isdigit()}


def _plain(m: Sequence[Dim]) -> set[int]:
    """Those that it reads as they are, once."""
    single = [d for e in m if (d := plain_dims([e])) is not None]
    found = {d for d, in single}
    return {d for d in found if sum(d in _dims_of([e]) for e in m) == 1}


class _Growth:
    def __init__(self, seed: Operation, which: int):
        e_map, v_map = seed["maps"][which], seed["maps"][1 - which]
        parallel = len(parallel_dims(seed))
        in_e, in_v = _dims_of(e_map), _dims_of(v_map)
        names = {d: f"f{k}" for k, d in enumerate(sorted(in_e))}
        own = [d for d in names if d >= parallel or d not in in_v]  # rows and stream: read as they are, once
        if fill_of(seed, which) is not None or not set(range(parallel, len(seed["dims"]))) <= in_e or not set(own) <= _plain(e_map):
            raise Declined("the product does not read every point of the middle space once")
        columns = [d for d in range(parallel) if d not in names]
        rows = [d for d in own if d < parallel]
        if not rows or not columns or not set(columns) <= in_v:
            raise Declined("no rows or no columns")
        self.block = seed.parent
        self.outer: set[Operation] = set()  # members that do not depend on the stream
        self.s = Stream({names[d]: seed["dims"][d] for d in names}, tuple(names[d] for d in names if d not in own),
                        tuple(names[d] for d in rows), tuple(names[d] for d in own if d >= parallel), tuple(seed["dims"][d] for d in columns))
        place = {**{d: sym(names[d]) for d in names}, **{d: sym(f"n{k}") for k, d in enumerate(columns)}}
        self.s.position[seed] = tuple(place[d] for d in range(parallel))
        self.s.seconds.append(seed)
        self.bounds = {**{f: (0, n - 1) for f, n in self.s.sizes.items()}, **{f"n{k}": (0, n - 1) for k, n in enumerate(self.s.columns)}}
        env = {f"d{d}": e for d, e in place.items()}
        if not self.visit(seed.operands[which], tuple(simplify(substitute(e, env), self.bounds) for e in e_map)):
            raise Declined("the operand is not made from another contraction")

    # -- classification

    def _spans(self, exprs: Iterable[Dim]) -> tuple[bool, bool]:
        """Whether expressions move along rows, and along the stream."""
        free = set().union(set(), *(free_symbols(e) for e in exprs))
        return bool(free & set(self.s.rows)), bool(free & set(self.s.stream))

    def visit(self, v: Value, at: tuple[Dim, ...]) -> bool:
        """Takes in the producer of `v`, which is read at `at`; True if `v` depends on the stream."""
        op = v.defining_op
        if op is None or op.name != "tensor.generic" or op.parent is not self.block:
            return False
        known = self.s.position.get(op)
        if known is not None:
            if known != at:
                raise Declined("one value is read at two positions")
            return op not in self.outer
        rows, stream = self._spans(at)
        if is_contraction(op):
            return rows and stream and self._first(op, at)
        if is_pointwise(op):
            return self._pointwise(op, at, full=stream and rows)
        return rows and not stream and self._reduction(op, at)

    def _first(self, op: Operation, at: tuple[Dim, ...]) -> bool:
        width = product(op["dims"][len(at):])
        if not isinstance(width, int) or not 1 < width <= MAX_WIDTH:
            return False
        sides = [self._spans(self._reads(op, i, at)) for i in range(2)]
        if sorted(sides) != [(False, True), (True, False)]:
            return False
        self.s.position[op] = at
        self.s.firsts.append(op)
        return True

    def _reads(self, op: Operation, i: int, at: tuple[Dim, ...], reduced: Sequence[Dim] = ()) -> tuple[Dim, ...]:
        env = {f"d{j}": e for j, e in enumerate((*at, *reduced))}
        return tuple(simplify(substitute(e, env), self.bounds) for e in op["maps"][i])

    def _pointwise(self, op: Operation, at: tuple[Dim, ...], *, full: bool) -> bool:
        """A member if it depends on the stream, or if nothing that it reads has the middle space's size; else it is computed outside."""
        self.s.position[op] = at
        depends = self._operands(op, at)
        if not depends and not (full and self._is_outer(op, at)):
            del self.s.position[op]
            return False
        (self.s.full if full else self.s.row).append(op)
        if not depends:
            self.outer.add(op)
        return depends

    def _is_outer(self, op: Operation, at: tuple[Dim, ...]) -> bool:
        return all(m is not None and not all(self._spans(self._reads(op, i, at))) for i, m in enumerate(op["maps"]))

    def _reduction(self, op: Operation, at: tuple[Dim, ...]) -> bool:
        reduced = tuple(op["dims"][len(at):])
        if reduced != tuple(self.s.sizes[f] for f in self.s.stream) or any(c not in ("sum", "max", "min") for c in op["combine"]):
            return False
        self.s.position[op] = at
        if not self._operands(op, at, tuple(sym(f) for f in self.s.stream)):
            del self.s.position[op]
            return False
        self.s.reductions.append(op)
        return True

    def _operands(self, op: Operation, at: tuple[Dim, ...], reduced: tuple[Dim, ...] = ()) -> bool:
        depends = False
        for i, v in enumerate(op.operands):
            if op["maps"][i] is None:
                continue
            inside = self.visit(v, self._reads(op, i, at, reduced))
            if inside and fill_of(op, i) is not None:
                raise Declined("a padded read of the middle space")
            depends = depends or inside
        return depends

    def size_of(self, e: Dim) -> Dim | None:
        """The extent of a frame dimension or column that stands alone."""
        return {**self.s.sizes, **{f"n{k}": n for k, n in enumerate(self.s.columns)}}.get(str(e))

    # -- what the members may assume of each other

    def check_reads(self) -> None:
        """Members read each other where they are made, and contractions read from outside what is not streamed."""
        s = self.s
        for op in s.members:
            streamed = s.streamed(op) if op in s.seconds else None
            if op in s.seconds and op.operands[0] is op.operands[1]:
                raise Declined("a product of the middle space with itself")
            for i, v in enumerate(op.operands):
                made = v.defining_op
                if made is None or made not in s.position or v is streamed:
                    continue
                if op in s.firsts or op in s.seconds:
                    raise Declined("an input depends on a result")
                reduced = tuple(sym(f) for f in s.stream) if op in s.reductions else ()
                if op["maps"][i] is None or self._reads(op, i, s.position[op], reduced) != s.position[made]:
                    raise Declined("one value is read at two positions")

    def check_outputs(self) -> None:
        """What is read elsewhere is computed as a whole."""
        s = self.s
        members = set(s.members)
        for op in [*s.reductions, *s.row, *s.seconds, *s.tail]:
            if all(u in members for r in op.results for u in r.users):
                continue
            at = [e for e, n in zip(s.position[op], parallel_dims(op), strict=True) if n != 1]
            sizes = [n for n in parallel_dims(op) if n != 1]
            if len({str(e) for e in at}) != len(at) or any(self.size_of(e) != n for e, n in zip(at, sizes, strict=True)):
                raise Declined("a part of a result that is needed as a whole")

    # -- what else belongs to it

    def add_seconds(self) -> None:
        """Other contractions over the same stream and rows, with as many columns."""
        for made in [*self.s.full, *self.s.firsts]:
            for user in [u for r in made.results for u in r.users]:
                if user in self.s.position or not is_contraction(user) or user.parent is not self.block:
                    continue
                which = next(i for i, v in enumerate(user.operands) if v.defining_op is made)
                place = self._place_second(user, which, self.s.position[made])
                if place is not None:
                    self.s.position[user] = place
                    self.s.seconds.append(user)
                    if _waits_for_itself(self.s):
                        self.s.position.pop(user)
                        self.s.seconds.remove(user)

    def _place_second(self, op: Operation, which: int, at: tuple[Dim, ...]) -> tuple[Dim, ...] | None:
        dims = plain_dims(op["maps"][which])
        parallel = len(parallel_dims(op))
        if dims is None or fill_of(op, which) is not None:
            return None
        place: dict[int, Dim] = {}
        for d, e in zip(dims, at, strict=True):
            if (str(e) in self.s.stream) != (d >= parallel) or str(e) not in self.s.sizes:
                return None
            place[d] = e
        if any(op["dims"][d] != self.s.sizes[str(e)] for d, e in place.items()):
            return None  # it reads a part
        columns = [d for d in range(parallel) if d not in place]
        in_v = _dims_of(op["maps"][1 - which])
        if tuple(op["dims"][d] for d in columns) != self.s.columns or len(place) + len(columns) != len(op["dims"]):
            return None
        if any((str(e) in self.s.rows) == (d in in_v) for d, e in place.items() if d < parallel):
            return None
        place |= {d: sym(f"n{k}") for k, d in enumerate(columns)}
        return tuple(place[d] for d in range(parallel))

    def add_tail(self) -> None:
        """Pointwise readers of the finished contractions, and of the row values."""
        again = True
        while again:
            again = False
            for made in [*self.s.seconds, *self.s.tail, *self.s.reductions, *self.s.row]:
                for user in {u: None for r in made.results for u in r.users}:
                    if user not in self.s.position and is_pointwise(user) and user.parent is self.block and self._join_tail(user):
                        again = True

    def _join_tail(self, op: Operation) -> bool:
        """Adds `op` if each of its dimensions is one of a finished contraction's (or of the rows), in any order."""
        place: dict[int, Dim] = {}
        for i, v in enumerate(op.operands):
            if op["maps"][i] is None or self.s.kind_of(v) == "":
                continue
            if self.s.kind_of(v) in ("first", "full") or fill_of(op, i) is not None:
                return False
            dims = plain_dims(op["maps"][i])
            if dims is None:
                return False
            for d, e in zip(dims, self.s.position[v.defining_op], strict=True):  # type: ignore[index]
                if place.setdefault(d, e) != e:
                    return False
        if len({str(e) for e in place.values()}) != len(place):
            return False
        place |= {d: 0 for d, n in enumerate(op["dims"]) if d not in place and n == 1}  # a dimension that a view put in
        if len(place) != len(op["dims"]):
            return False
        at = tuple(place[d] for d in range(len(place)))
        if any(e != 0 and op["dims"][j] != self.size_of(e) for j, e in enumerate(at)):
            return False  # it reads a part
        wanted = {*self.s.batch, *self.s.rows}
        names = {str(e) for e in at if e != 0}
        tail = any(n not in wanted for n in names)
        if names != wanted | ({f"n{k}" for k in range(len(self.s.columns))} if tail else set()):
            return False
        s = self.s
        position, lists = dict(s.position), [list(x) for x in (s.firsts, s.full, s.reductions, s.row)]
        self.s.position[op] = at
        try:
            self._operands(op, at)  # its other operands may need members that the seed did not (the sum of a softmax)
            if _waits_for_itself(s):
                raise Declined("an input depends on a result")
        except Declined:
            s.position, (s.firsts, s.full, s.reductions, s.row) = position, lists
            return False
        (self.s.tail if tail else self.s.row).append(op)
        return True


# -- how each reduction depends on the earlier ones -----------------------------------------------------------------------------


def _check_dependence(s: Stream) -> None:
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


# -- entry points -------------------------------------------------------------------------------------------------------------


def _grown(seed: Operation, which: int) -> Stream:
    growth = _Growth(seed, which)
    growth.add_seconds()
    growth.add_tail()
    growth.check_reads()
    growth.check_outputs()
    s = growth.s
    if not s.firsts:
        raise Declined("no contraction makes the middle space")
    if any(set(v.users) & set(s.full) for op in s.seconds + s.tail for v in op.results):
        raise Declined("the middle space depends on the finished product")
    columns = product(s.columns)
    if not isinstance(columns, int) or columns > MAX_WIDTH:
        raise Declined(f"the product has more than {MAX_WIDTH} columns")
    if isinstance(s.row_count, int) and s.row_count < MIN_ROWS:
        raise Declined("too few rows")
    if isinstance(s.length, int) and s.length < MIN_ROWS:
        raise Declined("too short")
    if not element_type(seed.result.type).is_float:
        raise Declined("not floating point")
    order = {op: i for i, op in enumerate(seed.parent)}  # type: ignore[arg-type]
    for ops in (s.firsts, s.full, s.reductions, s.row, s.seconds, s.tail):
        ops.sort(key=order.__getitem__)
    _check_dependence(s)
    s.alive = dead_where(s)
    return s


def _candidates(block: Block | Iterable[Operation]) -> list[tuple[Operation, int]]:
    """Contractions that read something computed by another generic, operand by operand."""
    return [(op, i) for op in block if is_contraction(op) for i, v in enumerate(op.operands)
            if v.defining_op is not None and v.defining_op.name == "tensor.generic"]


def analyse(ops: Sequence[Operation]) -> Stream | None:
    """The stream whose members are exactly `ops` (all in one block); None if they form none."""
    for seed, which in reversed(_candidates(ops)):
        try:
            s = _grown(seed, which)
        except Declined:
            continue
        if set(s.members) == set(ops):
            return s
    return None


def _find_streams(func: Operation, target: Target, decline: Callable[[Operation, str], None]) -> list[Stream]:
    """Streams worth taking out of `func`; `decline(op, why)` hears about chains that come close."""
    found: list[Stream] = []
    covered: set[Operation] = set()
    for seed, which in reversed(_candidates(func.body)):
        if seed in covered:
            continue
        try:
            s = _grown(seed, which)
            if _waits_for_itself(s):
                raise Declined("an input depends on a result")
            slow = why_slow(s, target)
            if slow:
                raise Declined(slow)
        except Declined as why:
            if _near_miss(seed.operands[which]):
                decline(seed, str(why))
            continue
        found.append(s)
        covered.update(s.seconds)
    while True:
        members = {op for s in found for op in s.members}
        kept = [s for s in found if not _escapes(s, members)]
        for s in found:
            if s not in kept:
                decline(s.seconds[0], "a value of the middle space is needed in memory all the same")
        if len(kept) == len(found):
            circle = _circle(found)
            if circle is None:
                return found
            decline(circle.seconds[0], "kernels would wait for each other")
            kept = [s for s in found if s is not circle]
        found = kept


def _near_miss(v: Value) -> bool:
    """The operand comes from a contraction by way of a few generics."""
    for _ in range(4):
        op = v.defining_op
        if op is None or op.name != "tensor.generic":
            return False
        if is_contraction(op):
            return True
        if not op.operands:
            return False
        v = op.operands[0]
    return False


def _escapes(s: Stream, members: set[Operation]) -> bool:
    """Some value of the middle space has a reader outside all streams: it would be stored anyway."""
    return any(user not in members for op in [*s.firsts, *s.full] for r in op.results for user in r.users)


def _waits_for_itself(s: Stream) -> bool:
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


def _circle(streams: Sequence[Stream]) -> Stream | None:
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


def _describe(s: Stream) -> str:
    """For remarks: what streams over what."""
    kinds = [c for op in s.reductions for c in op["combine"]]
    sizes = "x".join(str(s.sizes[f]) for f in (*s.batch, *s.rows, *s.stream))
    return f"{len(s.firsts)} + {len(s.seconds)} contractions around [{', '.join(kinds)}] in the space {sizes}"



def _outline(streams: Sequence[Stream], name: Callable[[int], str]) -> None:
    """Makes each stream a `tensor.fused` of copies of its members, placed at the last of them, and erases the members.

    A value that two streams compute is stored by the first, for readers that are in no stream which computes it."""
    members = {op for s in streams for op in s.members}
    stored: dict[Value, Value] = {}
    for k, s in enumerate(streams):
        order = {op: i for i, op in enumerate(s.seconds[0].parent)}  # type: ignore[arg-type]
        inside = sorted(s.members, key=order.__getitem__)
        outputs = [r for op in inside for r in op.results if r not in stored and s.kind_of(r) not in ("first", "full") and _is_stored(r, streams)]
        if not outputs:
            continue  # its readers compute it themselves, or another stream stores it
        fused = _fused(s, inside, outputs, name(k))
        stored |= dict(zip(outputs, fused.results, strict=True))
    for old, new in stored.items():
        new.name = old.name
        old.replace_uses_if(new, lambda user: user not in members)
    left = sorted(members, key={op: i for i, op in enumerate(streams[0].seconds[0].parent)}.__getitem__)  # type: ignore[arg-type]
    for op in reversed(left):
        if not any(r.uses for r in op.results):
            op.erase()


def _is_stored(v: Value, streams: Sequence[Stream]) -> bool:
    """Some reader of `v` is in no stream, or in one that does not compute `v`."""
    for user in v.users:
        homes = [s for s in streams if user in s.position]
        if not homes or any(v.defining_op not in s.position for s in homes):
            return True
    return False


def _fused(s: Stream, members: Sequence[Operation], outputs: Sequence[Value], name: str) -> Operation:
    inside = set(members)
    inputs = list(dict.fromkeys(v for op in members for v in op.operands if v.defining_op not in inside))
    last = members[-1]
    assert isinstance(last.parent, Block)
    block = Block([v.type for v in inputs], [v.name for v in inputs])
    types = [TensorType(r.type.shape, r.type.dtype, r.type.strides) for r in outputs]  # type: ignore[attr-defined]
    at = Builder(last.parent, last, s.seconds[0].location)
    fused = at.create("tensor.fused", inputs, {"kernel": name, "why": f"streams {_describe(s)}"}, types, [Region([block])])
    renamed: dict[Value, Value] = dict(zip(inputs, block.args, strict=True))
    for op in members:
        block.append(op.clone(renamed))
    Builder(block, None, last.location).create("tensor.yield", [renamed[v] for v in outputs])
    return fused


@register
@dataclass(frozen=True)
class StreamPass(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "stream"

    def run(self, module: Operation, ctx: PassContext) -> None:
        for func in [f for f in module.body if f.name == "func"]:
            found = _find_streams(func, ctx.target, lambda op, why: ctx.remark("declined", f"no streaming: {why}", op.location))
            for s in found:
                ctx.remark("done", f"streams {_describe(s)}", s.seconds[0].location)
            if found:
                _outline(found, lambda k: "stream" if k == 0 else f"stream_{k + 1}")
                topological_sort(func.body)
