"""Products of few rows on Hopper, which wait for memory alone: a tile kernel printed in Gluon with a ring of tiles under way.

    source = print_few_rows(kernel, target, divisible)     # a KernelSource, or a str that says why not

The kernel is the transpose of x @ w (`contraction_gpu.py`, a turned tile of NARROW rows of w and 16 of x); x is contiguous along K, w along either
dimension. A warp of its own asks for all tiles by the copy engine, as far ahead as shared memory has room; four warps multiply. They take 64 rows
at a time: the tile in shared memory has as many, of which only the first NARROW are ever filled, and of the product only these are kept. So a
weight of n rows gives n/32 programs, enough for all multiprocessors where 64 rows each would leave half of them idle, or need parts that a second
kernel adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...ir.core import Operation, Value
from ...ir.expr import Dim, as_int, free_symbols, product, substitute
from ...ir.ranges import known_less, split_linear
from ...ir.target import Target
from ...ir.types import BufferType, TileType, element_type
from .descriptors import ALIGNMENT, TensorMap
from .dtypes import pointer
from .gluon import GRID_CONTROL, HEADER, OneGroup
from .group_ops import in_gluon
from .helpers import used_helpers
from .printer import KernelSource, identifier, loaded_buffers, provenance, stored_buffers
from .stream_shape import SHARED_LAYOUT, Declined, divided, require

__all__ = ["NARROW", "print_few_rows"]

NARROW, WHOLE, FEW, STEP = 32, 64, 16, 64
"""Rows of w that a program has, rows that matrix units take, rows of x, and elements of K in a tile: 128 bytes, as their layout wants."""
SHARED = 210 << 10
"""Bytes of shared memory for tiles; the rest is for the result and barriers."""
REGISTERS = 168
BY_COLUMNS = "NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)"
"""Of tiles of a weight whose rows are contiguous along N: NARROW of 16 bits are 64 bytes, and in a tile of 64 by WHOLE the first NARROW columns lie
together."""
_NAMES = ("gl", "gluon", "mbarrier", "tma_load", "layout", "stored", "multiplied", "left_map", "right_map", "left_tile", "right_tile", "full", "free",
          "acc", "sums", "step", "stage", "part")
_RING = "left_tile, right_tile, full, free"


def print_few_rows(kernel: Operation, target: Target, divisible: Sequence[bool]) -> KernelSource | str:
    """`divisible`: of each buffer, whether its address is a multiple of 16 in every launch."""
    if target.capability != 90:
        return "not Hopper"
    try:
        return _FewRows(kernel, divisible).run()
    except Declined as why:
        return str(why)


@dataclass(frozen=True)
class _Operand:
    """A factor: its tensor map, the first of its rows (over the operands of its load), and where K begins. `turned`: K goes along the map's rows."""

    load: Operation
    map: TensorMap
    row: Dim
    begin: int = 0
    turned: bool = False


def _number(op: Operation, loop: Operation) -> str:
    """The symbol of the loop's index in the place that a load reads."""
    return f"i{op.operands[1:].index(loop.body.args[0])}" if loop.body.args[0] in op.operands[1:] else "none"


