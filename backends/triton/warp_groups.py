"""Streams on Hopper: a tile kernel printed in Gluon, its warps split by job.

    source = print_warp_groups(kernel, target, divisible)     # a KernelSource, or a str that says why not

The kernel is one that `passes/tiling/stream.py` makes: loops over a stream (`part` is set), each with two products,

    s = q @ k[i]        ...        acc = p @ v[i] + acc * alpha

A warp of its own brings q, k[i] and v[i] to shared memory with the bulk copy engine (TMA, through tensor maps), a ring of stages ahead; two
groups of four warps compute 64 rows each. They meet at barriers in shared memory alone: full[stage] says that a tile has come, free[stage]
that both groups have read it. So the exponentials of one group run beside the products of the other. Programs are persistent: one for each
multiprocessor, which takes every so many-th of the kernel's programs; the next one's tiles are under way while the last one is finished.

With `ahead` a group also overlaps with itself: the product q @ k[i + 1] and the product p @ v[i] are started before the exponentials of step
i + 1, as in FlashAttention-3 (Shah et al. 2024, section 3.2). That pays where the work between the products is light; else registers and
issue slots are short, and the plain order is faster.

What the kernel means is its tile IR, which the interpreter and plain Triton print and check: this is one more schedule of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import gcd, prod

from ...ir.core import Operation, Value
from ...ir.expr import Dim, Expr, Max, as_int, known_less, lower_bound, product, split_linear, substitute, upper_bound
from ...ir.target import Target
from ...ir.types import BufferType, TileType, element_type
from .arith import arith_text, literal
from .descriptors import ALIGNMENT, TensorMap
from .dtypes import pointer
from .expressions import IndexText
from .helpers import used_helpers
from .printer import KernelSource, Printer, identifier, loaded_buffers, provenance, stored_buffers

__all__ = ["print_warp_groups"]

ROWS = 128
"""Rows of a program: two groups of 64."""
HALF = ROWS // 2
MAX_REGISTERS = 168
"""Per thread when the kernel starts: 65536 for 12 warps. The groups take the loader's."""
GROUP_REGISTERS, LOADER_REGISTERS = 240, 24
SHARED = 192 << 10
"""Bytes of shared memory for q, k and v; the rest is for turning results."""
TEAM = 8
"""Batch elements whose programs run side by side."""
SHARED_LAYOUT = "NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)"
"""Of tiles whose rows are 64 or 128 elements of 16 bits."""
LIGHT = 14
"""Pointwise ops on whole tiles between the products up to which a group runs ahead of itself."""
_NAMES = ("gl", "gluon", "mbarrier", "tma_load", "program", "steps", "turn", "stage", "last", "who", "layout", "stored", "operand", "zero", "weights",
          "q_map", "k_map", "v_map", "q_tile", "k_tile", "v_tile", "q_full", "q_free", "k_full", "k_free", "v_full", "v_free")
_RINGS = "q_tile, k_tile, v_tile, q_full, q_free, k_full, k_free, v_full, v_free"
_HEADER = """import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # its name in Triton 3.9, and before
"""


class _Declined(Exception):
    """The kernel is no stream that this schedule fits."""


def print_warp_groups(kernel: Operation, target: Target, divisible: Sequence[bool]) -> KernelSource | str:
    """`divisible`: of each buffer, whether its address is a multiple of 16 in every launch."""
    if target.capability != 90:
        return "not Hopper"
    try:
        return _Groups(kernel, target, divisible).run()
    except _Declined as why:
        return str(why)


def _require(condition: object, why: str) -> None:
    if not condition:
        raise _Declined(why)


@dataclass(frozen=True)
class _Read:
    """A tile that the copy engine brings: where it is in its tensor map, over the operands of the load. `turned`: it is read transposed."""

    op: Operation
    map: TensorMap
    row: Dim
    column: Dim
    turned: bool


@dataclass(frozen=True)
class _Loop:
    op: Operation
    first: Operation
    second: Operation
    k: _Read
    v: _Read
    late: tuple[Operation, ...]  # they change the accumulator
    between: tuple[Operation, ...]
    hoisted: tuple[Operation, ...]  # what does not move with the loop
    carried: int  # which carried value is the accumulator


