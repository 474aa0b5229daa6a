"""Products of few rows on Hopper whose weights are read before the kernel in front has ended: a tile kernel printed in Gluon.

    source = print_early_weights(kernel, target, divisible)     # a KernelSource, or a str that says why not

A kernel that is launched programmatically begins while the one in front of it still runs, and waits for it. Activations are what it waits for;
weights it may read at once. So a program here has room in shared memory for all of K: the copy engine brings all tiles of the weight, then the
program waits, then come those of the other operand, and the matrix units take a step as soon as both of its tiles are there. After the wait
a multiprocessor reads the activations only, half of the bytes or less; the links from the L2 cache to it are what bounds such products.

The kernel is one that `passes/tiling/contraction_gpu.py` makes, with one product of two matrices that are contiguous along K and a `tile.prefetch` of
the weight: that says that no kernel in front makes it. It must be launched programmatically only behind a kernel of this program (see
`native.py`): those let the next one begin after their own wait, so that all that was before the one in front has ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...ir.core import Operation, Value
from ...ir.expr import Dim, as_int, free_symbols, product
from ...ir.ranges import split_linear
from ...ir.target import Target
from ...ir.types import TileType, element_type
from .descriptors import TensorMap
from .dtypes import pointer
from .gluon import GRID_CONTROL, HEADER, OneGroup
from .group_ops import in_gluon
from .helpers import used_helpers
from .printer import KernelSource, identifier, loaded_buffers, provenance, stored_buffers
from .stream_shape import SHARED_LAYOUT, Declined, require

__all__ = ["print_early_weights"]

STEP = 64
"""Elements of K in a tile: 128 bytes, as the matrix units' layout wants."""
SHARED = 225 << 10
"""Bytes of shared memory for both operands, and a float32 result that is turned; the rest is for barriers."""
REGISTERS = 248
_NAMES = ("gl", "gluon", "mbarrier", "tma_load", "layout", "stored", "left_map", "right_map", "left_tile", "right_tile", "ready", "acc", "step")


def print_early_weights(kernel: Operation, target: Target, divisible: Sequence[bool]) -> KernelSource | str:
    """`divisible`: of each buffer, whether its address is a multiple of 16 in every launch."""
    if target.capability != 90:
        return "not Hopper"
    try:
        return _Early(kernel, divisible).run()
    except Declined as why:
        return str(why)


@dataclass(frozen=True)
class _Operand:
    """A factor: its tensor map, the first of its rows and columns (over the operands of its load), and whether it is the weight."""

    name: str
    load: Operation
    map: TensorMap
    row: Dim
    column: Dim
    weight: bool


