"""What a group of warps does in a stream on Hopper (see `warp_groups.py`): the order of its products, its arithmetic and its waits.

In the plain order a step is scores, weights, weighted sum. In the rolling order (FlashAttention-3, Shah et al. 2024, section 3.2), the scores of a
step and the weighted sum of the step before are under way together, and the exponentials run beside them. The step before the first one of a
program is the last one of the program before: its result is finished and stored there, while the other group's products go on. Before the first
program there is a step of nothing.

A group has half of a program's rows. Where the bounds of a masked loop say that half of each step's columns are masked for these rows, the group
computes the other half only: at the end of a window or of a causal mask. It meets the loader and the other group at all barriers as before. What
a mask asks beside that, and the loop's bounds answer, is not asked (`group_masks.py`). Both in the plain order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ...ir.core import Operation, Value
from ...ir.ranges import known_less, lower_bound, upper_bound
from ...ir.target import Target
from ...ir.types import TileType, element_type
from .group_masks import Span, StepMasks
from .group_ops import GroupOps, in_gluon
from .stream_shape import HALF, ROWS, Loop, Read, require

__all__ = ["GroupSchedule"]

TURNS = True
"""Whether the groups' products take turns in the plain order, by two named barriers."""
HALVES = True
"""Whether a group leaves out the half of a step's columns that is masked for its rows throughout."""
EARLY = 8
"""Bytes of an element up to which what needs no scores, and lies along the steps alone, is computed while the scores are under way."""


