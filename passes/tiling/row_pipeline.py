"""Rows in a pipeline: one loop along the columns computes the last stage of a row, the stage before of the next row, and so on.

A norm or a softmax passes over its row several times, and only its first and last pass move memory. Pass by pass, memory idles in between, and
what is written waits for what is read. Here a program takes some consecutive rows, and each of its loops does all passes, each for another row:

    stage 0 of row 0;  stages 1 and 0 of rows 0 and 1;  then for each row r:  stages 2, 1, 0 of rows r, r + 1, r + 2
The passes of a row find it in the caches, as before; the loads of one row overlap with the stores of another. In each trip the later stages come
first: what a stage keeps for the next one (`keeping.py`) is read before the row behind writes it. The last rows of a program are computed again by
the early stages in place of those that it does not have, which stores the same numbers a second time.

Where the weights of a norm outgrow the first cache, each pass takes two rows side by side (`SIDE`).

A value is computed from the same operands in the same order as pass by pass with steps of this size, so rows are the same bits wherever they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...ir import Dim, Operation, Value, sym
from ...ir.expr import free_symbols, minimum, product
from ...ir.ranges import simplify
from .emit import Emitter
from .frame import Frame, is_expensive
from .keeping import kept_values
from .moments import about_start
from .prefetch import Leaf, ask_beyond
from .tile_choice import TileChoice

if TYPE_CHECKING:
    from .loops import Lowering, Scope

__all__ = ["emit_row_pipeline", "in_pipeline"]

STEP = 64
"""Elements of a trip, or half of that: several lines are read and written at a time, which memory likes better than turns line by line (layer norm of
8192 x 1024: 71 % of a copy's bandwidth pass by pass, 67 here by 16 elements, 80 by 32, 82 by 64)."""
MOST, LEAST = 32, 8
"""Rows of a program. What the first rows take alone is 2 % of 32 rows, and 8 % of 8."""
SIDE = 2
"""Rows that a pass takes side by side where weights are too long for the first cache beside them: each is then read half as often. Layer norm of
8192 x 4096 on a Zen 4 moves 17 GB/s by itself, 22 without reading weights, 21 without reading the row again, 28 without both, and 21 by two rows;
where weights stay in the first cache two rows cost a quarter."""
PROGRAMS = 64
"""As many programs as are left at least: work for several threads."""


def in_pipeline(frame: Frame, choice: TileChoice, *, first_cache: int, cache: int, private_bytes: int) -> TileChoice:
    """`choice` with as many rows per program as pay; as it is where memory is not what bounds the kernel: data that lies in the caches, exponentials.
    And where rows are no multiple of a step, or not the fastest axis of the grid.

    `first_cache` and `cache` are what the first and the last cache hold, in bytes; rows under way may take `private_bytes`.
    """
    vector, rows = choice.vector, frame.outer[-1:]
    inner = frame.sizes.get(vector) if vector is not None else None
    count = product(frame.sizes[f] for f in frame.outer)
    if not rows or frame.inner != {vector} or not isinstance(inner, int) or not isinstance(count, int) or choice.row is not None:
        return choice
    width = next((w for w in (STEP, STEP // 2) if inner % w == 0 and inner >= 4 * w), 0)
    full = [op for op in frame.members if frame.is_full(op)]
    if not width or width % choice.shape[1] or any(is_expensive(op) for op in full):
        return choice
    if any(kind in ("argmax", "argmin") for op in frame.members if op["reductions"] for kind in op["combine"]):
        return choice
    stages = loop_stages(frame)
    moving = {(x.value, x.offset, x.is_store): x for x in frame.accesses if {vector, rows[0]} <= free_symbols(x.offset)}.values()
    held = len(stages) * sum(inner * x.bytes for x in moving if not x.is_store)
    held += sum(inner * bytes_ * (until - stage) for _, bytes_, stage, until in kept_values(frame))
    each = min(MOST, count // PROGRAMS, *(n for f in rows if isinstance(n := frame.sizes[f], int)))
    if len(stages) < 2 or count * sum(inner * x.bytes for x in moving) <= cache or held > private_bytes or each < LEAST:
        return choice
    shared = {(x.value, x.offset): inner * x.bytes for x in frame.accesses if not x.is_store and free_symbols(x.offset) == {vector}}
    if sum(shared.values()) > first_cache // 2 and SIDE * held <= private_bytes:
        return replace(choice, shape=(1, STEP // 2), rows=each - each % SIDE, side=SIDE)
    return replace(choice, shape=(1, width), rows=each)


def loop_stages(frame: Frame) -> list[int]:
    """The stages that pass over the inner dimensions."""
    made = set(frame.outputs) | {r for r, _, _, _ in kept_values(frame)}
    return sorted({frame.stage[op] for op in frame.members
                   if op["reductions"] or frame.is_full(op) and any(r in made for r in op.results)})


@dataclass(frozen=True)
class _Pass:
    """One loop over a row: what it makes, and what is computed once per row before it."""

    stage: int
    before: list[Operation]
    roots: list[Operation]
    keys: list[tuple[Operation, int]]


Env = dict[Value, Value]
"""What is known of a row: the frame's values and those of the kernel."""


def emit_row_pipeline(low: Lowering, top: Scope) -> None:
    """Writes the kernel's body: the rows of the program from the position of the grid's fastest axis on."""
    _Pipeline(low, top).emit()


class _Pipeline:
    def __init__(self, low: Lowering, top: Scope):
        self.low, self.top = low, top
        self.row = low.frame.outer[-1]
        assert low.tile.vector is not None
        self.vector = low.tile.vector
        members, stage = low.frame.members, low.frame.stage
        self.passes: list[_Pass] = []
        once = [op for op in members if not op["reductions"] and not low.frame.is_full(op)]
        done = -1
        for s in loop_stages(low.frame):
            roots = [op for op in members if stage[op] == s and op not in once
                     and (op["reductions"] or any(r in low.stores or r in low.homes for r in op.results))]
            keys = [(op, k) for op in roots if op["reductions"] for k in range(len(op.results))]
            self.passes.append(_Pass(s, [op for op in once if done < stage[op] <= s], roots, keys))
            done = s
        self.after = [op for op in once if stage[op] > done]
        self.side = low.tile.side
        self.about: dict[int, dict[Operation, Value]] = {}  # by slot: what sums are counted from (`moments.py`)

    def emit(self) -> None:
        e, size, rows = self.low.e, self.low.frame.sizes[self.row], self.low.tile.rows
        start = self.top.at[self.row]
        end = simplify(start + rows, {}) if isinstance(size, int) and size % rows == 0 else minimum(size, start + rows)
        depth, side = len(self.passes), self.side
        slots = range(depth * side)
        known: list[Env] = [{} for _ in slots]
        for filled in range(1, depth):
            ahead = {s: (filled - 1 - s // side) * side + s % side for s in range(filled * side)}
            known = self._step(e, {s: self._named(e, start + n, end) for s, n in ahead.items()}, known)
        carried = [[v for v in sorted_values(known[s], self.low.frame) if self._is_needed(v, s // side)] for s in slots]

        def body(inner: Emitter, i: Dim, values: list[Value]) -> list[Value]:
            left = iter(values)
            here: list[Env] = [{v: next(left) for v in names} for names in carried]
            ahead = {s: (depth - 1 - s // side) * side + s % side for s in slots}
            made = self._step(inner, {s: self._named(inner, i + n, end) if n else i for s, n in ahead.items()}, here)
            return [made[s][v] for s, names in enumerate(carried) for v in names]

        e.loop(start, end, side, [known[s][v] for s, names in enumerate(carried) for v in names], body)

    def _named(self, e: Emitter, position: Dim, end: Dim) -> Dim:
        """A row's position, of the program's last row at most."""
        size = self.low.frame.sizes[self.row]
        return e.named(minimum(position, end - 1), size - 1)

    def _is_needed(self, v: Value, n: int) -> bool:
        """Pass n, or what comes after it, reads this number of its row."""
        stage, frame = self.passes[n].stage, self.low.frame
        done = {op for p in self.passes[:n + 1] for op in p.before}
        return any(v in op.operands for op in frame.members if frame.stage[op] >= stage and op not in done)

    def _step(self, e: Emitter, rows: Mapping[int, Dim], known: Sequence[Env]) -> list[Env]:
        """One loop for rows by slot, n * side + j for row j of those that pass n takes, where `known` of that row is known; what then is known before
        each pass."""
        low = self.low
        outer, low.e = low.e, e
        known = list(known)
        tops = {s: low.scope(e, {**self.top.at, self.row: at}, dict(self.top.active)) for s, at in rows.items()}
        for s in range(self.side):
            known[s] = self._once(tops[s], self.passes[0].before, {})
        order = sorted(rows, reverse=True)
        for s in order:
            self._set_out(s, tops[s], known[s])
        inits = {s: [v for op, k in self._pass(s).keys for v in low.initial(op, k)] for s in order}
        found = iter(self._loop(e, order, tops, known, inits))
        new: list[Env] = [{} for _ in known]
        for s in order:
            low.outer_values, low.about = dict(known[s]), self.about[s]
            low.finish(tops[s], self._pass(s).keys, [next(found) for _ in inits[s]])
            last = s + self.side >= len(known)
            env = self._once(tops[s], self.after if last else self._pass(s + self.side).before, low.outer_values)
            if not last:
                new[s + self.side] = env
        low.e = outer
        return new

    def _pass(self, slot: int) -> _Pass:
        return self.passes[slot // self.side]

    def _set_out(self, slot: int, top: Scope, known: Env) -> None:
        """What the sums of a pass with second moments are counted from: the mean of the row's first step (`moments.py`)."""
        low = self.low
        self.about[slot] = {}
        totals = [op for op, _ in self._pass(slot).keys if op in low.frame.moments.values()]
        if totals:
            self._stand(slot, known)
            start = low.scope(low.e, {**top.at, self.vector: sym("t1")}, dict(top.active))
            self.about[slot] = {op: about_start(low.e, low.summand(start, op, 0)) for op in totals}

    def _stand(self, slot: int, known: Env) -> None:
        """What is known where a pass works on its row."""
        low = self.low
        low.now, low.outer_values, low.about = self._pass(slot).stage, known, self.about[slot]
        low.kept = {v for v in low.homes if low.frame.stage[low.made[v]] < low.now}

    def _once(self, top: Scope, members: list[Operation], known: Env) -> Env:
        """What is known of a row after what is computed once for it."""
        self.low.outer_values = dict(known)
        self.low.outer_members(top, members)
        return self.low.outer_values

    def _loop(self, e: Emitter, order: list[int], tops: Mapping[int, Scope], known: Sequence[Env], inits: Mapping[int, list[Value]]) -> list[Value]:
        low, size, step = self.low, self.low.frame.sizes[self.vector], self.low.tile.shape[1]
        keys = [key for s in order for key in self._pass(s).keys]

        def body(inner: Emitter, i: Dim, carried: list[Value]) -> list[Value]:
            left, out = iter(carried), []
            leaves: list[dict[int, Leaf]] = [{} for _ in range(self.side)]
            for s in order:
                at = i + sym("t1")
                scope = low.scope(inner, {**tops[s].at, self.vector: at}, {**tops[s].active, self.vector: (at, size)})
                here = self._pass(s)
                self._stand(s, known[s])
                out += low.stage(scope, here.roots, here.keys, [next(left) for _ in inits[s]])
                leaves[s % self.side][here.stage] = Leaf(inner, scope.at)
            if len(order) == len(self.passes) * self.side:
                for of_row in leaves:
                    ask_beyond(of_row, low.reads(), self.row, step, size)
            return out

        return low.spanned(e, size, step, keys, [v for s in order for v in inits[s]], body)


def sorted_values(known: Env, frame: Frame) -> list[Value]:
    """In the order in which the frame's members make them."""
    return [r for op in frame.members for r in op.results if r in known]