class _Early(OneGroup):
    """Prints the one function of the kernel."""

    def run(self) -> KernelSource:
        kernel = self.kernel
        require(not self.wide and not kernel["symbols"], "sizes are not constant, or too large for 32 bits")
        require(not (stored_buffers(kernel.body) & loaded_buffers(kernel.body)), "a buffer is read and written")
        inside = list(kernel.body)
        loops = [op for op in inside if op.name == "tile.for"]
        weights = {op.operands[0] for op in inside if op.name == "tile.prefetch"}
        require(len(loops) == 1 and len(weights) == 1, "no weight that is there before")
        loop, = loops
        dot = self._dot(loop)
        size = as_int(loop["upper"])
        left, right = (self._operand(loop, dot, i, weights, size) for i in (0, 1))
        require(left.weight != right.weight, "both operands are the weight, or none is")
        (rows, _), self.columns = dot.operands[0].type.shape, as_int(dot.operands[1].type.shape[1])  # type: ignore[attr-defined]
        require(rows in (64, 128) and self.columns in (16, 32, 64, 128), "tiles of other sizes")
        require((rows + self.columns) * size * 2 + rows * self.columns * 4 <= SHARED, "operands do not fit shared memory")
        self.taken |= set(_NAMES)
        name = identifier(kernel["sym_name"])
        self.taken.add(name)
        pointers = {self._name(a, "p"): pointer(element_type(a.type)) for a in kernel.body.args}
        self._begin()
        before, after = inside[:inside.index(loop)], inside[inside.index(loop) + 1:]
        zero = loop.operands[loop["indices"]].defining_op
        for op in before:
            if op is not zero and op.name != "tile.prefetch":
                require(op.name in ("tile.program_id", "tile.index") or op.name.startswith("arith."), "what is read before the product")
                self._one(op)
        self._products(left, right, size)
        self.names[loop.results[0]] = "acc"
        for op in after:
            if op.name != "tile.yield":
                self._one(op)
        warps = rows // 16
        function = "\n".join([f"@gluon.jit\ndef {name}({', '.join(pointers)}, left_map, right_map):",
                              *self._constants(rows, warps, any(map(_is_turned, after))), *self.lines])
        helpers = [in_gluon(h.replace("@triton.jit", "@gluon.jit")).rstrip() + "\n" for h in used_helpers(function)]
        header = "".join(f"# {line}\n" for line in provenance(kernel)) + HEADER
        if "libdevice." in function + "".join(helpers):
            header += "from triton.language.extra import libdevice\n"
        signature = pointers | {m.map.name: m.map.triton_type for m in (left, right)}
        text = "\n\n".join([header, *helpers, function + "\n"])
        return KernelSource(name, text, signature, len(kernel.body.args), (), 0, rows * self.columns, True, warps, 1, (left.map, right.map),
                            REGISTERS, as_int(product(kernel["grid"])), dependent=True, early=True)

    def _dot(self, loop: Operation) -> Operation:
        """The one product of the loop over all of K."""
        body = [op for op in loop.body if op.name != "tile.yield"]
        dots = [op for op in body if op.name == "tile.dot"]
        require(len(body) == 3 and len(dots) == 1 and loop["lower"] == 0 and isinstance(loop["upper"], int) and loop["upper"] % STEP == 0,
                "more than a product, or not of all of K")
        dot, = dots
        require(len(loop.results) == 1 and dot.operands[2] is loop.body.args[1] and loop.body.terminator.operands[0] is dot.result,  # type: ignore[union-attr]
                "the product is not what the loop carries")
        zero = loop.operands[loop["indices"]].defining_op
        empty = zero is not None and zero.name == "tile.full" and _is_zero(zero.operands[0]) and len(zero.result.uses) == 1
        require(empty, "the sum does not start at zero")
        require(element_type(dot.result.type).name == "f32", "a sum that is not float32")
        return dot

    def _operand(self, loop: Operation, dot: Operation, i: int, weights: set[Value], size: int) -> _Operand:
        op = dot.operands[i].defining_op
        require(op is not None and op.name == "tile.load" and op.parent is loop.body and op["matrix"], "an operand is not read as a matrix")
        assert op is not None
        buffer, dtype = op.operands[0], element_type(op.result.type)
        require(self.divisible[buffer.index] and dtype.name in ("bf16", "f16") and not op["mask"], "an operand is masked, or of other types")  # type: ignore[attr-defined]
        rows, columns, stride, flipped = op["matrix"]
        row, column = op["corner"]
        k = op.operands[1:].index(loop.body.args[0]) if loop.body.args[0] in op.operands[1:] else -1
        along = split_linear(column, f"i{k}")
        require(flipped == (i == 1) and columns >= size and along is not None and along[0] == 1 and f"i{k}" not in free_symbols(row),
                "an operand is not contiguous along K")
        assert along is not None
        tile = op["shape"][1] if flipped else op["shape"][0]
        name = ("left", "right")[i]
        return _Operand(name, op, TensorMap(f"{name}_map", buffer.index, dtype.name, rows, columns, stride, (tile, STEP), SHARED_LAYOUT),  # type: ignore[attr-defined]
                        row, along[1], buffer in weights)

    def _products(self, left: _Operand, right: _Operand, size: int) -> None:
        steps = size // STEP
        first, second = (left, right) if left.weight else (right, left)
        dtype = f"gl.{'bfloat16' if left.map.dtype == 'bf16' else 'float16'}"
        for x in (left, right):
            self._write(f"{x.name}_tile = gl.allocate_shared_memory({dtype}, [{steps}, {x.map.block[0]}, {STEP}], {x.name}_map.layout)")
        self._write(f"ready = gl.allocate_shared_memory(gl.int64, [{steps}, 1], mbarrier.MBarrierLayout())")
        self._each(steps, ["mbarrier.init(ready.index(step), count=1)"])
        self._write("fence_async_shared()")
        together = (left.map.block[0] + right.map.block[0]) * STEP * 2
        self._each(steps, [f"mbarrier.expect(ready.index(step), {together})", self._copy(first)])
        self._write(f"gl.inline_asm_elementwise({GRID_CONTROL.format('wait')})")
        self._write(f"gl.inline_asm_elementwise({GRID_CONTROL.format('launch_dependents')})")
        self._each(steps, [self._copy(second)])
        self._write(f"acc = gl.zeros([{left.map.block[0]}, {right.map.block[0]}], gl.float32, layout=layout)")
        self._each(steps, ["mbarrier.wait(ready.index(step), 0)",
                           "acc = warpgroup_mma(left_tile.index(step), right_tile.index(step).permute((1, 0)), acc, is_async=True)"])
        self._write("acc = warpgroup_mma_wait(0, deps=(acc,))")

    def _each(self, steps: int, lines: Sequence[str]) -> None:
        self._write(f"for step in gl.static_range({steps}):")
        for line in lines:
            self._write("    " + line)

    def _copy(self, x: _Operand) -> str:
        text = self._text(x.load.operands[1:], ())
        row, column = (in_gluon(text(at)) for at in (x.row, x.column))
        return f"tma_load({x.name}_map, [{row}, {column} + step*{STEP}], ready.index(step), {x.name}_tile.index(step))"

    def _constants(self, rows: int, warps: int, turned: bool) -> list[str]:
        """The layouts of tiles, and position vectors in them. In `stored`, a thread has 16 bytes that are neighbours in memory."""
        along = (rows if turned else self.columns) // 8
        shape = ([8, 1], [along, 32 // along], [1, warps], [0, 1]) if turned else ([1, 8], [32 // along, along], [warps, 1], [1, 0])
        lines = [f"    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [{warps}, 1], [16, {self.columns}, 16])",
                 f"    stored: gl.constexpr = gl.BlockedLayout({', '.join(map(str, shape))})"]
        for (axis, size, _, layout), name in self.positions.items():
            lines.append(f"    {name} = gl.arange(0, {size}, layout=gl.SliceLayout({1 - axis}, {layout})){'[:, None]' if axis == 0 else '[None, :]'}")
        return lines


def _is_turned(op: Operation) -> bool:
    """A store of which rows are neighbours in memory, and not columns."""
    value = op.operands[1] if op.name == "tile.store" else None
    if value is None or not isinstance(value.type, TileType):
        return False
    by_row, by_column = (split_linear(op["offset"], f"t{k}") for k in (0, 1))
    return by_row is not None and by_row[0] == 1 and (by_column is None or by_column[0] != 1)


def _is_zero(v: Value) -> bool:
    made = v.defining_op
    return made is not None and made.name == "arith.constant" and made["value"] == 0
