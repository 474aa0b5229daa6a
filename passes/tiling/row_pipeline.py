"""Rows in a pipeline: one loop along the columns computes the last stage of a row, the stage before of the next row, and so on.

A norm or a softmax passes over its row several times, and only its first and last pass move memory. Pass by pass, memory idles in between, and
what is written waits for what is read. Here a program takes some consecutive rows, and each of its loops does all passes, each for another row:

    stage 0 of row 0;  stages 1 and 0 of rows 0 and 1;  then for each row r:  stages 2, 1, 0 of rows r, r + 1, r + 2
The passes of a row find it in the caches, as before; the loads of one row overlap with the stores of another. In each trip the later stages come
first: what a stage keeps for the next one (`keeping.py`) is read before the row behind writes it. The last rows of a program are computed again by
the early stages in place of those that it does not have, which stores the same numbers a second time.

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
from .loop_tiles import TileChoice
from .moments import about_start
from .prefetch import Leaf, ask_beyond

if TYPE_CHECKING:
    from .loops import Lowering, Scope

__all__ = ["emit_row_pipeline", "in_pipeline"]

STEP = 64
"""Elements of a trip, or half of that: several lines are read and written at a time, which memory likes better than turns line by line (layer norm of
8192 x 1024: 71 % of a copy's bandwidth pass by pass, 67 here by 16 elements, 80 by 32, 82 by 64)."""
MOST, LEAST = 32, 8
"""Rows of a program. What the first rows take alone is 2 % of 32 rows, and 8 % of 8."""
PROGRAMS = 64
"""As many programs as are left at least: work for several threads."""


def in_pipeline(frame: Frame, choice: TileChoice, *, cache: int, private_bytes: int) -> TileChoice:
    """`choice` with as many rows per program as pay; as it is where memory is not what bounds the kernel: data that lies in the caches, exponentials.
    And where rows are no multiple of a step, or not the fastest axis of the grid.

    `cache` is what the last cache holds, in bytes; rows under way may take `private_bytes`.
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

    def emit(self) -> None:
        e, size, rows = self.low.e, self.low.frame.sizes[self.row], self.low.tile.rows
        start = self.top.at[self.row]
        end = simplify(start + rows, {}) if isinstance(size, int) and size % rows == 0 else minimum(size, start + rows)
        depth = len(self.passes)
        known: list[Env] = [{} for _ in range(depth)]
        for filled in range(1, depth):
            known = self._step(e, {n: self._named(e, start + (filled - 1 - n), end) for n in range(filled)}, known)
        carried = [[v for v in sorted_values(known[n], self.low.frame) if self._is_needed(v, n)] for n in range(depth)]

        def body(inner: Emitter, i: Dim, values: list[Value]) -> list[Value]:
            left = iter(values)
            here: list[Env] = [{v: next(left) for v in names} for names in carried]
            made = self._step(inner, {n: self._named(inner, i + (depth - 1 - n), end) if n < depth - 1 else i for n in range(depth)}, here)
            return [made[n][v] for n, names in enumerate(carried) for v in names]

        e.loop(start, end, 1, [known[n][v] for n, names in enumerate(carried) for v in names], body)

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
        """Pass n of row `rows[n]` for all of them in one loop, where `known[n]` of that row is known; what then is known before each pass."""
        low = self.low
        outer, low.e = low.e, e
        known = list(known)
        tops = {n: low.scope(e, {**self.top.at, self.row: at}, dict(self.top.active)) for n, at in rows.items()}
        known[0] = self._once(tops[0], self.passes[0].before, {})
        order = sorted(rows, reverse=True)
        for n in order:
            self._set_out(n, tops[n], known[n])
        inits = {n: [v for op, k in self.passes[n].keys for v in low.initial(op, k)] for n in order}
        found = iter(self._loop(e, order, tops, known, inits))
        new: list[Env] = [{} for _ in known]
        for n in order:
            low.outer_values = dict(known[n])
            low.finish(tops[n], self.passes[n].keys, [next(found) for _ in inits[n]])
            last = n + 1 == len(self.passes)
            env = self._once(tops[n], self.after if last else self.passes[n + 1].before, low.outer_values)
            if not last:
                new[n + 1] = env
        low.e = outer
        return new

    def _set_out(self, n: int, top: Scope, known: Env) -> None:
        """What the sums of a pass with second moments are counted from: the mean of the row's first step (`moments.py`)."""
        low = self.low
        totals = [op for op, _ in self.passes[n].keys if op in low.frame.moments.values()]
        if totals:
            self._stand(n, known)
            start = low.scope(low.e, {**top.at, self.vector: sym("t1")}, dict(top.active))
            low.about |= {op: about_start(low.e, low.summand(start, op, 0)) for op in totals}

    def _stand(self, n: int, known: Env) -> None:
        """What is known where pass n works on its row."""
        low = self.low
        low.now, low.outer_values = self.passes[n].stage, known
        low.kept = {v for v in low.homes if low.frame.stage[low.made[v]] < low.now}

    def _once(self, top: Scope, members: list[Operation], known: Env) -> Env:
        """What is known of a row after what is computed once for it."""
        self.low.outer_values = dict(known)
        self.low.outer_members(top, members)
        return self.low.outer_values

    def _loop(self, e: Emitter, order: list[int], tops: Mapping[int, Scope], known: Sequence[Env], inits: Mapping[int, list[Value]]) -> list[Value]:
        low, size, step = self.low, self.low.frame.sizes[self.vector], self.low.tile.shape[1]
        keys = [key for n in order for key in self.passes[n].keys]

        def body(inner: Emitter, i: Dim, carried: list[Value]) -> list[Value]:
            left, out = iter(carried), []
            leaves = {}
            for n in order:
                at = i + sym("t1")
                scope = low.scope(inner, {**tops[n].at, self.vector: at}, {**tops[n].active, self.vector: (at, size)})
                here = self.passes[n]
                self._stand(n, known[n])
                out += low.stage(scope, here.roots, here.keys, [next(left) for _ in inits[n]])
                leaves[here.stage] = Leaf(inner, scope.at)
            if len(order) == len(self.passes):
                ask_beyond(leaves, low.reads(), self.row, step, size)
            return out

        return low.spanned(e, size, step, keys, [v for n in order for v in inits[n]], body)


def sorted_values(known: Env, frame: Frame) -> list[Value]:
    """In the order in which the frame's members make them."""
    return [r for op in frame.members for r in op.results if r in known]
