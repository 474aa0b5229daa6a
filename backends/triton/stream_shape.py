"""What `warp_groups.py` must know of a kernel: where its loops, products and operands are. `read_stream` finds it, or raises Declined.

The kernel is one that `passes/tiling/stream.py` makes: loops that follow each other along a stream (`part` is set), each with the products

    s = q @ k[i]        ...        acc = p @ v[i] + acc * alpha
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from ...ir.core import Operation, Value
from ...ir.expr import Dim, Expr, Max, arguments, as_int, substitute, sym
from ...ir.ranges import known_less, lower_bound, split_linear
from ...ir.types import BufferType, TileType, element_type
from .descriptors import ALIGNMENT, TensorMap
from .printer import loaded_buffers, stored_buffers

__all__ = ["HALF", "ROWS", "Declined", "Loop", "Read", "StreamShape", "divided", "read_stream", "require"]

ROWS = 128
"""Rows of a program: two groups of 64."""
HALF = ROWS // 2
SHARED_LAYOUT = "NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)"
"""Of tiles whose rows are 64 or 128 elements of 16 bits."""
_MOVABLE = ("tile.load", "tile.index", "tile.mask", "tile.full")


class Declined(Exception):
    """The kernel is no stream that fits; the text says why."""


def require(condition: object, why: str) -> None:
    if not condition:
        raise Declined(why)


@dataclass(frozen=True)
class Read:
    """A tile that the copy engine brings: where it is in its tensor map, over the operands of the load. `turned`: it is read transposed."""

    op: Operation
    map: TensorMap
    row: Dim
    column: Dim
    turned: bool


@dataclass(frozen=True)
class Loop:
    """A loop and its parts: the two products, what they read, what changes the accumulator (`late`), what does not move with the loop and is
    small (`hoisted`), and the rest (`between`). Carried value number `carried` is the accumulator."""

    op: Operation
    first: Operation
    second: Operation
    k: Read
    v: Read
    late: tuple[Operation, ...]
    between: tuple[Operation, ...]
    hoisted: tuple[Operation, ...]
    carried: int


@dataclass(frozen=True)
class StreamShape:
    """`q` is the rows' operand; tiles of scores are ROWS x `steps`, of results ROWS x `columns`. `peeled` is a loop whose body is right for the
    first step, if every program has one; `first_runs`: it is always in the first loop."""

    loops: tuple[Loop, ...]
    q: Read
    steps: int
    width: int
    columns: int
    peeled: Loop | None
    first_runs: bool


def read_stream(kernel: Operation, divisible: Sequence[bool]) -> StreamShape:
    """`divisible`: of each buffer, whether its address is a multiple of 16 in every launch."""
    require(not kernel["symbols"], "sizes are not constant")
    require(not (stored_buffers(kernel.body) & loaded_buffers(kernel.body)), "a buffer is read and written")
    return _Reader(kernel, divisible).shape()


class _Reader:
    def __init__(self, kernel: Operation, divisible: Sequence[bool]):
        self.kernel, self.divisible, self.top = kernel, divisible, set(kernel.body)

    def shape(self) -> StreamShape:
        ops = [op for op in self.kernel.body if op.name == "tile.for"]
        require(ops and all(op["part"] for op in ops), "no loop over a stream")
        loops = tuple(self._loop(op) for op in ops)
        first = loops[0]
        made = first.first.operands[0].defining_op
        require(all(loop.first.operands[0].defining_op is made for loop in loops), "loops multiply different rows")
        require(made is not None and made.name == "tile.load" and made in self.top and all(u.name == "tile.dot" for u in made.result.users),
                "the rows' operand is not read once")
        assert made is not None
        q = self._read(made, "q_map", rows=HALF)
        require(not q.turned and made["shape"][0] == ROWS, "other than 128 rows")
        for a, b in pairwise(loops):
            require((a.k.map, a.v.map) == (b.k.map, b.v.map), "loops read different matrices")
            require(list(b.op.operands[b.op["indices"]:]) == list(a.op.results) and a.carried == b.carried, "loops that do not follow each other")
        steps, width, columns = _tile(first.first.result)[1], made["shape"][1], _tile(first.second.result)[1]
        require(width in (64, 128) and columns in (64, 128) and steps in (64, 128), "tiles of other sizes")
        anywhere = [loop for loop in loops if loop.op["part"] == "any"]
        runs = self._some_step(loops[:1])
        if runs and loops[0] not in anywhere:
            runs = False
        starts = runs or self._some_step(loops)
        peeled = (loops[0] if runs else anywhere[0]) if anywhere and starts else None
        return StreamShape(loops, q, steps, width, columns, peeled, runs)

    def _some_step(self, loops: Sequence[Loop]) -> bool:
        """Every program has a step to begin with."""
        names: dict[Value, Dim] = {}
        ends = []
        for op, bound in ((loops[0].op, "lower"), (loops[-1].op, "upper")):
            symbols = {f"i{k}": names.setdefault(v, sym(f"n{len(names)}")) for k, v in enumerate(op.operands[:op["indices"]])}
            ends.append(substitute(op[bound], symbols))
        bounds = {str(name): self._span(v) for v, name in names.items()}
        low, high = ends
        return any(all(known_less(x, y, bounds) for x in arguments(low, Max)) or known_less(low, y, bounds) for y in arguments(high, Max))

    def _loop(self, op: Operation) -> Loop:
        body = list(op.body)
        dots = [o for o in body if o.name == "tile.dot"]
        require(len(dots) == 2 and op["step"] in (64, 128), "other than two products a step")
        first, second = dots
        yields = list(op.body.terminator.operands)  # type: ignore[union-attr]
        require(second.result in yields and len(second.result.uses) == 1, "the second product is not what a loop carries")
        carried = yields.index(second.result)
        acc = op.body.args[1 + carried]
        late: list[Operation] = []
        for o in body:
            if o is not second and (acc in o.operands or any(v.defining_op in late for v in o.operands if v.defining_op is not None)):
                late.append(o)
        allowed = {*late, second}
        require(all(u in allowed for v in (acc, *(r for o in late for r in o.results)) for u in v.users), "the accumulator is read within a step")
        require(second.operands[0].defining_op in body, "weights that are not computed")
        start = first.operands[2].defining_op
        require(start is not None and start.name == "tile.full" and _is_zero(start.operands[0]), "the first product does not start at zero")
        k, v = (self._operand(d, name, body) for d, name in ((first, "k_map"), (second, "v_map")))
        require(k.turned and not v.turned, "operands lie the other way round")
        hoisted: list[Operation] = []
        for o in body:
            if o not in (first, second, k.op, v.op, start) and self._stays(o, hoisted):
                hoisted.append(o)
        gone = {first, second, k.op, v.op, start, *late, *hoisted, op.body.terminator}
        return Loop(op, first, second, k, v, tuple(late), tuple(o for o in body if o not in gone), tuple(hoisted), carried)

    def _stays(self, o: Operation, hoisted: list[Operation]) -> bool:
        """It may be computed before the loop, and its result is small."""
        if o.name not in _MOVABLE and not o.name.startswith("arith."):
            return False
        small = all(not isinstance(r.type, TileType) or 1 in r.type.shape for r in o.results)
        return small and all(v.defining_op in self.top or v.defining_op in hoisted or self._is_argument(v) for v in o.operands)

    def _is_argument(self, v: Value) -> bool:
        return v in self.kernel.body.args

    def _operand(self, dot: Operation, name: str, body: list[Operation]) -> Read:
        made = dot.operands[1].defining_op
        found = made is not None and made.name == "tile.load" and made in body and len(made.result.uses) == 1
        require(found, "an operand is not read where it is used")
        assert made is not None
        return self._read(made, name)

    def _read(self, op: Operation, name: str, rows: int = 0) -> Read:
        """The tile as a block of a matrix in memory."""
        buffer, dtype = op.operands[0], element_type(op.result.type)
        require(self._is_argument(buffer), "an operand is no argument")
        number, t = buffer.index, buffer.type  # type: ignore[attr-defined]
        assert isinstance(t, BufferType)
        require(self.divisible[number], "an operand may start anywhere")
        require(not op["mask"] and not op["mask_low"] and dtype.name in ("bf16", "f16"), "an operand is masked, or not of 16 bits")
        by_row, by_column = (split_linear(op["offset"], f"t{k}") for k in (0, 1))
        require(by_row is not None and by_column is not None, "an operand is not a matrix")
        assert by_row is not None and by_column is not None
        turned = by_row[0] == 1 and by_column[0] != 1
        stride, step = (by_column[0], by_row[0]) if turned else (by_row[0], by_column[0])
        require(step == 1 and isinstance(stride, int) and stride > 0, "an operand is not contiguous along its columns")
        assert isinstance(stride, int)
        shape = op["shape"][::-1] if turned else op["shape"]
        require(stride * dtype.bytes % ALIGNMENT == 0, "rows of an operand do not start at multiples of 16 bytes")
        row, column = divided(substitute(op["offset"], {"t0": 0, "t1": 0}), stride)
        bounds = {f"i{k}": self._span(v) for k, v in enumerate(op.operands[1:])}
        low = lower_bound(column, bounds)
        require(isinstance(low, int) and low >= 0 and known_less(column + shape[1] - 1, stride, bounds), "a tile crosses a row's end")
        extent = 1 + sum(((n - 1) * s for n, s in zip(t.shape, t.layout, strict=True)), 0)  # type: ignore[misc, operator]
        block = (rows or shape[0], shape[1])
        return Read(op, TensorMap(name, number, dtype.name, -(-as_int(extent) // stride), stride, stride, block, SHARED_LAYOUT), row, column, turned)

    def _span(self, v: Value) -> tuple[Dim | None, Dim | None]:
        """What is known of an index before anything is printed."""
        made = v.defining_op
        if made is not None and made.name == "tile.program_id":
            return 0, self.kernel["grid"][made["axis"]] - 1
        return 0, None


def _tile(v: Value) -> tuple[int, ...]:
    assert isinstance(v.type, TileType)
    return v.type.shape  # type: ignore[return-value]


def _is_zero(v: Value) -> bool:
    made = v.defining_op
    return made is not None and made.name == "arith.constant" and made["value"] == 0


def divided(e: Dim, by: int) -> tuple[Dim, Dim]:
    """(row, column) with row * by + column == e: terms that are multiples of `by` count as rows."""
    if isinstance(e, int):
        return divmod(e, by)
    rows = tuple((m, c // by) for m, c in e.terms if c % by == 0)
    columns = tuple((m, c) for m, c in e.terms if c % by)
    row, column = divmod(e.const, by)
    return Expr(rows, row) if rows else row, Expr(columns, column) if columns else column
