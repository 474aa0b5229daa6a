"""Streams of few programs are split over the stream, so that every multiprocessor has a part of a long cache (flash-decoding, by algebra).

A stream (`stream.py`) of few rows has a program per key head and batch element, and each walks the whole cache. Here its chain is rewritten into
the same chain over parts of the stream, a dimension `part` in front of the rows, and a small second step that combines them:

    m_p, l_p, a_p = max, sum, weighted sum of part p                (one stream, with `parts` times the programs)
    m = max_p m_p      l = sum_p l_p * exp(m_p - m)      a = sum_p a_p * exp(m_p - m)

which is how `rescale.py` corrects a running sum when its maximum moves, applied once per part instead of once per step. Row values that only scale
(softmax's divisor) are left out of the parts and applied to the combined sum. So any change of the scores and any mask that streams also splits, and
so do several reductions or products over one middle space. A part that is masked throughout has maximum -inf and sums of 0 (`m_p` is read as 0 then).

Batch dimensions that the streamed operands read in groups only (query heads that share a key head) become rows: a tile has all of a group's.
Parts are of equal length where some divisor of it is near what is wanted; else the last one is short, and what lies past the end is masked.

After the pass nothing is fused yet: `stream` finds the chain of the parts as it finds any other. The number of parts is modelled (`parts_of`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..ir import Builder, Dim, Operation, Target, Value, element_type, sym
from ..ir.dialects.tensor import fill_of, parallel_dims
from ..ir.expr import as_int, ceildiv, free_symbols, product, substitute
from ..ir.passes import Pass, PassContext, register
from ..ir.ranges import simplify
from .rescale import Declined, finite_of
from .stream_access import reduced_order, stream_side
from .stream_form import Stream
from .stream_growth import candidates, grown
from .stream_legality import escapes, waits_for_itself
from .structured import body_ops, identity_map, identity_of, index_value, rebuild, space_bounds
from .topology import topological_sort

__all__ = ["MOST_PARTS", "SplitStreams", "parts_of"]

MOST_PARTS = 64
LEAST = 128
"""Steps that a part has at least: less would not pay for its start, and for reading its results again."""
PER_PROCESSOR = 2
"""Programs that a multiprocessor runs at a time: while one waits for its first loads, the other computes."""
STEP = 64
"""Ragged parts are multiples of this, so that only the last one is short."""
UNKNOWN_PARTS = 16
"""Parts at most of a stream whose length is not known when compiling: it may be short."""


def parts_of(s: Stream, target: Target, groups: Mapping[str, int]) -> int:
    """How many parts pay. 1 where there are programs enough, or where partial results would outweigh what is streamed."""
    sizes = [s.sizes[f] // groups.get(f, 1) if isinstance(s.sizes[f], int) else 1 for f in s.batch]  # type: ignore[operator]
    rows = s.row_count * product(groups.values())
    if not isinstance(rows, int):
        return 1
    programs = as_int(product(sizes)) * as_int(ceildiv(rows, 64))
    wanted = PER_PROCESSOR * max(1, target.multiprocessors) // max(1, programs)
    if not isinstance(s.length, int):
        return min(wanted, UNKNOWN_PARTS)
    streamed = sum(_step_bytes(op) for op in s.firsts) + sum(as_int(product(s.columns)) * 2 for _ in s.seconds)
    kept = rows * 4 * (as_int(product(s.columns)) * len(s.seconds) + len(s.reductions)) * 2  # a part's results, written and read
    affordable = s.length * streamed // (4 * max(1, kept))
    return max(1, min(wanted, MOST_PARTS, s.length // LEAST, affordable))


def _step_bytes(op: Operation) -> int:
    width = as_int(product(op["dims"][len(op["dims"]) - op["reductions"]:]))
    return width * min(element_type(v.type).bytes for v in op.operands)


def _even(length: int, wanted: int) -> int:
    """The divisor of `length` nearest to `wanted`, within a third of it; 0 if there is none."""
    near = [p for p in range(max(2, -(-2 * wanted // 3)), min(MOST_PARTS, 4 * wanted // 3) + 1) if length % p == 0]
    return min(near, key=lambda p: (abs(p - wanted), p), default=0)


@register
@dataclass(frozen=True)
class SplitStreams(Pass):
    """See the module docstring. `parts`: this many instead of what is modelled (0)."""

    name: ClassVar[str] = "split-streams"
    parts: int = 0

    def run(self, module: Operation, ctx: PassContext) -> None:
        if not ctx.target.is_gpu:
            ctx.remark("note", "streams are split on GPUs only")
            return
        for func in [f for f in module.body if f.name == "func"]:
            changed = False
            for seed, which in reversed(candidates(func.body)):
                if seed.parent is None or not seed.operands:
                    continue  # erased with a chain before it
                changed = self._consider(seed, which, ctx) or changed
            if changed:
                topological_sort(func.body)

    def _consider(self, seed: Operation, which: int, ctx: PassContext) -> bool:
        try:
            s = grown(seed, which)
            if waits_for_itself(s) or escapes(s, set(s.members)):
                return False
            groups = _groups(s)
            wanted = self.parts or parts_of(s, ctx.target, groups)
            if wanted < 2:
                return False
            _Split(s, groups, wanted).run()
        except Declined as why:
            ctx.remark("note", f"a stream is not split: {why}", seed.location)
            return False
        ctx.remark("done", f"a stream of {s.length} steps in about {wanted} parts, {s.row_count * product(groups.values())} rows each", seed.location)
        return True


def _groups(s: Stream) -> dict[str, int]:
    """Batch dimensions that all operands walked along the stream read as f // g, and nothing else of f: {f: g}."""
    found: dict[str, int] = {}
    sides = [(op, stream_side(s, op)) for op in s.firsts]
    sides += [(op, next(i for i, v in enumerate(op.operands) if v is not s.streamed(op))) for op in s.seconds]
    for f in s.batch:
        size, seen = s.sizes[f], set[int | None]()
        if not isinstance(size, int):
            continue
        for op, i in sides:
            env = {f"d{j}": x for j, x in enumerate(s.position[op])}
            seen |= {_divisor(x, f, size) for e in op["maps"][i] if f in free_symbols(x := substitute(e, env))}
        g = seen.pop() if len(seen) == 1 else None
        if g is not None:
            found[f] = g
    return found


