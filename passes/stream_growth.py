"""Growing a stream from its second contraction: walking back to what makes the middle space, and forward to what belongs to the result."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..ir import Block, Dim, Operation, Value, element_type, sym
from ..ir.dialects.tensor import fill_of, parallel_dims
from ..ir.expr import free_symbols, product, substitute
from ..ir.ranges import simplify
from .dead_region import dead_where
from .rescale import Declined
from .reshapes import inverted, matched, whole_of
from .stream_form import Stream
from .stream_legality import check_dependence, waits_for_itself
from .structured import is_contraction, is_pointwise, plain_dims

__all__ = ["MAX_WIDTH", "candidates", "grown"]

MAX_WIDTH = 256
"""Elements of the first contraction's summed dimension and of the second one's own: both are held whole by a program."""
MIN_LENGTH = 16
"""Shorter streams are no streams."""


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
        columns = [d for d in range(parallel) if d not in names and (seed["dims"][d] != 1 or d in in_v)]
        rows = [d for d in own if d < parallel]
        if not columns or not set(columns) <= in_v:
            raise Declined("no columns")
        self.block = seed.parent
        self.outer: set[Operation] = set()  # members that do not depend on the stream
        self.outside: set[tuple[Operation, tuple[Dim, ...]]] = set()  # found not to depend on it: walked once, however many paths lead there
        self.s = Stream({names[d]: seed["dims"][d] for d in names}, tuple(names[d] for d in names if d not in own),
                        tuple(names[d] for d in rows), tuple(names[d] for d in own if d >= parallel), tuple(seed["dims"][d] for d in columns))
        self.several = {f for f in self.s.rows if self.s.sizes[f] != 1}
        place = {**{d: sym(names[d]) for d in names}, **{d: sym(f"n{k}") for k, d in enumerate(columns)}}
        self.s.position[seed] = tuple(place.get(d, 0) for d in range(parallel))
        self.s.seconds.append(seed)
        self.bounds = {**{f: (0, n - 1) for f, n in self.s.sizes.items()}, **{f"n{k}": (0, n - 1) for k, n in enumerate(self.s.columns)}}
        env = {f"d{d}": e for d, e in place.items()}
        if not self.visit(seed.operands[which], tuple(simplify(substitute(e, env), self.bounds) for e in e_map)):
            raise Declined("the operand is not made from another contraction")

    # -- classification

    def _spans(self, exprs: Iterable[Dim]) -> tuple[bool, bool]:
        """Whether expressions move along rows (nothing moves along a single one), and along the stream. In a stream with one row, what does not move
        along the stream belongs to the row."""
        free = set().union(set(), *(free_symbols(e) for e in exprs))
        stream = bool(free & set(self.s.stream))
        return bool(free & self.several) if self.several else not stream, stream

    def _where(self, at: Iterable[Dim]) -> tuple[bool, bool]:
        """The same of a member's position: there is always a row."""
        rows, stream = self._spans(at)
        return rows or not self.several, stream

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
        if (op, at) in self.outside:
            return False
        depends = self._enter(op, at)
        if op not in self.s.position:
            self.outside.add((op, at))
        return depends

    def _enter(self, op: Operation, at: tuple[Dim, ...]) -> bool:
        rows, stream = self._where(at)
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
        if not depends and not (full and self.several and self._is_outer(op, at)):
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

    @property
    def extents(self) -> dict[str, Dim]:
        """Of the frame dimensions and the columns."""
        return {**self.s.sizes, **{f"n{k}": n for k, n in enumerate(self.s.columns)}}

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
            if not all(u in members for r in op.results for u in r.users) and whole_of(s.position[op], parallel_dims(op), self.extents) is None:
                raise Declined("a part of a result that is needed as a whole")

    # -- what else belongs to it

    def add_seconds(self) -> None:
        """Other contractions over the same stream and rows, with as many columns, also of what is made from the middle space by pointwise ops."""
        for made in [*self.s.full, *self.s.firsts]:
            self._add_readers(made)

    def _add_readers(self, made: Operation) -> bool:
        added = False
        for user in list({u: None for r in made.results for u in r.users}):
            if user in self.s.position or user.parent is not self.block:
                continue
            if is_contraction(user):
                added = self._add_second(made, user) or added
            elif is_pointwise(user) or self._reduces_stream(user):
                added = self._add_branch(made, user) or added
        return added

    def _reduces_stream(self, op: Operation) -> bool:
        return op.name == "tensor.generic" and tuple(op["dims"][len(parallel_dims(op)):]) == tuple(self.s.sizes[f] for f in self.s.stream)

    def _add_second(self, made: Operation, user: Operation) -> bool:
        place = self._place_second(user, next(i for i, v in enumerate(user.operands) if v.defining_op is made), made)
        if place is None:
            return False
        self.s.position[user] = place
        self.s.seconds.append(user)
        if waits_for_itself(self.s):
            self.s.position.pop(user)
            self.s.seconds.remove(user)
            return False
        return True

    def _add_branch(self, made: Operation, user: Operation) -> bool:
        """A pointwise op on the middle space from which contractions read (the weights rounded to 16 bits, say), or a reduction of it along the
        stream that nothing else of the stream reads (the sum of its weights, say)."""
        i = next(i for i, v in enumerate(user.operands) if v.defining_op is made)
        if user["maps"][i] is None or fill_of(user, i) is not None:
            return False
        place = matched(user["maps"][i], user["dims"], self.s.position[made], parallel_dims(made), self.s.sizes)
        if place is None or any(d not in place and n != 1 for d, n in enumerate(user["dims"])):
            return False
        for e, x in zip(user["maps"][i], self.s.position[made], strict=True):
            for d in _plain([e]):
                place.setdefault(d, x)  # of size 1
        if user["reductions"]:
            along = range(len(parallel_dims(user)), len(user["dims"]))
            if any(place.get(d, 0) != (sym(f) if self.s.sizes[f] != 1 else 0) for d, f in zip(along, self.s.stream, strict=True)):
                return False
        s, outer = self.s, set(self.outer)
        position, lists = dict(s.position), [list(x) for x in (s.firsts, s.full, s.reductions, s.row)]
        try:
            at = tuple(place.get(d, 0) for d in range(len(parallel_dims(user))))
            if self.visit(user.results[0], at) and (user["reductions"] or self._add_readers(user)) and not waits_for_itself(s):
                return True
        except Declined:
            pass
        s.position, (s.firsts, s.full, s.reductions, s.row), self.outer = position, lists, outer
        return False

    def _place_second(self, op: Operation, which: int, made: Operation) -> tuple[Dim, ...] | None:
        if fill_of(op, which) is not None:
            return None
        parallel = len(parallel_dims(op))
        place = matched(op["maps"][which], op["dims"], self.s.position[made], parallel_dims(made), self.s.sizes)
        if place is None:
            return None
        place |= {d: 0 for d in range(parallel) if op["dims"][d] == 1}
        in_v = _dims_of(op["maps"][1 - which])
        for d, e in place.items():
            summed, _ = (bool(free_symbols(e) & set(names)) for names in (self.s.stream, self.s.rows))
            if summed != (d >= parallel) or (summed and (str(e) not in self.s.stream or d not in _plain(op["maps"][which]))):
                return None
            if not summed and op["dims"][d] != 1 and bool(free_symbols(e) & set(self.s.rows)) == (d in in_v):
                return None
        columns = [d for d in range(parallel) if d not in place]
        if tuple(op["dims"][d] for d in columns) != self.s.columns or len(place) + len(columns) != len(op["dims"]):
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
        """Adds `op` if its dimensions are those of a finished contraction (or of the rows), in any order, split or joined."""
        place: dict[int, Dim] = {}
        for i, v in enumerate(op.operands):
            if op["maps"][i] is None or self.s.kind_of(v) == "":
                continue
            if self.s.kind_of(v) in ("first", "full") or fill_of(op, i) is not None:
                return False
            made = v.defining_op
            assert made is not None
            found = inverted(op["maps"][i], op["dims"], self.s.position[made], parallel_dims(made))
            if found is None or any(place.setdefault(d, e) != e for d, e in found.items()):
                return False
        at = tuple(place.get(d, 0) for d in range(len(op["dims"])))
        names = whole_of(at, op["dims"], self.extents)
        if names is None:
            return False  # it reads a part
        wanted = {f for f in (*self.s.batch, *self.s.rows) if self.s.sizes[f] != 1}
        tail = any(n not in wanted for n in names)
        if names != wanted | ({f"n{k}" for k, n in enumerate(self.s.columns) if n != 1} if tail else set()):
            return False
        s = self.s
        position, lists = dict(s.position), [list(x) for x in (s.firsts, s.full, s.reductions, s.row)]
        self.s.position[op] = at
        try:
            self._operands(op, at)  # its other operands may need members that the seed did not (the sum of a softmax)
            if waits_for_itself(s):
                raise Declined("an input depends on a result")
        except Declined:
            s.position, (s.firsts, s.full, s.reductions, s.row) = position, lists
            return False
        (self.s.tail if tail else self.s.row).append(op)
        return True


def grown(seed: Operation, which: int) -> Stream:
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
    if isinstance(s.length, int) and s.length < MIN_LENGTH:
        raise Declined("too short")
    if not element_type(seed.result.type).is_float:
        raise Declined("not floating point")
    order = {op: i for i, op in enumerate(seed.parent)}  # type: ignore[arg-type]
    for ops in (s.firsts, s.full, s.reductions, s.row, s.seconds, s.tail):
        ops.sort(key=order.__getitem__)
    check_dependence(s)
    s.alive = dead_where(s)
    return s


def candidates(block: Block | Iterable[Operation]) -> list[tuple[Operation, int]]:
    """Contractions that read something computed by another generic, operand by operand."""
    return [(op, i) for op in block if is_contraction(op) for i, v in enumerate(op.operands)
            if v.defining_op is not None and v.defining_op.name == "tensor.generic"]
