"""Which steps of a stream a block of rows needs, found from the data that its masks read.

    bounds = block_ranges(stream, builder)       # tensors [*batch, blocks of rows]

A condition such as `doc[q] == doc[k]` says nothing while compiling. But each side of it moves along the rows or along the steps alone, so its
smallest and largest value in a block of rows (or of steps) says what the condition can be in a whole tile:

    a == b     can hold if  min a <= max b  and  min b <= max a          must hold if  max a <= min b  and  max b <= min a
    a < b      can hold if  min a < max b                                must hold if  max a < min b

and "and", "or", "not" of conditions follow. No mask is known by name: documents, padding, prefixes and lengths are all this. A mask that is itself a
tensor over rows and steps has smallest and largest values of whole tiles. Two small kernels find the ranges: blocks' smallest and largest values,
then for each block of rows

    first, end          the steps (in blocks) outside of which no condition can hold: the loops leave them out
    full_first, full_end    within them, a run of blocks in which every condition must hold: no mask is needed there

Where the steps that are needed are several runs, `first` to `end` spans them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..ir import DTYPES, Builder, Dim, ScalarType, Value, element_type, sym
from ..ir.expr import as_int, ceildiv, minimum, product, substitute
from ..ir.ranges import delinearize, simplify, split_linear
from .mask_tree import COMPARISONS, Tree, loads_data, parts_of, symbols_of
from .stream_form import Stream
from .structured import index_value, space_bounds

__all__ = ["BLOCK", "COUNT", "block_ranges", "worth_ranges"]

BLOCK = 64
"""Rows, and steps, of a block: tiles have as many, half or twice as many."""
FEWEST_ROWS = 64
COUNT = 4
"""Tensors of `block_ranges`: first, end, full_first, full_end."""
LEAST_WORK = 4e9
"""Operations in a stream's products from which its tiles are worth two small kernels (on an H100 about 15 microseconds)."""
WORK_OF_A_POINT = 32768.0
"""Operations for each element of a mask over rows and steps from which reading it once more is worth it: 64 heads of 128 that share it. Measured on
an H200: 0.9 ms for 67 million elements, in blocks of 64 by 64."""
I64 = DTYPES["i64"]

Interval = tuple[Value, Value]
Span = tuple[Value, Value]
"""Whether a condition can hold in a tile, and whether it must."""


def worth_ranges(s: Stream) -> bool:
    """There is work enough, all sizes are known, and a program walks one dimension."""
    width = sum((product(op["dims"][len(s.position[op]):]) for op in s.firsts), 0) + len(s.seconds) * product(s.columns)
    work, rows = 2 * width * product(s.sizes.values()), s.row_count
    if not s.alive.data or len(s.stream) != 1 or not isinstance(work, int) or not isinstance(rows, int):
        return False
    read = sum(as_int(product(s.sizes[f] for f in symbols_of(t) if f in s.sizes)) for t in _whole_masks(s))
    return work >= max(LEAST_WORK, WORK_OF_A_POINT * read) and rows >= FEWEST_ROWS


def _whole_masks(s: Stream) -> set[Tree]:
    """What the conditions load at each row and step."""
    found: set[Tree] = set()
    for t in s.alive.data:
        found |= {x for x in parts_of(t) if x[0] == "load" and symbols_of(x) & set(s.rows) and symbols_of(x) & set(s.stream)}
    return found


def block_ranges(s: Stream, b: Builder) -> list[Value]:
    """The tensors first, end, full_first, full_end for blocks of BLOCK rows, as i64 numbers of blocks of BLOCK steps; built at `b`. Dimensions of the
    batch on which no condition depends have size 1."""
    return _Ranges(s, b).build()