class GroupSchedule(GroupOps):
    """Prints the persistent loop over programs and what a group does in it."""

    target: Target
    loops: tuple[Loop, ...]
    q: Read
    steps: int
    stages: int
    programs: int
    peeled: Loop | None
    first_runs: bool
    turns: bool
    halved = False

    def _programs(self, keep: bool = False) -> None:
        """The loop over this multiprocessor's programs: every other round runs backwards, so that each gets long and short ones alike. `keep`: `done`
        is the one before."""
        count = min(self.programs, self.target.multiprocessors or self.programs)
        rounds, rest = divmod(self.programs, count)
        late = "gl.program_id(0)" if rounds % 2 == 0 else f"{count - 1} - gl.program_id(0)"
        self._write("steps = 0")
        more = f" + ({late} < {rest}).to(gl.int32)" if rest else ""
        if rounds == 1 and not rest and self.peeled is not None:  # else Triton 3.6 takes the loop away, and then fails on what it carried
            more = " + (gl.program_id(0) < 0).to(gl.int32)"
        self._write(f"for turn in range(0, {rounds}{more}):")
        self.indent += 1
        if keep:
            self._write("done = program")
        self._write(f"program = turn*{count} + gl.where((turn & 1) == 0, gl.program_id(0), {count - 1} - gl.program_id(0))")

    def _for(self, name: str, low: str, high: str, step: int) -> None:
        self._write(f"for {name} in range({low}, {high}, {step}):")
        self.indent += 1

    def _ranges(self, *, peel: bool) -> Iterable[tuple[Loop, str, str]]:
        """Loops with their bounds; without the step that is peeled off the front."""
        start = self.loops[0].op
        for k, loop in enumerate(self.loops):
            op = loop.op
            text = self._text(op.operands[:op["indices"]], ())
            end = upper_bound(op["upper"], text.bounds)
            self.ranges[op.body.args[0]] = (lower_bound(op["lower"], text.bounds), end - 1 if isinstance(end, int) else None)
            low, high = in_gluon(text(op["lower"])), in_gluon(text(op["upper"]))
            if peel and self.first_runs:
                if k == 0:
                    low = in_gluon(text(op["lower"] + op["step"]))
                    if known_less(op["upper"] - op["lower"], op["step"] + 1, text.bounds):
                        continue
            elif peel:
                after = in_gluon(self._text(start.operands[:start["indices"]], ())(start["lower"] + op["step"]))
                low = after if k == 0 else f"gl.maximum({low}, {after})"
            yield loop, low, high

    def _needed(self) -> list[Operation]:
        """The ops before the loops that positions of tiles depend on, in order."""
        values = list(self.q.op.operands[1:])
        for loop in self.loops:
            values += [*loop.op.operands[:loop.op["indices"]], *loop.k.op.operands[1:], *loop.v.op.operands[1:]]
        found: set[Operation] = set()
        stack = [v.defining_op for v in values if v.defining_op is not None]
        while stack:
            op = stack.pop()
            if op not in found:
                found.add(op)
                stack += [v.defining_op for v in op.operands if v.defining_op is not None]
        require(all(op.parent is self.kernel.body and (op.name in ("tile.program_id", "tile.index") or op.name.startswith("arith.") or _is_number(op))
                    for op in found), "positions depend on what is computed")
        return [op for op in self.kernel.body if op in found]

    def _group(self) -> None:
        self._begin()
        loops, inside = self.loops, list(self.kernel.body)
        begin = inside.index(loops[0].op)
        state = [self._name(r, "acc") for r in loops[-1].op.results]
        for loop in loops:
            for arg, result, name in zip(loop.op.body.args[1:], loop.op.results, state, strict=True):
                self.names[arg] = self.names[result] = name
        if self.turns:
            self._write("if who == 1:")
            self._write("    give_turn(who)")
        if self.peeled is not None:
            self._rolling_start(state)
        self._programs(self.peeled is not None)
        for op in inside[:begin]:
            if op is not self.q.op:
                self._one(op)
        for loop in loops:
            for op in loop.hoisted:
                self._one(op)
        finish = [op for op in inside[begin:] if op.name not in ("tile.for", "tile.yield")]
        if self.peeled is not None:
            self._rolling(self.peeled, state, finish)
        else:
            for init, name in zip(loops[0].op.operands[loops[0].op["indices"]:], state, strict=True):
                self._write(f"{name} = {self._use(init)}")
            self._write("mbarrier.wait(q_full.index(turn & 1), (turn >> 1) & 1)")
            self._turn("take")
            for loop, low, high in self._ranges(peel=False):
                self._loop_over(loop, low, high)
                self._step(loop, state)
                self.indent -= 1
            self._turn("give")
            self._write("mbarrier.arrive(q_free.index(turn & 1), count=1)")
            for op in finish:
                self._one(op)
            self.indent -= 1
        if self.turns:
            self._write("if who == 0:")
            self._write("    take_turn(who)")

    def _turn(self, what: str) -> None:
        if self.turns:
            self._write(f"{what}_turn(who)")

    def _loop_over(self, loop: Loop, low: str, high: str) -> None:
        i = self._name(loop.op.body.args[0], "i")
        self._for(i, low, high, loop.op["step"])
        # Measured: quicker where a mask reads data (309 -> 288 us) and where steps without a mask use positions (556 -> 526), slower in a
        # window (277 -> 310).
        if (_reads(loop) or loop.op["part"] == "some") and any(loop.op.body.args[0] in op.operands for op in loop.between):
            self._write(f"{i} = opaque({i})")

    def _scores(self, loop: Loop) -> str:
        name = self._name(loop.first.result)
        tiles = "q_tile.index((turn & 1)*2 + who), k_tile.index(stage).permute((1, 0))"
        self._write(f"{name} = warpgroup_mma({tiles}, zero, use_acc=False, is_async=True)")
        return name

    def _weighted(self, acc: str) -> None:
        self._write(f"{acc} = warpgroup_mma(weights, v_tile.index(stage), {acc}, is_async=True)")

    def _wait(self, which: str) -> None:
        self._write(f"mbarrier.wait({which}_full.index(stage), (steps // {self.stages}) & 1)")

    def _free(self, which: str) -> None:
        self._write(f"mbarrier.arrive({which}_free.index(stage), count=1)")

    def _early(self, loop: Loop) -> list[Operation]:
        """What of a step needs no scores, and lies along the steps alone."""
        found: list[Operation] = []
        given = {*loop.op.body.args[1:], loop.first.result}
        for op in loop.between:
            small = all(not isinstance(r.type, TileType) or r.type.shape[0] == 1 and element_type(r.type).bytes <= EARLY for r in op.results)
            if small and not any(v in given or v.defining_op in loop.between and v.defining_op not in found for v in op.operands):
                found.append(op)
        return found

    def _step(self, loop: Loop, state: list[str]) -> None:
        """One step in the plain order."""
        self._write(f"stage = steps % {self.stages}")
        masks = StepMasks(self.kernel, loop)
        columns = (0, self.steps - 1)
        parts = [self._alive(masks, who) for who in (0, 1)]
        if parts == [None, None]:
            self._whole_step(loop, state, masks.without((0, ROWS - 1), columns))
        else:
            for who, (head, half) in enumerate(zip(("if who == 0:", "else:"), parts, strict=True)):
                self._write(head)
                self.indent += 1
                if half is None:
                    self._apart(loop, lambda: self._whole_step(loop, state, masks.without(_rows(who), columns)))  # noqa: B023
                else:
                    self._apart(loop, lambda: self._half_step(loop, state, half, masks.without(_rows(who), _half(half))))  # noqa: B023
                self.indent -= 1
        self._write("steps += 1")

    def _alive(self, masks: StepMasks, who: int) -> int | None:
        """The half of a step's columns that is all that the mask leaves group `who` in each step of the loop; None: it needs both."""
        if HALVES and self.steps == 2 * HALF:
            for half in (0, 1):
                if masks.dead(_rows(who), _half(1 - half)):
                    return half
        return None

    def _apart(self, loop: Loop, write: Callable[[], None]) -> None:
        """Names of the step's values in one branch are not those in another."""
        kept = dict(self.names)
        for op in (loop.first, *loop.between, *loop.late):
            for r in op.results:
                self.names.pop(r, None)
        write()
        self.names = kept

    def _whole_step(self, loop: Loop, state: list[str], same: dict[Value, Value]) -> None:
        self._wait("k")
        s = self._scores(loop)
        # Given before the wait, for behind it the assembler moves it far down into the exponentials. Measured (H200): window 278 -> 263 us, but
        # documents 248 -> 254.
        late = any(map(_reads, self.loops))
        if not late:
            self._turn("give")
        early = self._early(loop)
        between = _needed(loop, same)
        self._ops([op for op in early if op in between], same)
        self._write(f"{s} = warpgroup_mma_wait(0, deps=({s},))")
        self._free("k")
        if late:
            self._turn("give")
        self._ops([op for op in between if op not in early], same)
        for op in loop.late:
            self._one(op)
        self._write(f"weights = gl.convert_layout({self._use(loop.second.operands[0])}, operand)")
        self._sum_up(loop, state, "weights", "")

    def _half_step(self, loop: Loop, state: list[str], half: int, same: dict[Value, Value]) -> None:
        """Scores of HALF columns have the layout `part`, in which what is known of rows must be, too."""
        self.halved, self.half = True, half
        between = _needed(loop, same)
        made = {r for op in (loop.first, *between) for r in op.results}
        given = dict.fromkeys(v for op in between for v in op.operands if v not in made and _is_row(v))
        before = {v: self._name(v) for v in given}
        self._convert(given, "part")
        part = f".slice({half * HALF}, {HALF})"
        self._wait("k")
        s = self._name(loop.first.result)
        tiles = f"q_tile.index((turn & 1)*2 + who), k_tile.index(stage){part}.permute((1, 0))"
        self._write(f"{s} = warpgroup_mma({tiles}, zero_part, use_acc=False, is_async=True)")
        self._turn("give")
        early = self._early(loop)
        self._ops([op for op in early if op in between], same)
        self._write(f"{s} = warpgroup_mma_wait(0, deps=({s},))")
        self._free("k")
        self._ops([op for op in between if op not in early], same)
        self._write(f"weights_part = gl.convert_layout({self._use(loop.second.operands[0])}, operand)")
        self.half = None
        self.names.update(before)
        after = (*loop.late, loop.op.body.terminator)
        self._convert(dict.fromkeys(v for op in after if op is not None for v in op.operands if v.defining_op in between and _is_row(v)), "layout")
        for op in loop.late:
            self._one(op)
        self._sum_up(loop, state, "weights_part", part)

    def _ops(self, ops: Iterable[Operation], same: dict[Value, Value]) -> None:
        for op in ops:
            if op.results and op.result in same:
                self.names[op.result] = self._use(same[op.result])
            else:
                self._one(op)

    def _sum_up(self, loop: Loop, state: list[str], weights: str, part: str) -> None:
        """The weighted sum of a step, and its carried values."""
        self._wait("v")
        self._turn("take")
        acc = self._name(loop.second.result)
        self._write(f"{acc} = {self._use(loop.second.operands[2])}")
        self._write(f"{acc} = warpgroup_mma({weights}, v_tile.index(stage){part}, {acc}, is_async=True)")
        self._write(f"{acc} = warpgroup_mma_wait(0, deps=({acc},))")
        self._free("v")
        self._update(loop, state, acc)

    def _convert(self, values: Iterable[Value], layout: str) -> None:
        """Gives values of rows new names, by which they are in another layout (which is the same, register by register)."""
        for v in values:
            before = self.names.pop(v)
            self._write(f"{self._name(v)} = gl.convert_layout({before}, {layout})")

    def _update(self, loop: Loop, state: list[str], acc: str) -> None:
        """The carried values of the next step."""
        yields = [acc if k == loop.carried else self._use(v) for k, v in enumerate(loop.op.body.terminator.operands)]  # type: ignore[union-attr]
        changes = [(a, b) for a, b in zip(state, yields, strict=True) if a != b]
        if changes:
            self._write(f"{', '.join(a for a, _ in changes)} = {', '.join(b for _, b in changes)}")

    def _rolling_start(self, state: list[str]) -> None:
        """As if a step of nothing had been made."""
        loop = self.loops[0]
        for k, (name, result) in enumerate(zip(state, loop.op.results, strict=True)):
            width = self.columns if k == loop.carried else 1
            self._write(f"{name} = gl.zeros([{HALF}, {width}], {self._type(element_type(result.type))}, layout=layout)")
        dtype = self._type(element_type(loop.second.operands[0].type))
        self._write(f"weights = gl.convert_layout(gl.zeros([{HALF}, {self.steps}], {dtype}, layout=layout), operand)")
        self._write("program = gl.program_id(0)")

    def _rolling(self, peeled: Loop, state: list[str], finish: list[Operation]) -> None:
        """The scores of a step are under way together with the weighted sum of the step before, which may be the last one of the program before."""
        acc = state[peeled.carried]
        start = self.loops[0].op
        inits = start.operands[start["indices"]:]
        before = {}
        for name, init in zip(state, inits, strict=True):
            if name != acc:
                before[name] = f"done_{name}"
                self._write(f"done_{name} = {name}")
                self._write(f"{name} = {self._use(init)}")
        self._write("mbarrier.wait(q_full.index(turn & 1), (turn >> 1) & 1)")
        text = self._text(start.operands[:start["indices"]], ())
        i = self._name(peeled.op.body.args[0], "i")
        list(self._ranges(peel=False))  # notes the ranges of positions
        self._write(f"{i} = {in_gluon(text(start['lower']))}")
        self._products(peeled, acc)
        self._between(peeled, acc)
        self._write("if turn > 0:")
        self.indent += 1
        self._finish(finish, before, "done")
        self.indent -= 1
        self._write(f"{acc} = gl.zeros([{HALF}, {self.columns}], gl.float32, layout=layout)")
        self._write(f"weights = gl.convert_layout({self._use(peeled.second.operands[0])}, operand)")
        self._update(peeled, state, acc)
        self._write("steps += 1")
        for v in (peeled.op.body.args[0], *(r for op in (peeled.first, *peeled.between) for r in op.results)):
            self.names.pop(v)  # a name of its own in the loop, or it would count as carried by it
        for loop, low, high in self._ranges(peel=True):
            self._loop_over(loop, low, high)
            self._products(loop, acc)
            self._between(loop, acc)
            for op in loop.late:
                self._one(op)
            self._write(f"weights = gl.convert_layout({self._use(loop.second.operands[0])}, operand)")
            self._update(loop, state, self._use(loop.second.operands[2]))
            self._write("steps += 1")
            self.indent -= 1
        self._write("mbarrier.arrive(q_free.index(turn & 1), count=1)")
        self.indent -= 1
        self._write(f"stage = steps % {self.stages}")
        self._wait("v")
        self._weighted(acc)
        self._write(f"{acc} = warpgroup_mma_wait(0, deps=({acc},))")
        self._finish(finish, {}, "program")

    def _between(self, loop: Loop, acc: str) -> None:
        """From scores to weights, then the wait for the weighted sum of the step before."""
        early, made = self._early(loop), loop.second.operands[0].defining_op
        wide = made.operands[0] if made is not None and made.name == "arith.cast" and made in loop.between else None
        for op in loop.between:
            if op not in early and not (wide is not None and op is made):
                self._one(op)
        if wide is None:
            self._write(f"{acc} = warpgroup_mma_wait(0, deps=({acc},))")
        else:  # the compiler would put exponentials after the wait
            p = self._name(wide)
            self._write(f"{acc}, {p} = warpgroup_mma_wait(0, deps=({acc}, {p}))")
        self._free("v")
        if wide is not None:
            assert made is not None
            self._one(made)

    def _products(self, loop: Loop, acc: str) -> None:
        self._write(f"stage = steps % {self.stages}")
        self._wait("k")
        self._wait("v")
        self._turn("take")
        s = self._scores(loop)
        self._weighted(acc)
        self._turn("give")
        for op in self._early(loop):
            self._one(op)
        self._write(f"{s} = warpgroup_mma_wait(1, deps=({s},))")
        self._free("k")

    def _finish(self, ops: list[Operation], renamed: dict[str, str], program: str) -> None:
        """What follows the loops of the program numbered `program`, whose carried values have the names `renamed` by now."""
        top: set[Operation] = set()
        stack = [v.defining_op for op in ops for v in op.operands]
        while stack:
            op = stack.pop()
            if op is not None and op.name != "tile.for" and op not in top and op not in ops:
                top.add(op)
                stack += [v.defining_op for v in op.operands]
        again = [op for op in self.kernel.body if op in top]
        kept, self.program = dict(self.names), program
        for op in (*again, *ops):
            for r in op.results:
                self.names.pop(r, None)
        for r in self.loops[-1].op.results:
            self.names[r] = renamed.get(self.names[r], self.names[r])
        for op in (*again, *ops):
            self._one(op)
        self.names, self.program = kept, "program"


def _rows(who: int) -> Span:
    return who * HALF, who * HALF + HALF - 1


def _half(half: int) -> Span:
    return half * HALF, half * HALF + HALF - 1


def _reads(loop: Loop) -> bool:
    """A mask or a score reads data."""
    return any(op.name == "tile.load" for op in loop.between)


def _is_row(v: Value) -> bool:
    return isinstance(v.type, TileType) and v.type.shape == (ROWS, 1)


def _needed(loop: Loop, same: dict[Value, Value]) -> list[Operation]:
    """The ops between the products that are wanted where some values are the same as others."""
    wanted = {loop.second.operands[0], *(v for op in (*loop.late, loop.op.body.terminator) if op is not None for v in op.operands)}
    found: list[Operation] = []
    for op in reversed(loop.between):
        if not op.results or any(r in wanted for r in op.results):
            found.append(op)
            wanted |= {same[op.result]} if op.results and op.result in same else set(op.operands)
    return found[::-1]


def _is_number(op: Operation) -> bool:
    """It reads one number from memory: where a program's loops begin or end."""
    return op.name == "tile.load" and not op["shape"]