def _divisor(x: Dim, f: str, size: int) -> int | None:
    """g where x is f // g, for an f of `size`."""
    return next((g for g in range(2, size + 1) if size % g == 0 and x == sym(f) // g), None)


class _Split:
    """The rewriting of one stream. Spaces are lists of names: frame dimensions of the parts' stream, columns n0, n1, ..., and what products sum
    over, k0, k1, ..."""

    def __init__(self, s: Stream, groups: Mapping[str, int], wanted: int):
        if len(s.stream) != 1:
            raise Declined("the stream has several dimensions")
        self.s, self.t = s, s.stream[0]
        length = s.length
        parts = _even(length, wanted) if isinstance(length, int) else 0
        self.ragged = parts == 0
        if self.ragged:
            self.chunk = ceildiv(ceildiv(length, wanted), STEP) * STEP
            parts = as_int(ceildiv(length, self.chunk)) if isinstance(length, int) else wanted
            if any(m is None for op in s.members for m in op["maps"]) or any(o.name == "tensor.require" for op in s.members for o in body_ops(op)):
                raise Declined("a gather would read past the end of the last part")
        else:
            self.chunk = length // parts  # type: ignore[operator]
        self.sizes: dict[str, Dim] = {f: n // groups[f] if f in groups else n for f, n in s.sizes.items()}  # type: ignore[operator]
        self.sizes |= {self.t: self.chunk, "part": parts} | {f"{f}g": g for f, g in groups.items()}
        self.sizes |= {f"n{k}": n for k, n in enumerate(s.columns)}
        self.head = [*s.batch, "part", *(f"{f}g" for f in groups), *s.rows]
        self.columns = [f"n{k}" for k in range(len(s.columns))]
        self.env: dict[str, Dim] = {f: sym(f) * g + sym(f"{f}g") for f, g in groups.items()}
        self.env[self.t] = sym("part") * self.chunk + sym(self.t)
        self.groups = groups
        for op in [*s.reductions, *s.seconds]:
            self._place_of(op)  # Declined if it stands askew
            if any(c == "sum" for c in op["combine"]) and element_type(op.result.type).name not in ("f32", "f64"):
                raise Declined("a sum in 16 bits")
        self.partial: dict[Value, Value] = {}
        self.spaces: dict[Value, list[str]] = {}
        self.shifts = {m for m in s.shifts.values() if m is not None}
        self.safe: dict[Value, Value] = {}
        self.combined: dict[tuple[Value, Operation], Value] = {}
        self.units = {w for rows in s.scales.values() for w, *_ in rows}

        for op in [*s.full, *s.reductions]:
            for v in op.operands:
                if s.kind_of(v) in ("reduction", "row") and self._shift(v) is None and v not in self.units:
                    raise Declined("the loop reads a finished row value")

    def _shift(self, v: Value) -> Value | None:
        """The maximum that `v` is, if need be made finite."""
        m = v if v in self.shifts else finite_of(v) if self.s.kind_of(v) == "row" else None
        return m if m in self.shifts else None

    def run(self) -> None:
        s = self.s
        order = {op: i for i, op in enumerate(s.seconds[0].parent)}  # type: ignore[arg-type]
        inside = sorted([*s.firsts, *s.full, *s.reductions, *s.seconds], key=order.__getitem__)
        b = Builder(s.seconds[0].parent, inside[-1], s.seconds[0].location)  # type: ignore[arg-type]
        for op in inside:
            with b.at(op.location):
                self._part(b, op)
        for op in s.tail:
            self._widen(b, op)
        gone = set(inside)
        for op in sorted(s.row, key=order.__getitem__, reverse=True):
            if all(u in gone for r in op.results for u in r.users):
                gone.add(op)  # the loop alone read it
        for op in inside:
            old = op.results[0]
            if op in s.seconds or (op in s.reductions and any(u not in gone for u in old.users)):
                with b.at(op.location):
                    new = self._over(b, old, op)
                new.name, new.type = old.name, old.type
                old.replace_uses_if(new, lambda user: user not in gone)
        for op in sorted(gone, key=order.__getitem__, reverse=True):
            op.erase()

    # -- the parts

    def _space(self, op: Operation) -> list[str]:
        """Names of the result's dimensions."""
        kind = self.s.kind_of(op.results[0])
        return [*self.head, *([self.t] if kind in ("first", "full") else self.columns if kind == "second" else [])]

    def _part(self, b: Builder, op: Operation) -> None:
        """A copy of a member over the parts."""
        s, space = self.s, self._space(op)
        own = [f"k{k}" for k in range(op["reductions"])] if op in s.firsts else []
        reduced = own if op in s.firsts else [self.t] * bool(op["reductions"])
        names = [*space, *reduced]
        dims = [self.sizes[f] if f in self.sizes else op["dims"][len(parallel_dims(op)) + int(f[1:])] for f in names]
        bounds = space_bounds(dims)
        number = {f: sym(f"d{j}") for j, f in enumerate(names)}
        summed = [sym(f) for f in own] if op in s.firsts else [sym(f) for f in self._reduced(op)]
        place = {j: simplify(substitute(substitute(x, self.env), number), bounds) for j, x in enumerate((*s.position[op], *summed))}
        operands: list[Value] = []
        maps: list[Any] = []
        fills: list[Any] = []
        units: list[int] = []
        loop = op in s.full or op in s.reductions
        env = {f"d{j}": x for j, x in place.items()}
        for i, v in enumerate(op.operands):
            m, fill = op["maps"][i], fill_of(op, i)
            if v in self.units and loop:
                units.append(i)
            if loop and (m_of := self._shift(v)) is not None:
                v = self._safe(b, m_of)
            elif v in self.partial:
                v = self.partial[v]
            elif m is not None:
                m = tuple(simplify(substitute(e, env), bounds) for e in m)
                if self.ragged and fill is None and any("part" in self._names_of(e, names) for e in m):
                    fill = False if element_type(v.type).kind == "bool" else 0
            if v in self.spaces:
                m = tuple(number[f] for f in self.spaces[v])
            operands.append(v)
            maps.append(m)
            fills.append(fill)
        made = rebuild(op, b, operands, maps, fills, dims, place, len(reduced))
        for i in reversed(units):
            _without_unit(made, i)
        if self.ragged and op not in s.firsts and op not in s.full:
            made = self._masked(made, op, len(names) - 1)
        for old, new in zip(op.results, made.results, strict=True):
            self.partial[old] = new
            self.spaces[new] = space

    def _names_of(self, e: Dim, names: Sequence[str]) -> set[str]:
        return {names[int(x[1:])] for x in free_symbols(e) if x[0] == "d" and x[1:].isdigit()}

    def _reduced(self, op: Operation) -> list[str]:
        if op in self.s.seconds:
            return reduced_order(self.s, op, next(i for i, v in enumerate(op.operands) if v is self.s.streamed(op)))
        return [self.t] if op["reductions"] else []

    def _safe(self, b: Builder, m: Value) -> Value:
        """A part's maximum, or 0 where it is -inf."""
        if m not in self.safe:
            made = self.partial[m]
            space = self.spaces[made]
            at = tuple(sym(f"d{j}") for j in range(len(space)))
            self.safe[m] = b.generic([made], [at], [self.sizes[f] for f in space], lambda i, x: _finite(i, x)).result
            self.spaces[self.safe[m]] = space
        return self.safe[m]

    def _masked(self, made: Operation, op: Operation, t: int) -> Operation:
        """What a ragged part sums past the end of the stream is neutral."""
        at = simplify(sym(f"d{self.head.index('part')}") * self.chunk + sym(f"d{t}"), space_bounds(made["dims"]))
        if op in self.s.seconds:  # by a member in between, since a contraction is bare
            which = next(i for i, v in enumerate(op.operands) if v is self.s.streamed(op))
            v = made.operands[which]
            if v not in self.safe:
                b = Builder.before_op(made)
                dims = [self.sizes[f] for f in self.spaces[v]]
                inside = substitute(at, {f"d{t}": sym(f"d{len(dims) - 1}")})
                self.safe[v] = b.generic([v], [tuple(sym(f"d{j}") for j in range(len(dims)))], dims,
                                         lambda i, x: i.arith("select", _before(i, inside, self.s.length, made), x, 0)).result
                self.spaces[self.safe[v]] = self.spaces[v]
            made.set_operand(which, self.safe[v])
            return made
        end = made.body.terminator
        i = Builder(made.body, end, made.location)
        on = _before(i, at, self.s.length, made)
        for k, (kind, y) in enumerate(zip(op["combine"], list(end.operands), strict=True)):
            end.set_operand(k, i.arith("select", on, y, identity_of(kind, element_type(y.type))))
        return made

    # -- putting them together

    def _place_of(self, op: Operation) -> dict[str, Dim]:
        """Each name of the parts' frame, but `part` and the stream, over the dimensions of op's result."""
        found: dict[str, Dim] = {f: 0 for f in (*self.s.batch, *self.s.rows, *(f"n{k}" for k in range(len(self.s.columns))))
                                 if ({**self.s.sizes, **{f"n{k}": n for k, n in enumerate(self.s.columns)}})[f] == 1}
        for j, x in enumerate(self.s.position[op]):
            if isinstance(x, int):
                continue
            found[str(x)] = sym(f"d{j}")
        needed = {*self.s.batch, *self.s.rows, *(f"n{k}" for k in range(len(self.s.columns)) if self.s.kind_of(op.results[0]) in ("second", "tail"))}
        if not needed <= set(found):
            raise Declined("a result stands askew in the space of the stream")
        for f, g in self.groups.items():
            found[f], found[f"{f}g"] = found[f] // g, found[f] % g
        return found

    def _over(self, b: Builder, v: Value, op: Operation) -> Value:
        """A finished row value or product, over the result's dimensions of `op`: where a product is combined, so are the row values that it
        needs, each time anew. They are few, and all of it is one kernel then."""
        if (v, op) not in self.combined:
            made = v.defining_op
            assert made is not None
            value = self._row(b, made, v, op) if made in self.s.row else self._scaled(b, made, self._sum_of_parts(b, made, op), op)
            self.combined[v, op] = value
        return self.combined[v, op]

    def _widen(self, b: Builder, op: Operation) -> None:
        """A reader of a finished product reads the row values beside it where that does (softmax's divisor)."""
        k = next((k for k, v in enumerate(op.operands) if self.s.kind_of(v) in ("second", "tail")), None)
        if k is None or op["maps"][k] is None:
            return
        beside = op.operands[k].defining_op
        assert beside is not None
        try:
            self._place_of(beside)
        except Declined:
            return
        maps = list(op["maps"])
        for i, v in enumerate(op.operands):
            if self.s.kind_of(v) in ("reduction", "row") and maps[i] is not None:
                with b.at(op.location):
                    op.set_operand(i, self._over(b, v, beside))
                maps[i] = maps[k]
        op.attributes["maps"] = tuple(maps)

    def _at(self, op: Operation) -> dict[str, Dim]:
        """The frame's dimensions over those of op's result."""
        return {str(x): sym(f"d{j}") for j, x in enumerate(self.s.position[op]) if not isinstance(x, int)}

    def _row(self, b: Builder, made: Operation, v: Value, op: Operation) -> Value:
        """A pointwise op on finished row values."""
        dims = parallel_dims(op)
        bounds, at = space_bounds(dims), self._at(op)
        place = {j: simplify(substitute(x, at), bounds) for j, x in enumerate(self.s.position[made])}
        env = {f"d{j}": x for j, x in place.items()}
        operands, maps = [], []
        for x, m in zip(made.operands, made["maps"], strict=True):
            inner = self.s.kind_of(x) in ("reduction", "row")
            operands.append(self._over(b, x, op) if inner else x)
            maps.append(identity_map(len(dims)) if inner else None if m is None else tuple(simplify(substitute(e, env), bounds) for e in m))
        fills = [fill_of(made, i) for i in range(len(made.operands))]
        return rebuild(made, b, operands, maps, fills, dims, place).results[made.results.index(v)]  # type: ignore[arg-type]

    def _sum_of_parts(self, b: Builder, made: Operation, op: Operation) -> Value:
        s, dims = self.s, [*parallel_dims(op), self.sizes["part"]]
        bounds = space_bounds(dims)
        place = self._place_of(op) | {"part": sym(f"d{len(dims) - 1}")}

        def read(v: Value) -> tuple[Dim, ...]:
            return tuple(simplify(substitute(sym(f), place), bounds) for f in self.spaces[v])

        part, m, guarded = self.partial[made.results[0]], s.shifts[made], made in s.guarded
        if m is None:
            combine = ("sum",) if made in s.seconds else made["combine"]
            return b.generic([part], [read(part)], dims, lambda _, x: x, reductions=1, combine=combine).result
        here = self.partial[m]

        def weighed(i: Builder, x: Value, low: Value, top: Value) -> Value:
            low, top = i.cast(low, element_type(x.type)), i.cast(top, element_type(x.type))
            return i.arith("mul", x, i.arith("exp", i.arith("sub", low, _finite(i, top) if guarded else top)))

        return b.generic([part, here, self._over(b, m, op)], [read(part), read(here), identity_map(len(dims) - 1)], dims, weighed,
                         reductions=1, combine=("sum",)).result

    def _scaled(self, b: Builder, made: Operation, value: Value, op: Operation) -> Value:
        """A combined sum times the row values that were left out of its terms."""
        at = identity_map(len(parallel_dims(op)))
        for w, kind, guarded in self.s.scales[made]:
            def scaled(i: Builder, x: Value, by: Value, kind: str = kind, guarded: bool = guarded) -> Value:
                y = i.arith(kind, x, i.cast(by, element_type(x.type)))
                return i.arith("select", i.arith("eq", x, 0), x, y) if guarded else y

            value = b.generic([value, self._over(b, w, op)], [at, at], parallel_dims(op), scaled).result
        return value


def _finite(b: Builder, m: Value) -> Value:
    """m, or 0 where it is -inf."""
    return b.arith("select", b.arith("eq", m, float("-inf")), 0, m)


def _before(b: Builder, at: Dim, end: Dim, like: Operation) -> Value:
    """at < end, inside a body."""
    return b.arith("lt", index_value(b, at, like), index_value(b, end, like))


def _without_unit(made: Operation, i: int) -> None:
    """Operand i of a member, by which its body multiplies or divides, counts as 1."""
    arg, body = made.body.args[i], made.body
    one: Value | None = None
    for user in list(arg.users):
        if user.name in ("arith.mul", "arith.div") and user.operands[1] is arg and user.operands[0] is not arg:
            user.result.replace_all_uses_with(user.operands[0])
            user.erase()
        elif user.name == "arith.mul" and user.operands[0] is arg:
            user.result.replace_all_uses_with(user.operands[1])
            user.erase()
        elif one is None:
            one = Builder(body, body.ops[0], made.location).constant(1, element_type(arg.type))
    if one is not None:
        arg.replace_all_uses_with(one)
    body.erase_arg(i)
    made.set_operands([v for k, v in enumerate(made.operands) if k != i])
    for name in ("maps", "fills"):
        if name in made.attributes:
            made.attributes[name] = tuple(x for k, x in enumerate(made.attributes[name]) if k != i)