@dataclass
class _Ranges:
    s: Stream
    b: Builder
    sides: dict[Tree, tuple[Value, Value]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        s = self.s
        used = set().union(*(symbols_of(t) for t in s.alive.data))
        self.batch: list[Dim] = [s.sizes[f] if f in used else 1 for f in s.batch]
        self.row_blocks, self.step_blocks = ceildiv(s.row_count, BLOCK), ceildiv(s.length, BLOCK)

    def build(self) -> list[Value]:
        for t in self.s.alive.data:
            self._prepare(t)
        space = [*self.batch, self.row_blocks, self.step_blocks]
        inputs = list(dict.fromkeys(v for pair in self.sides.values() for v in pair))
        side = {v: self._side(t) for t, pair in self.sides.items() for v in pair}
        d = [sym(f"d{k}") if n != 1 else 0 for k, n in enumerate(space)]
        moves = {"rows": d[-2:-1], "steps": d[-1:], "both": d[-2:]}
        maps = [(*d[:-2], *moves[side[v]]) for v in inputs]

        def tile(i: Builder, *args: Value) -> tuple[Value, ...]:
            at = {name: i.op("tensor.index", type=ScalarType(I64), dim=len(space) - 2 + k) for k, name in enumerate(("rows", "steps"))}
            known = {t: (args[inputs.index(lo)], args[inputs.index(hi)]) for t, (lo, hi) in self.sides.items()}
            spans = [self._span(i, t, known, at) for t in self.s.alive.data]
            can, must = (_all(i, list(found)) for found in zip(*spans, strict=True))
            j = at["steps"]
            after = i.arith("add", j, 1)
            none = index_value(i, self.step_blocks, self.s.seconds[0])
            return (i.arith("select", can, j, none), i.arith("select", can, after, 0),
                    i.arith("select", must, j, none), i.arith("select", must, after, 0), i.cast(must, I64))

        found = self.b.generic(inputs, maps, space, tile, reductions=1, combine=("min", "max", "min", "max", "sum"))

        def run(i: Builder, low: Value, high: Value, count: Value) -> tuple[Value, Value]:
            """The blocks that need no mask, if they are one run."""
            whole = i.arith("eq", i.arith("sub", high, low), count)
            none = index_value(i, self.step_blocks, self.s.seconds[0])
            return i.arith("select", whole, low, none), i.arith("select", whole, high, 0)

        identity = tuple(sym(f"d{k}") for k in range(len(space) - 1))
        first, end, *full = found.results
        return [first, end, *self.b.generic(full, [identity] * 3, space[:-1], run).results]

    # -- smallest and largest values of blocks

    def _along(self, t: Tree) -> str:
        """What a scalar moves along: "rows", "steps", "" for neither, "both"."""
        used = symbols_of(t)
        rows, steps = bool(used & set(self.s.rows)), bool(used & set(self.s.stream))
        return "both" if rows and steps else "steps" if steps else "rows" if rows else ""

    def _prepare(self, t: Tree) -> None:
        """Makes the blocks' values of every scalar of a condition that moves along one side alone, or is loaded as it is, and is read."""
        name, *args = t
        if name in ("and", "or", "not"):
            for x in args:
                self._prepare(x)
        elif name == "holds" or name in COMPARISONS:
            for x in args:
                self._scalar(x)

    def _scalar(self, t: Tree) -> None:
        if t in self.sides or t[0] in ("number", "at"):
            return
        if self._along(t) == "both":
            if t[0] == "arith":
                for x in t[4:]:
                    self._scalar(x)
            if t[0] != "load":
                return
        self.sides[t] = self._extremes(t, self._side(t))

    def _side(self, t: Tree) -> str:
        """Whose blocks a scalar has values for ("both": each tile): of what moves along neither, those of rows."""
        return self._along(t) or "rows"

    def _extremes(self, t: Tree, side: str) -> tuple[Value, Value]:
        s = self.s
        walked = [(self.row_blocks, s.rows, s.row_count)] * (side != "steps") + [(self.step_blocks, s.stream, s.length)] * (side != "rows")
        space = [*self.batch, *(blocks for blocks, *_ in walked), *[BLOCK] * len(walked)]
        bounds = space_bounds(space)
        env: dict[str, Dim] = {f: sym(f"d{k}") if self.batch[k] != 1 else 0 for k, f in enumerate(s.batch)}
        for k, (blocks, names, count) in enumerate(walked, len(self.batch)):
            linear: Dim = sym(f"d{k}") * BLOCK + sym(f"d{k + len(walked)}")
            if count != blocks * BLOCK:
                linear = minimum(linear, count - 1)  # the last element once more
            env |= dict(zip(names, delinearize(linear, [s.sizes[f] for f in names]), strict=True))
        place = partial(self._placed, env=env, bounds=bounds)
        inputs: dict[Any, Any] = {}
        _collect(t, place, inputs)

        def body(i: Builder, *args: Value) -> tuple[Value, Value]:
            known = dict(zip(inputs, args, strict=True))
            x = i.cast(self._value(i, t, place, known), I64)
            return x, x

        made = self.b.generic([v for v, _ in inputs], [m for _, m in inputs], space, body, reductions=len(walked), combine=("min", "max"))
        return made.results[0], made.results[1]

    def _placed(self, e: Dim, env: dict[str, Dim], bounds: Any) -> Dim:
        return simplify(substitute(e, env), bounds)

    def _value(self, i: Builder, t: Tree, place: Any, known: dict[Any, Value]) -> Value:
        """A scalar at a position."""
        match t[0]:
            case "load":
                return known[t[1], tuple(map(place, t[2]))]
            case "extract":
                args = [self._value(i, x, place, known) for x in t[3:]]
                return i.create("tensor.extract", [known[t[1], None], *args], {"check": t[2]}, [ScalarType(element_type(t[1].type))]).result
            case "at":
                return index_value(i, place(t[1]), self.s.seconds[0])
            case "number":
                return i.constant(t[1], t[2])
        _, name, attributes, dtype, *rest = t
        args = [self._value(i, x, place, known) for x in rest]
        if name == "arith.cast":
            return i.cast(args[0], dtype)
        made = i.arith(name.removeprefix("arith."), *args)
        made.defining_op.attributes |= dict(attributes)  # type: ignore[union-attr]
        return made

    # -- what they say of a tile

    def _span(self, i: Builder, t: Tree, known: dict[Tree, Interval], at: dict[str, Value]) -> Span:
        name, *args = t
        if name in ("and", "or"):
            (can_a, must_a), (can_b, must_b) = (self._span(i, x, known, at) for x in args)
            return i.arith(name, can_a, can_b), i.arith(name, must_a, must_b)
        if name == "not":
            can, must = self._span(i, args[0], known, at)
            return i.arith("bitnot", must), i.arith("bitnot", can)
        sides = [self._interval(i, x, known, at) for x in args] if name in (*COMPARISONS, "holds") else [None]
        if None in sides:
            return i.constant(True, DTYPES["i1"]), i.constant(False, DTYPES["i1"])
        if name == "holds":
            low, high = sides[0]  # type: ignore[misc]
            return i.arith("ne", high, 0), i.arith("ne", low, 0)
        return _compared(i, name, *sides)  # type: ignore[arg-type]

    def _interval(self, i: Builder, t: Tree, known: dict[Tree, Interval], at: dict[str, Value]) -> Interval | None:
        """Smallest and largest value in a tile."""
        if t in known:
            return known[t]
        if t[0] == "number":
            value = i.constant(int(t[1]), I64)
            return value, value
        if t[0] == "at":
            return self._position(i, t[1], at)
        if t[0] != "arith" or t[1] not in ("arith.add", "arith.sub", "arith.cast") or not self._exact(t):
            return None
        parts = [self._interval(i, x, known, at) for x in t[4:]]
        if None in parts:
            return None
        if t[1] == "arith.cast":
            return parts[0]
        (a, b), (c, d) = parts  # type: ignore[misc]
        return (i.arith("add", a, c), i.arith("add", b, d)) if t[1] == "arith.add" else (i.arith("sub", a, d), i.arith("sub", b, c))

    def _exact(self, t: Tree) -> bool:
        """Nothing wraps around: 64 bits, or 32 where there are but positions."""
        return t[3].name == "i64" if loads_data(t) else t[3].name in ("i32", "i64")

    def _position(self, i: Builder, e: Dim, at: dict[str, Value]) -> Interval | None:
        """Of a row, or a step, plus a constant; past the last one it may be larger than any."""
        for side, names in (("rows", self.s.rows), ("steps", self.s.stream)):
            linear = split_linear(e, names[0]) if len(names) == 1 else None
            if linear is not None and linear[0] == 1 and isinstance(linear[1], int):
                low = i.arith("add", i.arith("mul", at[side], BLOCK), linear[1])
                return low, i.arith("add", low, BLOCK - 1)
        return None


def _collect(t: Tree, place: Any, found: dict[Any, None]) -> None:
    """The operands of a scalar: (tensor, map), or (tensor, None) where it is gathered from."""
    if t[0] == "load":
        found[t[1], tuple(map(place, t[2]))] = None
    elif t[0] == "extract":
        found[t[1], None] = None
    for x in t[1:]:
        if isinstance(x, tuple) and x and isinstance(x[0], str):
            _collect(x, place, found)


def _all(i: Builder, values: Sequence[Value]) -> Value:
    found = values[0]
    for v in values[1:]:
        found = i.arith("and", found, v)
    return found


def _compared(i: Builder, name: str, a: Interval, b: Interval) -> Span:
    (low_a, high_a), (low_b, high_b) = a, b
    if name in ("gt", "ge"):
        return _compared(i, {"gt": "lt", "ge": "le"}[name], b, a)
    if name in ("lt", "le"):
        return i.arith(name, low_a, high_b), i.arith(name, high_a, low_b)
    can = i.arith("and", i.arith("le", low_a, high_b), i.arith("le", low_b, high_a))
    must = i.arith("and", i.arith("le", high_a, low_b), i.arith("le", high_b, low_a))
    return (can, must) if name == "eq" else (i.arith("bitnot", must), i.arith("bitnot", can))
