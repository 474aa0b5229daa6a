"""Streams on Hopper: a tile kernel printed in Gluon, its warps split by job.

    source = print_warp_groups(kernel, target, divisible)     # a KernelSource, or a str that says why not

The kernel is a stream (`stream_shape.py`): loops with the two products s = q @ k[i] and acc = p @ v[i] + acc * alpha. A warp of its own brings q,
k[i] and v[i] to shared memory with the bulk copy engine (TMA, through tensor maps), a ring of stages ahead; two groups of four warps compute 64
rows each. They meet at barriers in shared memory alone: full[stage] says that a tile has come, free[stage] that both groups have read it. So the
exponentials of one group run beside the products of the other. Programs are persistent: one for each multiprocessor, which takes every so
many-th of the kernel's programs; the next one's tiles (there is room for two q) are under way while the last one is finished.

With `ahead` a group also overlaps with itself: the product q @ k[i + 1] and the product p @ v[i] are started before the exponentials of step
i + 1, as in FlashAttention-3 (Shah et al. 2024, section 3.2). That pays where every step is like the others (no masked tiles): the first step
and the last product are then code of their own, beside each loop.

What the kernel means is its tile IR, which the interpreter and plain Triton print and check: this is one more schedule of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from ...ir.core import Operation, Value
from ...ir.expr import as_int, product
from ...ir.ranges import lower_bound, upper_bound
from ...ir.target import Target
from ...ir.types import TileType, element_type
from .arith import arith_text, literal
from .dtypes import pointer
from .expressions import IndexText
from .helpers import used_helpers
from .printer import KernelSource, Printer, identifier, provenance
from .stream_shape import HALF, ROWS, Declined, Loop, Read, StreamShape, read_stream, require

__all__ = ["print_warp_groups"]

MAX_REGISTERS = 168
"""Per thread when the kernel starts: 65536 for 12 warps. The groups take the loader's."""
GROUP_REGISTERS, LOADER_REGISTERS = 240, 24
SHARED = 192 << 10
"""Bytes of shared memory for q, k and v; the rest is for turning results."""
AHEAD_LOOPS = 1
"""Loops of a stream up to which a group runs ahead of itself."""
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


def print_warp_groups(kernel: Operation, target: Target, divisible: Sequence[bool]) -> KernelSource | str:
    """`divisible`: of each buffer, whether its address is a multiple of 16 in every launch."""
    if target.capability != 90:
        return "not Hopper"
    try:
        return _Groups(kernel, target, divisible).run()
    except Declined as why:
        return str(why)


