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

from collections.abc import Callable, Sequence

from ...ir.core import Operation
from ...ir.expr import as_int, product
from ...ir.target import Target
from ...ir.types import element_type
from .dtypes import pointer
from .group_ops import in_gluon
from .group_schedule import TURNS, GroupSchedule
from .helpers import used_helpers
from .printer import KernelSource, identifier, provenance
from .stream_shape import HALF, ROWS, Declined, Read, StreamShape, read_stream, require

__all__ = ["print_warp_groups"]

MAX_REGISTERS = 168
"""Per thread when the kernel starts: 65536 for 12 warps. The groups take the loader's."""
GROUP_REGISTERS, LOADER_REGISTERS = 240, 24
SHARED = 192 << 10
"""Bytes of shared memory for q, k and v; the rest is for turning results."""
ROLLING = 2
"""Loops of a stream up to which the rolling order is taken, where every program has a step. Measured (H200): causal 592 -> 640 TFLOP/s, ALiBi 476 ->
530; with three loops (a window, documents), two of them masked and code of their own, turns in the plain order are better: 423 -> 443."""
_NAMES = ("gl", "gluon", "mbarrier", "tma_load", "program", "done", "steps", "turn", "stage", "who", "layout", "stored", "operand", "zero",
          "weights", "part", "zero_part", "weights_part", "take_turn", "give_turn", "opaque",
          "q_map", "k_map", "v_map", "q_tile", "k_tile", "v_tile", "q_full", "q_free", "k_full", "k_free", "v_full", "v_free")
_RINGS = "q_tile, k_tile, v_tile, q_full, q_free, k_full, k_free, v_full, v_free"
_HEADER = """import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # its name in Triton 3.9, and before
"""
_OPAQUE = """@gluon.jit
def opaque(x):
    # a step's position: LLVM would compute what is derived from it in ways that take more registers and instructions
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=True, pack=1)
"""
_TURNS = """@gluon.jit
def take_turn(who: gl.constexpr):
    # waits until the other group has given the turn
    if who == 0:
        gl.inline_asm_elementwise("bar.sync 8, 256; mov.b32 $0, $1;", "=r,r", [0], dtype=gl.int32, is_pure=False, pack=1)
    else:
        gl.inline_asm_elementwise("bar.sync 9, 256; mov.b32 $0, $1;", "=r,r", [0], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def give_turn(who: gl.constexpr):
    if who == 0:
        gl.inline_asm_elementwise("bar.arrive 9, 256; mov.b32 $0, $1;", "=r,r", [0], dtype=gl.int32, is_pure=False, pack=1)
    else:
        gl.inline_asm_elementwise("bar.arrive 8, 256; mov.b32 $0, $1;", "=r,r", [0], dtype=gl.int32, is_pure=False, pack=1)
"""


def print_warp_groups(kernel: Operation, target: Target, divisible: Sequence[bool]) -> KernelSource | str:
    """`divisible`: of each buffer, whether its address is a multiple of 16 in every launch."""
    if target.capability != 90:
        return "not Hopper"
    try:
        return _Groups(kernel, target, divisible).run()
    except Declined as why:
        return str(why)


class _Groups(GroupSchedule):
    """Prints a kernel as loader, group and entry."""

    def __init__(self, kernel: Operation, target: Target, divisible: Sequence[bool]):
        super().__init__(kernel)
        self.target, self.divisible = target, divisible

    def _plan(self, shape: StreamShape) -> None:
        self.loops, self.q, self.steps, self.width, self.columns = shape.loops, shape.q, shape.steps, shape.width, shape.columns
        size = element_type(self.q.op.result.type).bytes
        self.stages = min(4, (SHARED - 2 * ROWS * self.width * size) // (self.steps * (self.width + self.columns) * size))
        require(self.stages >= 2, "no room for two stages")
        self.programs = as_int(product(self.kernel["grid"]))
        rolls = shape.peeled is not None and len(self.loops) <= ROLLING
        self.peeled, self.first_runs, self.turns = (shape.peeled, shape.first_runs, False) if rolls else (None, False, TURNS)

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
        helpers = [in_gluon(h.replace("@triton.jit", "@gluon.jit")).rstrip() + "\n" for h in used_helpers(body)]
        helpers += [_OPAQUE] * ("opaque(" in body) + [_TURNS] * ("take_turn(" in body)
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
        if self.halved:
            lines += [f"    part: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, {HALF}, 16])",
                      f"    zero_part = gl.zeros([{HALF}, {HALF}], gl.float32, layout=part)"]
        for (axis, size, _, layout), name in self.positions.items():
            offset = f"who*{HALF} + " if axis == 0 and size == HALF else ""
            place = "[:, None]" if axis == 0 else "[None, :]"
            lines.append(f"    {name} = {offset}gl.arange(0, {size}, layout=gl.SliceLayout({1 - axis}, {layout})){place}")
        return lines

    def _loader(self) -> None:
        size = element_type(self.q.op.result.type).bytes
        v_steps = "steps"
        if self.peeled is not None:  # the weighted sum of a step is formed with the scores of the next: before the first one, of nothing
            v_steps = "(steps + 1)"
            self._write(f"mbarrier.expect(v_full.index(0), {product(self.loops[0].v.map.block) * size})")
            self._write("tma_load(v_map, [0, 0], v_full.index(0), v_tile.index(0))")
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
            for tile, read, at in (("k", loop.k, "steps"), ("v", loop.v, v_steps)):
                if at != "steps":
                    self._write(f"stage = {at} % {self.stages}")
                self._write(f"mbarrier.wait({tile}_free.index(stage), (({at} // {self.stages}) & 1) ^ 1)")
                self._write(f"mbarrier.expect({tile}_full.index(stage), {product(read.map.block) * size})")
                self._write(f"tma_load({tile}_map, {self._place(read)}, {tile}_full.index(stage), {tile}_tile.index(stage))")
            self._write("steps += 1")
            self.indent -= 1
        self.indent -= 1

    def _place(self, read: Read, more: int = 0) -> str:
        text = self._text(read.op.operands[1:], ())
        return f"[{in_gluon(text(read.row + more))}, {in_gluon(text(read.column))}]"

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