class _FewRows(OneGroup):
    """Prints loader, group and entry."""

    columns = FEW

    def run(self) -> KernelSource:
        kernel = self.kernel
        require(not self.wide and not kernel["symbols"], "sizes are not constant, or too large for 32 bits")
        require(not (stored_buffers(kernel.body) & loaded_buffers(kernel.body)), "a buffer is read and written")
        inside = list(kernel.body)
        loops = [op for op in inside if op.name == "tile.for"]
        require(len(loops) == 1, "not one loop")
        loop, = loops
        dot = self._dot(loop)
        left, right = (self._operand(loop, dot, i) for i in (0, 1))
        before, after = inside[:inside.index(loop)], inside[inside.index(loop) + 1:]
        zero = loop.operands[loop["indices"]].defining_op
        before = [op for op in before if op is not zero]
        require(all(op.name in ("tile.program_id", "tile.index") or op.name.startswith("arith.") for op in before), "what is read before the product")
        self.taken |= set(_NAMES)
        name = identifier(kernel["sym_name"])
        self.taken |= {name, f"{name}_loader", f"{name}_group"}
        pointers = {self._name(a, "p"): pointer(element_type(a.type)) for a in kernel.body.args}
        size, parts = as_int(loop["upper"]), loop["step"] // STEP
        stages = SHARED // ((WHOLE + FEW) * STEP * 2 * parts)
        loader = self._loader(before, left, right, size // loop["step"], parts, stages)
        self.names[loop.results[0]] = "acc"
        group = self._group(before, [op for op in after if op.name != "tile.yield"], left.turned, size // loop["step"], parts, stages)
        given = "".join(f"{p}, " for p in pointers)
        functions = [f"@gluon.jit\ndef {name}_loader(left_map, right_map, {_RING}):\n" + "\n".join(loader),
                     f"@gluon.jit\ndef {name}_group({given}{_RING}, sums):\n" + "\n".join([*self._constants(), *group]),
                     self._entry(name, given, left, parts, stages)]
        body = "\n".join(functions)
        helpers = [in_gluon(h.replace("@triton.jit", "@gluon.jit")).rstrip() + "\n" for h in used_helpers(body)]
        header = "".join(f"# {line}\n" for line in provenance(kernel)) + HEADER
        if "libdevice." in body + "".join(helpers):
            header += "from triton.language.extra import libdevice\n"
        signature = pointers | {x.map.name: x.map.triton_type for x in (left, right)}
        text = "\n\n".join([header, *helpers, *(f + "\n" for f in functions)])
        return KernelSource(name, text, signature, len(kernel.body.args), (), 0, WHOLE * loop["step"], True, 4, stages, (left.map, right.map),
                            REGISTERS, as_int(product(kernel["grid"])), dependent=True)

    def _dot(self, loop: Operation) -> Operation:
        """The one product of the loop over all of K."""
        body = [op for op in loop.body if op.name != "tile.yield"]
        dots = [op for op in body if op.name == "tile.dot"]
        whole = loop["lower"] == 0 and isinstance(loop["upper"], int)
        require(len(body) == 3 and len(dots) == 1 and whole, "more than a product, or not of all of K")
        require(loop["step"] % STEP == 0 and loop["upper"] % loop["step"] == 0, "steps that do not divide K")
        dot, = dots
        require(len(loop.results) == 1 and dot.operands[2] is loop.body.args[1] and loop.body.terminator.operands[0] is dot.result,  # type: ignore[union-attr]
                "the product is not what the loop carries")
        zero = loop.operands[loop["indices"]].defining_op
        made = zero.operands[0].defining_op if zero is not None and zero.name == "tile.full" else None
        empty = made is not None and made.name == "arith.constant" and made["value"] == 0 and len(loop.operands[loop["indices"]].uses) == 1
        require(empty and element_type(dot.result.type).name == "f32", "the sum does not start at zero, or is not float32")
        require(isinstance(dot.result.type, TileType) and dot.result.type.shape == (NARROW, FEW), "a tile of other sizes")
        return dot

    def _operand(self, loop: Operation, dot: Operation, i: int) -> _Operand:
        op = dot.operands[i].defining_op
        require(op is not None and op.name == "tile.load" and op.parent is loop.body, "an operand is not read in the loop")
        assert op is not None
        buffer, dtype = op.operands[0], element_type(op.result.type)
        require(buffer in self.kernel.body.args and self.divisible[buffer.index] and dtype.name in ("bf16", "f16") and not op["mask_low"],  # type: ignore[attr-defined]
                "an operand is of other types, or may start anywhere")
        t = buffer.type
        assert isinstance(t, BufferType)
        along, other = (f"t{1 - i}", f"t{i}")  # axes of K and of the rows
        by_row, by_k = split_linear(op["offset"], other), split_linear(op["offset"], along)
        require(by_row is not None and by_k is not None and isinstance(by_row[0], int) and isinstance(by_k[0], int), "an operand is not a matrix")
        assert by_row is not None and by_k is not None
        if i == 0 and by_row[0] == 1:
            return self._by_columns(op, loop, as_int(by_k[0]))
        require(by_k[0] == 1, "an operand is not contiguous along K")
        stride, rows = as_int(by_row[0]), op["shape"][i]
        require(stride > 0 and stride * dtype.bytes % ALIGNMENT == 0, "rows do not start at multiples of 16 bytes")
        first = split_linear(by_row[1], along)
        assert first is not None
        row, column = divided(first[1], stride)
        k = _number(op, loop)
        along_k = split_linear(column, k)
        require(along_k is not None and along_k[0] == 1 and isinstance(along_k[1], int), "K does not begin at a constant")
        assert along_k is not None
        require(k not in free_symbols(row), "rows move along K")
        begin = as_int(along_k[1])
        extent = 1 + sum(((n - 1) * s for n, s in zip(t.shape, t.layout, strict=True)), 0)  # type: ignore[misc, operator]
        count = -(-as_int(extent) // stride)
        limits = [b for a, b in op["mask"] if split_linear(a, other) == (1, row)]
        require(len(limits) == len(op["mask"]) and all(b == count for b in limits) and (not limits or op["other"] == 0), "an operand is masked")
        name = f"{('left', 'right')[i]}_map"
        made = TensorMap(name, buffer.index, dtype.name, count, begin + as_int(loop["upper"]), stride, (rows, STEP), SHARED_LAYOUT)  # type: ignore[attr-defined]
        require(made.columns <= stride, "a row crosses its end")
        return _Operand(op, made, row, begin)

    def _by_columns(self, op: Operation, loop: Operation, stride: int) -> _Operand:
        """The weight, contiguous along its columns, which are the tile's rows."""
        buffer, dtype = op.operands[0], element_type(op.result.type)
        require(not op["mask"] and stride * dtype.bytes % ALIGNMENT == 0, "a weight is masked, or its rows do not start at multiples of 16 bytes")
        k = _number(op, loop)
        rest = split_linear(op["offset"], k)
        require(rest is not None and rest[0] == stride, "a weight is not read along K")
        assert rest is not None
        begin = substitute(rest[1], {"t0": 0, "t1": 0})
        require(known_less(begin + NARROW - 1, stride, {f"i{j}": self._span(v) for j, v in enumerate(op.operands[1:])}), "a tile crosses a row's end")
        made = TensorMap("left_map", buffer.index, dtype.name, as_int(loop["upper"]), stride, stride, (STEP, NARROW), BY_COLUMNS)  # type: ignore[attr-defined]
        return _Operand(op, made, begin, turned=True)

    def _span(self, v: Value) -> tuple[Dim | None, Dim | None]:
        made = v.defining_op
        return (0, self.kernel["grid"][made["axis"]] - 1) if made is not None and made.name == "tile.program_id" else (0, None)

    def _function(self) -> list[str]:
        lines, self.lines = self.lines, []
        return lines

    def _loader(self, before: Sequence[Operation], left: _Operand, right: _Operand, steps: int, parts: int, stages: int) -> list[str]:
        self._begin()
        for op in before:
            self._one(op)
        self._write(f"gl.inline_asm_elementwise({GRID_CONTROL.format('wait')})")
        self._write(f"for step in range(0, {steps}):")
        self.indent += 1
        self._write(f"stage = step % {stages}")
        self._write(f"mbarrier.wait(free.index(stage), ((step // {stages}) & 1) ^ 1)")
        self._write(f"mbarrier.expect(full.index(stage), {(NARROW + FEW) * STEP * 2 * parts})")
        for x, side, rows in ((left, "left", f".slice(0, {NARROW}, {int(left.turned)})"), (right, "right", "")):
            place = [in_gluon(self._text(x.load.operands[1:], ())(x.row)), f"step*{STEP * parts} + {STEP}*part" + f" + {x.begin}" * (x.begin > 0)]
            self._write(f"for part in gl.static_range({parts}):")
            where = ", ".join(place[::-1] if x.turned else place)
            self._write(f"    tma_load({side}_map, [{where}], full.index(stage), {side}_tile.index(stage*{parts} + part){rows})")
        self.indent -= 1
        return self._function()

    def _group(self, before: Sequence[Operation], after: Sequence[Operation], turned: bool, steps: int, parts: int, stages: int) -> list[str]:
        self._begin()
        for op in before:
            self._one(op)
        self._write(f"gl.inline_asm_elementwise({GRID_CONTROL.format('wait')})")
        self._write(f"gl.inline_asm_elementwise({GRID_CONTROL.format('launch_dependents')})")
        self._write(f"acc = gl.zeros([{WHOLE}, {FEW}], gl.float32, layout=multiplied)")
        self._write(f"for step in range(0, {steps}):")
        self.indent += 1
        self._write(f"stage = step % {stages}")
        self._write(f"mbarrier.wait(full.index(stage), (step // {stages}) & 1)")
        self._write(f"for part in gl.static_range({parts}):")
        tiles = f"left_tile.index(stage*{parts} + part){'.permute((1, 0))' * turned}, right_tile.index(stage*{parts} + part).permute((1, 0))"
        self._write(f"    acc = warpgroup_mma({tiles}, acc, is_async=True)")
        self._write(f"acc = warpgroup_mma_wait({parts}, deps=(acc,))")
        self._write("if step > 0:")
        self._write(f"    mbarrier.arrive(free.index((step + {stages - 1}) % {stages}), count=1)")
        self.indent -= 1
        self._write("acc = warpgroup_mma_wait(0, deps=(acc,))")
        self._write("sums.store(acc)")
        self._write(f"acc = sums.slice(0, {NARROW}).load(layout)")
        for op in after:
            self._one(op)
        return self._function()

    def _constants(self) -> list[str]:
        """The layouts of tiles, and position vectors in them: a thread has four rows, which are neighbours in memory."""
        lines = [f"    multiplied: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, {FEW}, 16])",
                 "    layout: gl.constexpr = gl.BlockedLayout([4, 1], [8, 4], [1, 4], [0, 1])",
                 "    stored: gl.constexpr = layout"]
        for (axis, size, _, layout), name in self.positions.items():
            lines.append(f"    {name} = gl.arange(0, {size}, layout=gl.SliceLayout({1 - axis}, {layout})){'[:, None]' if axis == 0 else '[None, :]'}")
        return lines

    def _entry(self, name: str, given: str, left: _Operand, parts: int, stages: int) -> str:
        dtype = f"gl.{'bfloat16' if left.map.dtype == 'bf16' else 'float16'}"
        return "\n".join([
            f"@gluon.jit\ndef {name}({given}left_map, right_map):",
            f"    left_tile = gl.allocate_shared_memory({dtype}, [{stages * parts}, {WHOLE}, {STEP}], left_map.layout)",
            f"    right_tile = gl.allocate_shared_memory({dtype}, [{stages * parts}, {FEW}, {STEP}], right_map.layout)",
            f"    full = gl.allocate_shared_memory(gl.int64, [{stages}, 1], mbarrier.MBarrierLayout())",
            f"    free = gl.allocate_shared_memory(gl.int64, [{stages}, 1], mbarrier.MBarrierLayout())",
            f"    sums = gl.allocate_shared_memory(gl.float32, [{WHOLE}, {FEW}], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))",
            f"    for stage in gl.static_range({stages}):",
            "        mbarrier.init(full.index(stage), count=1)",
            "        mbarrier.init(free.index(stage), count=1)",
            "    fence_async_shared()",
            "    gl.warp_specialize([",
            f"        ({name}_group, ({given}{_RING}, sums)),",
            f"        ({name}_loader, (left_map, right_map, {_RING})),",
            "    ], [1], [24])"])