class _Groups(Printer):
    """Prints a kernel as loader, group and entry."""

    def __init__(self, kernel: Operation, target: Target, divisible: Sequence[bool]):
        super().__init__(kernel)
        self.target, self.divisible = target, divisible
        self.store_layout = False

    def _plan(self, shape: StreamShape) -> None:
        self.loops, self.q, self.steps, self.width, self.columns = shape.loops, shape.q, shape.steps, shape.width, shape.columns
        size = element_type(self.q.op.result.type).bytes
        self.stages = min(4, (SHARED - 2 * ROWS * self.width * size) // (self.steps * (self.width + self.columns) * size))
        require(self.stages >= 2, "no room for two stages")
        self.programs = as_int(product(self.kernel["grid"]))
        # Measured: with loops for masked steps too, the code of both groups outgrows the instruction cache, and the plain order is faster.
        self.peeled = shape.peeled if len(self.loops) <= AHEAD_LOOPS else None

    # -- printing ---------------------------------------------------------------------------------------------------------

    def run(self) -> KernelSource:
        kernel = self.kernel
        require(not self.wide, "too large for 32 bits")
        self.taken |= set(_NAMES)
        self._plan(read_stream(kernel, self.divisible))
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
        self._write("mbarrier.wait(q_free.index(turn & 1), ((turn >> 1) & 1) ^ 1)")
        self._write(f"mbarrier.expect(q_full.index(turn & 1), {ROWS * self.width * size})")
        for half in (0, 1):
            self._write(f"tma_load(q_map, {self._place(self.q, half * HALF)}, q_full.index(turn & 1), q_tile.index((turn & 1)*2 + {half}))")
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

    def _place(self, read: Read, more: int = 0) -> str:
        text = self._text(read.op.operands[1:], ())
        return f"[{_gluon(text(read.row + more))}, {_gluon(text(read.column))}]"

    def _ranges(self, *, peel: bool) -> Iterable[tuple[Loop, str, str]]:
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
        self._write("mbarrier.wait(q_full.index(turn & 1), (turn >> 1) & 1)")
        if self.peeled is None:
            for loop, low, high in self._ranges(peel=False):
                self._for(self._name(loop.op.body.args[0], "i"), low, high, loop.op["step"])
                self._step(loop, state)
                self.indent -= 1
            self._write("mbarrier.arrive(q_free.index(turn & 1), count=1)")
        else:
            self._ahead(self.peeled, state)
        for op in inside[begin:]:
            if op.name not in ("tile.for", "tile.yield"):
                self._one(op)
        self.indent -= 1

    def _scores(self, loop: Loop, stage: str) -> str:
        name = self._name(loop.first.result)
        tiles = f"q_tile.index((turn & 1)*2 + who), k_tile.index({stage}).permute((1, 0))"
        self._write(f"{name} = warpgroup_mma({tiles}, zero, use_acc=False, is_async=True)")
        return name

    def _weighted(self, acc: str, weights: str, stage: str) -> None:
        self._write(f"{acc} = warpgroup_mma({weights}, v_tile.index({stage}), {acc}, is_async=True)")

    def _wait(self, which: str, stage: str, steps: str) -> None:
        self._write(f"mbarrier.wait({which}_full.index({stage}), ({steps} // {self.stages}) & 1)")

    def _free(self, which: str, stage: str) -> None:
        self._write(f"mbarrier.arrive({which}_free.index({stage}), count=1)")

    def _step(self, loop: Loop, state: list[str]) -> None:
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

    def _update(self, loop: Loop, state: list[str], acc: str) -> None:
        """The carried values of the next step."""
        yields = [acc if k == loop.carried else self._use(v) for k, v in enumerate(loop.op.body.terminator.operands)]  # type: ignore[union-attr]
        changes = [(a, b) for a, b in zip(state, yields, strict=True) if a != b]
        if changes:
            self._write(f"{', '.join(a for a, _ in changes)} = {', '.join(b for _, b in changes)}")

    def _ahead(self, peeled: Loop, state: list[str]) -> None:
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
        self._write("mbarrier.arrive(q_free.index(turn & 1), count=1)")
        self._write(f"last = steps % {self.stages}")
        self._wait("v", "last", "steps")
        self._weighted(acc, "weights", "last")
        self._write(f"{acc} = warpgroup_mma_wait(0, deps=({acc},))")
        self._free("v", "last")
        self._write("steps += 1")

    def _between(self, loop: Loop, state: list[str], last: str = "") -> None:
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
        for ring, count, made in (("q", 4, q), ("k", self.stages, k), ("v", self.stages, v)):
            shape = f"[{count}, {made.block[0]}, {made.block[1]}]"
            lines.append(f"    {ring}_tile = gl.allocate_shared_memory({ring}_map.dtype, {shape}, {ring}_map.layout)")
        for ring, shape in (("q", "[2, 1]"), ("k", f"[{self.stages}, 1]"), ("v", f"[{self.stages}, 1]")):
            for what in ("full", "free"):
                lines.append(f"    {ring}_{what} = gl.allocate_shared_memory(gl.int64, {shape}, mbarrier.MBarrierLayout())")
        for ring, stages in (("q", 2), ("k", self.stages), ("v", self.stages)):
            for stage in range(stages):
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
            raise Declined(f"'{op.name}' has no form in Gluon")

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

    def _local(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(HALF if k == 0 and n == ROWS else n for k, n in enumerate(shape))

    def _text(self, operands: Sequence[Value], shape: Sequence[int]) -> IndexText:
        text = super()._text(operands, self._local(shape))
        if shape and shape[0] == ROWS:
            text.bounds["t0"] = (0, ROWS - 1)
        return text

    def _arange(self, axis: int, size: int, rank: int) -> str:
        require(rank == 2, "tiles of other ranks")
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
        grid, axis = self.kernel["grid"], op["axis"]
        below, size = as_int(product(grid[axis + 1:])), grid[axis]
        self.ranges[op.result] = (0, size - 1)
        text = "program" + (f" // {below}" if below != 1 else "") + (f" % {size}" if any(n != 1 for n in grid[:axis]) else "")
        self._define(op, text if size != 1 else "0")

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
        require(not op["check"], "an index is checked")
        text = self._text(op.operands[1:], op["shape"])
        mask, _ = self._mask(op["mask"], op["mask_low"], op.operands[1:], text)
        masked = f", mask={mask}, other={literal(op['other'])}" if mask else ""
        self._define(op, f"gl.load({self._name(op.operands[0])} + ({text(op['offset'])}){masked})")

    def store(self, op: Operation) -> None:
        """Through shared memory, to a layout in which a thread writes 16 bytes. Values of rows too: stored from where they are, Triton 3.6 keeps
        half of the accumulators in memory."""
        value = op.operands[1]
        require(not op["atomic"] and isinstance(value.type, TileType), "an atomic store, or one of a number")
        assert isinstance(value.type, TileType)
        wide = value.type.shape[1] in (1, self.columns)
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


def _is_number(op: Operation) -> bool:
    """It reads one number from memory: where a program's loops begin or end."""
    return op.name == "tile.load" and not op["shape"]


def _gluon(text: str) -> str:
    """Triton's functions by their names in Gluon."""
    text = re.sub(r"\btl\.(where|exp2|abs|maximum|minimum|floor|ceil|cast|sum|max|min|reduce|inline_asm_elementwise)\(", r"gl.\1(", text)
    return re.sub(r"\blibdevice\.(div_rn|sqrt_rn)\(", r"gl.\1(", text)