class _Groups(Printer):
    """Prints a kernel as loader, group and entry."""

    def __init__(self, kernel: Operation, target: Target, divisible: Sequence[bool]):
        super().__init__(kernel)
        self.target, self.divisible = target, divisible
        self.store_layout = False

    # -- what the kernel looks like ---------------------------------------------------------------------------------------

    def _analyse(self) -> None:
        kernel = self.kernel
        _require(not kernel["symbols"] and not self.wide, "sizes are not constant, or too large")
        loops = [op for op in kernel.body if op.name == "tile.for"]
        _require(loops and all(op["part"] for op in loops), "no loop over a stream")
        _require(not (stored_buffers(kernel.body) & loaded_buffers(kernel.body)), "a buffer is read and written")
        top = set(kernel.body)
        self.loops = [self._loop(op, top) for op in loops]
        made = self.loops[0].first.operands[0].defining_op
        _require(all(loop.first.operands[0].defining_op is made for loop in self.loops), "loops multiply different rows")
        _require(made is not None and made.name == "tile.load" and made in top and all(u.name == "tile.dot" for u in made.result.users),
                 "the rows' operand is not read once")
        assert made is not None
        self.q = self._read(made, "q_map", rows=HALF)
        _require(not self.q.turned and made["shape"][0] == ROWS, "other than 128 rows")
        self.steps, self.width = self.loops[0].first.result.type.shape[1], made["shape"][1]
        self.columns = self.loops[0].second.result.type.shape[1]
        _require(all((a.k.map, a.v.map) == (b.k.map, b.v.map) for a, b in zip(self.loops, self.loops[1:], strict=False)), "loops read different matrices")
        _require(self.width in (64, 128) and self.columns in (64, 128) and self.steps in (64, 128), "tiles of other sizes")
        for a, b in zip(self.loops, self.loops[1:], strict=False):
            _require(list(b.op.operands[b.op["indices"]:]) == list(a.op.results) and a.carried == b.carried, "loops that do not follow each other")
        size = self.q.map.block[1] * 2
        stage = self.steps * (self.width + self.columns) * 2
        self.stages = min(4, (SHARED - ROWS * size) // stage)
        _require(self.stages >= 2, "no room for two stages")
        self.programs = as_int(product(kernel["grid"]))
        anywhere = [loop for loop in self.loops if loop.op["part"] == "any"]
        light = min(sum(1 for op in loop.between if _is_whole(op, self.steps)) for loop in self.loops) <= LIGHT
        self.peeled = anywhere[0] if anywhere and light and self._some_step() else None

    def _some_step(self) -> bool:
        """Every program has a step to begin with."""
        first, last = (loop.op for loop in (self.loops[0], self.loops[-1]))
        seen: dict[str, Value] = {}
        for op in (first, last):
            for k, v in enumerate(op.operands[:op["indices"]]):
                if seen.setdefault(f"i{k}", v) is not v:
                    return False
        bounds = {name: self._span(v) for name, v in seen.items()}
        return all(known_less(low, last["upper"], bounds) for low in _least_of(first["lower"]))

    def _loop(self, op: Operation, top: set[Operation]) -> _Loop:
        body = list(op.body)
        dots = [o for o in body if o.name == "tile.dot"]
        _require(len(dots) == 2 and op["step"] in (64, 128), "other than two products a step")
        first, second = dots
        yields = list(op.body.terminator.operands)  # type: ignore[union-attr]
        _require(second.result in yields and list(second.result.uses) and len(second.result.uses) == 1, "the second product is not what a loop carries")
        carried = yields.index(second.result)
        acc = op.body.args[1 + carried]
        late: list[Operation] = []
        for o in body:
            if o is not second and (acc in o.operands or any(v.defining_op in late for v in o.operands if v.defining_op is not None)):
                late.append(o)
        allowed = {*late, second}
        _require(all(u in allowed for v in (acc, *(r for o in late for r in o.results)) for u in v.users), "the accumulator is read within a step")
        _require(second.operands[0].defining_op in body and second.operands[2].defining_op in [*late, None], "the second product has another form")
        start = first.operands[2].defining_op
        _require(start is not None and start.name == "tile.full" and _is_zero(start.operands[0]), "the first product does not start at zero")
        k, v = (self._operand(d, name, body) for d, name in ((first, "k_map"), (second, "v_map")))
        _require(k.turned and not v.turned, "operands lie the other way round")
        hoisted: list[Operation] = []
        for o in body:
            if o.name != "tile.dot" and o not in (k.op, v.op, start) and self._stays(o, top, hoisted):
                hoisted.append(o)
        gone = {first, second, k.op, v.op, *late, *hoisted, *([start] if start in body else []), op.body.terminator}
        return _Loop(op, first, second, k, v, tuple(late), tuple(o for o in body if o not in gone), tuple(hoisted), carried)

    def _stays(self, o: Operation, top: set[Operation], hoisted: list[Operation]) -> bool:
        """It may be computed before the loop, and its result is small."""
        if o.name not in ("tile.load", "tile.index", "tile.mask", "tile.full") and not o.name.startswith("arith."):
            return False
        small = all(not isinstance(r.type, TileType) or 1 in r.type.shape for r in o.results)
        return small and all(v.defining_op is not None and (v.defining_op in top or v.defining_op in hoisted) or self._is_argument(v) for v in o.operands)

    def _is_argument(self, v: Value) -> bool:
        return v in self.kernel.body.args

    def _operand(self, dot: Operation, name: str, body: list[Operation]) -> _Read:
        made = dot.operands[1].defining_op
        _require(made is not None and made.name == "tile.load" and made in body and len(made.result.uses) == 1, "an operand is not read where it is used")
        assert made is not None
        return self._read(made, name)

    def _read(self, op: Operation, name: str, rows: int = 0) -> _Read:
        """The tile as a block of a matrix in memory."""
        buffer, dtype = op.operands[0], element_type(op.result.type)
        t = buffer.type
        assert isinstance(t, BufferType)
        number = buffer.index  # type: ignore[attr-defined]
        _require(self._is_argument(buffer) and self.divisible[number], "an operand may start anywhere")
        _require(not op["mask"] and not op["mask_low"] and dtype.name in ("bf16", "f16"), "an operand is masked, or not of 16 bits")
        by_row, by_column = (split_linear(op["offset"], f"t{k}") for k in (0, 1))
        _require(by_row is not None and by_column is not None, "an operand is not a matrix")
        assert by_row is not None and by_column is not None
        turned = by_row[0] == 1 and by_column[0] != 1
        stride = by_column[0] if turned else by_row[0]
        _require((by_row[0] if turned else by_column[0]) == 1 and isinstance(stride, int) and stride > 0, "an operand is not contiguous along its columns")
        assert isinstance(stride, int)
        shape = op["shape"][::-1] if turned else op["shape"]
        _require(stride * dtype.bytes % ALIGNMENT == 0 and stride >= shape[1], "rows of an operand do not start at multiples of 16 bytes")
        rest = substitute(op["offset"], {"t0": 0, "t1": 0})
        row, column = _divided(rest, stride)
        bounds = {f"i{k}": self._span(v) for k, v in enumerate(op.operands[1:])}
        low = lower_bound(column, bounds)
        _require(isinstance(low, int) and low >= 0 and known_less(column + shape[1] - 1, stride, bounds), "a tile crosses a row's end")
        extent = 1 + sum(((n - 1) * s for n, s in zip(t.shape, t.layout, strict=True)), 0)  # type: ignore[misc, operator]
        made = TensorMap(name, number, dtype.name, -(-as_int(extent) // stride), stride, stride, (rows or shape[0], shape[1]),
                         SHARED_LAYOUT)
        return _Read(op, made, row, column, turned)

    def _span(self, v: Value) -> tuple[Dim | None, Dim | None]:
        """What is known of an index before anything is printed."""
        made = v.defining_op
        if made is not None and made.name == "tile.program_id":
            return 0, self.kernel["grid"][made["axis"]] - 1
        return 0, None

    # -- printing ---------------------------------------------------------------------------------------------------------

    def run(self) -> KernelSource:
        kernel = self.kernel
        self.taken |= set(_NAMES)
        self._analyse()
        name = identifier(kernel["sym_name"])
        self.taken |= {name, f"{name}_loader", f"{name}_group"}
        pointers = {self._name(a, "p"): pointer(element_type(a.type)) for a in kernel.body.args}
        loader = self._function(self._loader)
        group = self._function(self._group)
        given = "".join(f"{p}, " for p in pointers)
        functions = [
            f"@gluon.jit\ndef {name}_loader({given}q_map, k_map, v_map, {_RINGS}):\n" + "\n".join(loader),
            f"@gluon.jit\ndef {name}_group({given}{_RINGS}, who: gl.constexpr):\n" + "\n".join([*self._constants(), *group]),
            self._entry(name, given),
        ]
        body = "\n".join(functions)
        helpers = [_gluon(h.replace("@triton.jit", "@gluon.jit")).rstrip() + "\n" for h in used_helpers(body)]
        header = "".join(f"# {line}\n" for line in provenance(kernel)) + _HEADER
        if "libdevice." in body + "".join(helpers):
            header += "from triton.language.extra import libdevice\n"
        text = "\n\n".join([header, *helpers, *(f + "\n" for f in functions)])
        maps = (self.q.map, self.loops[0].k.map, self.loops[0].v.map)
        signature = pointers | {m.name: m.triton_type for m in maps}
        return KernelSource(name, text, signature, len(kernel.body.args), (), 0, ROWS * self.steps, True, 4, self.stages, maps,
                            MAX_REGISTERS, min(self.programs, self.target.multiprocessors or self.programs))

    def _function(self, write: Callable[[], None]) -> list[str]:
        before, self.lines = self.lines, []
        write()
        lines, self.lines = self.lines, before
        return lines

    def _constants(self) -> list[str]:
        """The layouts of tiles, and position vectors in them."""
        n = min(self.steps, self.columns)
        lines = [
            f"    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, {n}, 16])",
            "    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)",
            f"    stored: gl.constexpr = gl.BlockedLayout([1, 8], [{32 * 8 // self.columns}, {self.columns // 8}], [4, 1], [1, 0])",
            f"    zero = gl.zeros([{HALF}, {self.steps}], gl.float32, layout=layout)",
        ]
        for (axis, size, _, layout), name in self.positions.items():
            offset = f"who*{HALF} + " if axis == 0 and size == HALF else ""
            place = "[:, None]" if axis == 0 else "[None, :]"
            lines.append(f"    {name} = {offset}gl.arange(0, {size}, layout=gl.SliceLayout({1 - axis}, {layout})){place}")
        return lines

    def _loader(self) -> None:
        size = element_type(self.q.op.result.type).bytes
        self._programs()
        for op in self._needed():
            self._one(op)
        self._write("mbarrier.wait(q_free, (turn & 1) ^ 1)")
        self._write(f"mbarrier.expect(q_full, {ROWS * self.width * size})")
        for half in (0, 1):
            self._write(f"tma_load(q_map, {self._place(self.q, half * HALF)}, q_full, q_tile.index({half}))")
        for loop, low, high in self._ranges(peel=False):
            i = self._name(loop.op.body.args[0], "i")
            self._for(i, low, high, loop.op["step"])
            self._write(f"stage = steps % {self.stages}")
            for tile, read in (("k", loop.k), ("v", loop.v)):
                self._write(f"mbarrier.wait({tile}_free.index(stage), ((steps // {self.stages}) & 1) ^ 1)")
                self._write(f"mbarrier.expect({tile}_full.index(stage), {product(read.map.block) * size})")
                self._write(f"tma_load({tile}_map, {self._place(read)}, {tile}_full.index(stage), {tile}_tile.index(stage))")
            self._write("steps += 1")
            self.indent -= 1
        self.indent -= 1

    def _programs(self) -> None:
        """The loop over this multiprocessor's programs: every other round runs backwards, so that each gets long and short ones alike."""
        count = min(self.programs, self.target.multiprocessors or self.programs)
        rounds, rest = divmod(self.programs, count)
        late = "gl.program_id(0)" if rounds % 2 == 0 else f"{count - 1} - gl.program_id(0)"
        self._write("steps = 0")
        self._write(f"for turn in range(0, {rounds}{f' + ({late} < {rest}).to(gl.int32)' if rest else ''}):")
        self.indent += 1
        self._write(f"program = turn*{count} + gl.where((turn & 1) == 0, gl.program_id(0), {count - 1} - gl.program_id(0))")

    def _for(self, name: str, low: str, high: str, step: int) -> None:
        self._write(f"for {name} in range({low}, {high}, {step}):")
        self.indent += 1

    def _place(self, read: _Read, more: int = 0) -> str:
        text = self._text(read.op.operands[1:], ())
        return f"[{_gluon(text(read.row + more))}, {_gluon(text(read.column))}]"

    def _ranges(self, *, peel: bool) -> Iterable[tuple[_Loop, str, str]]:
        """Loops with their bounds; without the step that is peeled off the front."""
        start = self.loops[0].op
        for k, loop in enumerate(self.loops):
            op = loop.op
            text = self._text(op.operands[:op["indices"]], ())
            end = upper_bound(op["upper"], text.bounds)
            self.ranges[op.body.args[0]] = (lower_bound(op["lower"], text.bounds), end - 1 if isinstance(end, int) else None)
            low, high = _gluon(text(op["lower"])), _gluon(text(op["upper"]))
            if peel:
                after = _gluon(self._text(start.operands[:start["indices"]], ())(start["lower"] + op["step"]))
                low = after if k == 0 else f"gl.maximum({low}, {after})"
            yield loop, low, high

    # -- a group of warps

    def _group(self) -> None:
        self.positions: dict[tuple[int, int, int, str], str] = {}
        loops = self.loops
        inside = list(self.kernel.body)
        begin = inside.index(loops[0].op)
        self._programs()
        for op in inside[:begin]:
            if op is not self.q.op:
                self._one(op)
        for loop in loops:
            for op in loop.hoisted:
                self._one(op)
        state = [self._name(r, "acc") for r in loops[-1].op.results]
        for loop in loops:
            for arg, result, name in zip(loop.op.body.args[1:], loop.op.results, state, strict=True):
                self.names[arg] = self.names[result] = name
        for init, name in zip(loops[0].op.operands[loops[0].op["indices"]:], state, strict=True):
            self._write(f"{name} = {self._use(init)}")
        self._write("mbarrier.wait(q_full, turn & 1)")
        if self.peeled is None:
            for loop, low, high in self._ranges(peel=False):
                self._for(self._name(loop.op.body.args[0], "i"), low, high, loop.op["step"])
                self._step(loop, state)
                self.indent -= 1
            self._write("mbarrier.arrive(q_free, count=1)")
        else:
            self._ahead(self.peeled, state)
        for op in inside[begin:]:
            if op.name not in ("tile.for", "tile.yield"):
                self._one(op)
        self.indent -= 1

    def _scores(self, loop: _Loop, stage: str) -> str:
        name = self._name(loop.first.result)
        self._write(f"{name} = warpgroup_mma(q_tile.index(who), k_tile.index({stage}).permute((1, 0)), zero, use_acc=False, is_async=True)")
        return name

    def _weighted(self, acc: str, weights: str, stage: str) -> None:
        self._write(f"{acc} = warpgroup_mma({weights}, v_tile.index({stage}), {acc}, is_async=True)")

    def _wait(self, which: str, stage: str, steps: str) -> None:
        self._write(f"mbarrier.wait({which}_full.index({stage}), ({steps} // {self.stages}) & 1)")

    def _free(self, which: str, stage: str) -> None:
        self._write(f"mbarrier.arrive({which}_free.index({stage}), count=1)")

    def _step(self, loop: _Loop, state: list[str]) -> None:
        """One step in the plain order."""
        self._write(f"stage = steps % {self.stages}")
        self._wait("k", "stage", "steps")
        s = self._scores(loop, "stage")
        self._write(f"{s} = warpgroup_mma_wait(0, deps=({s},))")
        self._free("k", "stage")
        for op in (*loop.between, *loop.late):
            self._one(op)
        self._write(f"weights = gl.convert_layout({self._use(loop.second.operands[0])}, operand)")
        self._wait("v", "stage", "steps")
        acc = self._name(loop.second.result)
        self._write(f"{acc} = {self._use(loop.second.operands[2])}")
        self._weighted(acc, "weights", "stage")
        self._write(f"{acc} = warpgroup_mma_wait(0, deps=({acc},))")
        self._free("v", "stage")
        self._update(loop, state, acc)
        self._write("steps += 1")

    def _update(self, loop: _Loop, state: list[str], acc: str) -> None:
        """The carried values of the next step."""
        yields = [acc if k == loop.carried else self._use(v) for k, v in enumerate(loop.op.body.terminator.operands)]  # type: ignore[union-attr]
        changes = [(a, b) for a, b in zip(state, yields, strict=True) if a != b]
        if changes:
            self._write(f"{', '.join(a for a, _ in changes)} = {', '.join(b for _, b in changes)}")

    def _ahead(self, peeled: _Loop, state: list[str]) -> None:
        """The scores of a step are under way together with the weighted sum of the step before."""
        acc = state[peeled.carried]
        start = self.loops[0].op
        text = self._text(start.operands[:start["indices"]], ())
        i = self._name(peeled.op.body.args[0], "i")
        list(self._ranges(peel=False))  # notes the ranges of positions
        self._write(f"{i} = {_gluon(text(start['lower']))}")
        self._write(f"stage = steps % {self.stages}")
        self._wait("k", "stage", "steps")
        s = self._scores(peeled, "stage")
        self._write(f"{s} = warpgroup_mma_wait(0, deps=({s},))")
        self._free("k", "stage")
        self._between(peeled, state)
        for v in (peeled.op.body.args[0], *(r for op in (peeled.first, *peeled.between, *peeled.late) for r in op.results)):
            self.names.pop(v)  # a name of its own in the loop, or it would count as carried by it
        for loop, low, high in self._ranges(peel=True):
            self._for(self._name(loop.op.body.args[0], "i"), low, high, loop.op["step"])
            self._write(f"last = steps % {self.stages}")
            self._write("steps += 1")
            self._write(f"stage = steps % {self.stages}")
            self._wait("k", "stage", "steps")
            s = self._scores(loop, "stage")
            self._wait("v", "last", "(steps - 1)")
            self._weighted(acc, "weights", "last")
            self._write(f"{s} = warpgroup_mma_wait(1, deps=({s},))")
            self._free("k", "stage")
            self._between(loop, state, "last")
            self.indent -= 1
        self._write("mbarrier.arrive(q_free, count=1)")
        self._write(f"last = steps % {self.stages}")
        self._wait("v", "last", "steps")
        self._weighted(acc, "weights", "last")
        self._write(f"{acc} = warpgroup_mma_wait(0, deps=({acc},))")
        self._free("v", "last")
        self._write("steps += 1")

    def _between(self, loop: _Loop, state: list[str], last: str = "") -> None:
        """From scores to weights; the accumulator of the step before (its tile was in stage `last`) is waited for, and scaled."""
        acc = state[loop.carried]
        for op in loop.between:
            self._one(op)
        if last:
            self._write(f"{acc} = warpgroup_mma_wait(0, deps=({acc},))")
            self._free("v", last)
        for op in loop.late:
            self._one(op)
        self._write(f"weights = gl.convert_layout({self._use(loop.second.operands[0])}, operand)")
        self._update(loop, state, self._use(loop.second.operands[2]))

    # -- the entry

    def _entry(self, name: str, given: str) -> str:
        q, k, v = self.q.map, self.loops[0].k.map, self.loops[0].v.map
        lines = [f"@gluon.jit\ndef {name}({given}q_map, k_map, v_map):"]
        for ring, count, made in (("q", 2, q), ("k", self.stages, k), ("v", self.stages, v)):
            lines.append(f"    {ring}_tile = gl.allocate_shared_memory({ring}_map.dtype, [{count}, {made.block[0]}, {made.block[1]}], {ring}_map.layout)")
        for ring, shape in (("q", "[1]"), ("k", f"[{self.stages}, 1]"), ("v", f"[{self.stages}, 1]")):
            for what in ("full", "free"):
                lines.append(f"    {ring}_{what} = gl.allocate_shared_memory(gl.int64, {shape}, mbarrier.MBarrierLayout())")
        lines += ["    mbarrier.init(q_full, count=1)", "    mbarrier.init(q_free, count=2)"]
        for ring in "kv":
            for stage in range(self.stages):
                lines += [f"    mbarrier.init({ring}_{what}.index({stage}), count={count})" for what, count in (("full", 1), ("free", 2))]
        groups = [f"({name}_group, ({given}{_RINGS}, gl.constexpr({who})))" for who in (0, 1)]
        lines += ["    fence_async_shared()", "    gl.warp_specialize([", *(f"        {g}," for g in groups),
                  f"        ({name}_loader, ({given}q_map, k_map, v_map, {_RINGS})),", f"    ], [4, 1], [{GROUP_REGISTERS}, {LOADER_REGISTERS}])"]
        return "\n".join(lines)

    # -- ops: as in the plain printer, on half the rows

    def _one(self, op: Operation) -> None:
        handler = _HANDLERS.get(op.name)
        if handler is not None:
            handler(self, op)
        elif op.name.startswith("arith."):
            self._arith(op)
        else:
            raise _Declined(f"'{op.name}' has no form in Gluon")

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
        _require(all(op.parent is self.kernel.body and (op.name in ("tile.program_id", "tile.index") or op.name.startswith("arith.")) for op in found),
                 "positions depend on what is computed")
        return [op for op in self.kernel.body if op in found]

    def _local(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(HALF if k == 0 and n == ROWS else n for k, n in enumerate(shape))

    def _text(self, operands: Sequence[Value], shape: Sequence[int]) -> IndexText:
        text = super()._text(operands, self._local(shape))
        if shape and shape[0] == ROWS:
            text.bounds["t0"] = (0, ROWS - 1)
        return text

    def _arange(self, axis: int, size: int, rank: int) -> str:
        _require(rank == 2, "tiles of other ranks")
        key = (axis, size, rank, "stored" if self.store_layout else "layout")
        if key not in self.positions:
            name = f"{'row' if axis == 0 else 'col'}{size}{'_stored' if self.store_layout else ''}"
            while name in self.taken:
                name += "_"
            self.taken.add(name)
            self.positions[key] = name
        return self.positions[key]

    def _spread(self, text: str, shape: Sequence[int], reached: Sequence[int] | None) -> str:
        """Operands of Gluon's operators broadcast by themselves."""
        return text

    def _define(self, op: Operation, text: str) -> None:
        super()._define(op, _gluon(text))

    def _arith(self, op: Operation) -> None:
        small = self.narrow.takes(op)
        if op.name == "arith.constant":
            self._define(op, f"gl.cast({literal(op['value'])}, {'gl.int32' if small else self._type(element_type(op.result.type))})")
        elif small and op.name == "arith.cast" and op.result in self.narrow.known:
            self._define(op, self._name(op.operands[0]))
        else:
            read = self._name if small else self._use
            self._define(op, arith_text(op, [read(v) for v in op.operands], self.index_type))

    def program_id(self, op: Operation) -> None:
        """The last axis, the blocks of rows, varies slower than the batch within a team of TEAM batch elements: neighbours are of one length, and
        what a team reads stays in the cache."""
        grid, axis = [as_int(n) for n in self.kernel["grid"]], op["axis"]
        *batch, blocks = grid
        team = gcd(TEAM, prod(batch))
        size = grid[axis]
        self.ranges[op.result] = (0, size - 1)
        if size == 1:
            self._define(op, "0")
        elif axis == len(batch):
            self._define(op, f"program // {team} % {blocks}")
        else:
            below = prod(batch[axis + 1:])
            member = f"(program // {team * blocks} * {team} + program % {team})"
            self._define(op, member + (f" // {below}" if below != 1 else "") + (f" % {size}" if any(n != 1 for n in batch[:axis]) else ""))

    def full(self, op: Operation) -> None:
        assert isinstance(op.result.type, TileType)
        value, shape = op.operands[0], self._local(op.result.type.shape)  # type: ignore[arg-type]
        dtype = self._type(element_type(op.result.type))
        if isinstance(value.type, TileType):
            self._define(op, f"gl.full([{shape[0]}, {shape[1]}], 0, {dtype}, layout=layout) + {self._use(value)}")
        else:
            self._define(op, f"gl.full([{shape[0]}, {shape[1]}], {self._use(value)}, {dtype}, layout=layout)")

    def mask(self, op: Operation) -> None:
        text, _ = self._mask(op["mask"], (), op.operands, self._text(op.operands, op["shape"]))
        self._define(op, text)

    def load(self, op: Operation) -> None:
        _require(not op["check"], "an index is checked")
        text = self._text(op.operands[1:], op["shape"])
        mask, _ = self._mask(op["mask"], op["mask_low"], op.operands[1:], text)
        masked = f", mask={mask}, other={literal(op['other'])}" if mask else ""
        self._define(op, f"gl.load({self._name(op.operands[0])} + ({text(op['offset'])}){masked})")

    def store(self, op: Operation) -> None:
        """Through shared memory, to a layout in which a thread writes 16 bytes."""
        value = op.operands[1]
        _require(not op["atomic"] and isinstance(value.type, TileType), "an atomic store, or one of a number")
        assert isinstance(value.type, TileType)
        wide = value.type.shape[1] == self.columns
        self.store_layout = wide
        text = self._text(op.operands[2:], value.type.shape)  # type: ignore[arg-type]
        mask, _ = self._mask(op["mask"], op.attributes.get("mask_low", ()), op.operands[2:], text)
        place = _gluon(text(op["offset"]))
        self.store_layout = False
        made = f"gl.convert_layout({self._use(value)}, stored)" if wide else self._use(value)
        self._write(f"gl.store({self._name(op.operands[0])} + ({place}), {made}{f', mask={_gluon(mask)}' if mask else ''})")


_HANDLERS = {
    "tile.program_id": _Groups.program_id,
    "tile.load": _Groups.load,
    "tile.store": _Groups.store,
    "tile.index": _Groups.index,
    "tile.mask": _Groups.mask,
    "tile.full": _Groups.full,
    "tile.reduce": _Groups.reduce,
    "tile.require": _Groups.require,
}


def _gluon(text: str) -> str:
    """Triton's functions by their names in Gluon."""
    text = re.sub(r"\btl\.(where|exp2|abs|maximum|minimum|floor|ceil|cast|sum|max|min|reduce|inline_asm_elementwise)\(", r"gl.\1(", text)
    return re.sub(r"\blibdevice\.(div_rn|sqrt_rn)\(", r"gl.\1(", text)


def _is_whole(op: Operation, steps: int) -> bool:
    """It computes something for every score."""
    return any(isinstance(r.type, TileType) and r.type.shape == (ROWS, steps) for r in op.results)


def _least_of(e: Dim) -> tuple[Dim, ...]:
    """The arguments of a maximum, which are below what it is below; else the expression."""
    if isinstance(e, Expr) and not e.const and len(e.terms) == 1 and e.terms[0][1] == 1 and len(e.terms[0][0]) == 1 and isinstance(e.terms[0][0][0], Max):
        return e.terms[0][0][0].args
    return (e,)


def _is_zero(v: Value) -> bool:
    made = v.defining_op
    return made is not None and made.name == "arith.constant" and made["value"] == 0


def _divided(e: Dim, by: int) -> tuple[Dim, Dim]:
    """(row, column) with row * by + column == e: terms that are multiples of `by` count as rows."""
    if isinstance(e, int):
        return divmod(e, by)
    rows = tuple((m, c // by) for m, c in e.terms if c % by == 0)
    columns = tuple((m, c) for m, c in e.terms if c % by)
    row, column = divmod(e.const, by)
    return Expr(rows, row) if rows else row, Expr(columns, column) if columns else column
