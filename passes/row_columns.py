"""Sums of columns in the kernel that makes or walks what they sum (GPUs).

The gradient of a norm takes a row's statistics and writes its gradient, and sums three things down the columns: for the scale, for the shift, and,
of what it has just written, for the bias of the layer before. The gradient of an activation is summed for a bias too. As kernels of their own
these sums read everything a second time (LayerNorm of 8192 x 1024: 14 + 16 + 6 us). Here a program takes some whole rows (or some columns of
them, where nothing is summed along rows), a few at a time, and adds up the columns of what it has in registers:

    for each few of the program's rows:  statistics and results of these rows;  sums[columns] += of them
    parts[program, columns] = sums

`part-columns`, before long reductions are split, makes such sums the sums of parts of neighbouring rows, and notes on them how many (BESIDE).
`join-columns`, after `fuse`, puts them into the group of the rows, whose `part` then says how many rows a program has
(`tiling/row_columns.py`). A sum that found no group is a kernel of its own, as before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ir import Block, Builder, Dim, Operation, Region, TensorType, Value, element_type, sym
from ..ir.dialects.tensor import fill_of, parallel_dims
from ..ir.expr import as_int, product, substitute
from ..ir.passes import Pass, PassContext, register
from ..ir.ranges import simplify
from .split_reductions import Cut, reduces_rows, split
from .structured import BESIDE, is_contraction, is_pointwise, space_bounds
from .tiling.frame import Frame, analyse
from .tiling.gpu_tiles import COLUMNS
from .topology import topological_sort

__all__ = ["JoinColumns", "PartColumns"]

PARTS = (32, 16)
"""Whole rows of a program: 8192 rows in parts of 32 are two programs for nearly each of 132 multiprocessors."""
LEAST, MOST = 256, 4096
"""Columns of rows that a program holds whole, beside the sums."""
PIECE = 128
"""Rows of a program that takes some columns of each."""


@register
@dataclass(frozen=True)
class PartColumns(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "part-columns"

    def run(self, module: Operation, ctx: PassContext) -> None:
        for func in [f for f in module.body if f.name == "func"]:
            for op in list(func.body):
                if op.name != "tensor.generic" or not op["reductions"]:
                    continue
                part = _part(op, ctx.target.multiprocessors)
                if part:
                    op.attributes[BESIDE] = part
                    rows = as_int(product(op["dims"][1:]))
                    split(op, Cut(1, rows // part, op["dims"][-1] // part if op["reductions"] > 1 else 1)).attributes[BESIDE] = 0  # not again
                    ctx.remark("done", f"columns are summed in parts of {part} rows, beside what makes or walks these rows", op.location)


def _part(op: Operation, programs: int) -> int:
    """Into how many rows each the rows are parted that a sum of columns adds up, if some other op walks or makes them; else 0."""
    n, dims = op["reductions"], op["dims"]
    if set(op["combine"]) != {"sum"} or n > 2 or len(dims) != n + 1 or not all(isinstance(d, int) for d in dims):
        return 0
    columns, rows = dims[0], as_int(product(dims[1:]))
    if columns < LEAST or reduces_rows(op) or any(element_type(v.type).bytes > 4 for v in (*op.operands, *op.results)):
        return 0  # what has eight bytes leaves no registers for sums
    walked = columns <= MOST and any(_walks_rows(v, rows, columns) for v in op.operands)
    whole = next((p for p in PARTS if rows // p >= programs and dims[-1] % p == 0), 0) if walked else 0
    made = rows // PIECE * columns // COLUMNS >= 2 * programs and dims[-1] % PIECE == 0 and any(_is_made(v, op, rows * columns) for v in op.operands)
    return whole or (PIECE if made else 0)


def _is_made(v: Value, op: Operation, numel: int) -> bool:
    """An elementwise kernel makes `v`, for others too."""
    maker = v.defining_op
    return maker is not None and is_pointwise(maker) and v.type.numel == numel and any(u is not op for u in v.users)  # type: ignore[attr-defined]


def _walks_rows(v: Value, rows: int, columns: int, depth: int = 1) -> bool:
    """Some op reduces the rows of `v`, or of what `v` is made from element by element, or gives the statistics for that."""
    if not isinstance(v.type, TensorType):
        return False
    maker = v.defining_op
    if v.type.numel != rows * columns:
        return depth == 0 and maker is not None and _reduces(maker, rows, columns)
    made = depth > 0 and maker is not None and is_pointwise(maker)
    return any(_reduces(u, rows, columns) for u in v.users) or made and any(_walks_rows(x, rows, columns, 0) for x in maker.operands)  # type: ignore[union-attr]


def _reduces(op: Operation, rows: int, columns: int) -> bool:
    if op.name != "tensor.generic" or not op["reductions"] or is_contraction(op) or not reduces_rows(op):
        return False
    parallel = parallel_dims(op)
    return product(parallel) == rows and product(op["dims"][len(parallel):]) == columns


@register
@dataclass(frozen=True)
class JoinColumns(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "join-columns"

    def run(self, module: Operation, ctx: PassContext) -> None:
        joined = 0
        for func in [f for f in module.body if f.name == "func"]:
            for op in list(func.body):
                if op.parent is None or op.name != "tensor.fused" or not all(m.attributes.get(BESIDE) for m in op.body.ops[:-1]):
                    continue
                rows = next((r for r in _candidates(op) if _fits(r, op) and not _apart(r, op)), None)
                if rows is not None:
                    _join(rows, op)
                    topological_sort(func.body)
                    joined += 1
        ctx.remark("done", f"{joined} sums of columns in the kernels of their rows")


def _candidates(sums: Operation) -> list[Operation]:
    """Kernels that make or read the large operands of `sums`; those that make one first."""
    largest = max((v.type.numel for v in sums.operands), default=0)  # type: ignore[attr-defined]
    large = [v for v in sums.operands if v.type.numel == largest]  # type: ignore[attr-defined]
    found = [v.defining_op for v in large] + [u for v in large for u in v.users]
    return [op for op in dict.fromkeys(found) if op is not None and op is not sums and op.name == "tensor.fused" and op.parent is sums.parent]


def _fits(rows: Operation, sums: Operation) -> bool:
    """`rows` reduces whole rows of the space that `sums` adds up, or makes it element by element; and what `sums` reads of its results it reads
    where that was made."""
    members = [m for m in rows.body.ops[:-1] if not m.attributes.get(BESIDE)]
    if not all(m.name == "tensor.generic" and not is_contraction(m) for m in members) or rows["why"].startswith("streams"):
        return False
    first = sums.body.ops[0]
    part, parts, columns = first.attributes[BESIDE], *map(as_int, parallel_dims(first))
    if any(m.attributes[BESIDE] != part for m in sums.body.ops[:-1]) or rows["part"] not in (0, part):
        return False
    if any(m["reductions"] for m in members):
        frame = analyse_rows(rows)
        sizes = [frame.sizes[f] for f in (*frame.outer, *frame.inner)]
        if len(frame.inner) != 1 or sizes != [parts * part, columns] or columns > MOST or part not in PARTS:
            return False
    elif part != PIECE or any(product(m["dims"]) != parts * part * columns for m in members) or not _in_order(analyse_rows(rows)):
        return False
    for v in sums.operands:
        if v.defining_op is rows:
            inner = rows.body.terminator.operands[v.index]  # type: ignore[attr-defined]
            same = inner.type.shape == v.type.shape  # type: ignore[attr-defined]
            if not same or v.type.strides is not None or not all(_in_place(m, i) for m, i in sums.body.args[sums.operands.index(v)].uses):  # type: ignore[attr-defined]
                return False
    return True


def analyse_rows(fused: Operation) -> Frame:
    """The frame of the members of a group that walk rows."""
    return analyse(fused, {}, [m for m in fused.body if m.name == "tensor.generic" and not m.attributes.get(BESIDE)])


def _in_order(frame: Frame) -> bool:
    """Everything is stored in the order in which the frame is walked."""
    flat: Dim = 0
    for f, size in frame.sizes.items():
        flat = flat * size + sym(f)
    return all(isinstance(n, int) for n in frame.sizes.values()) and all(
        x.offset == simplify(flat, frame.bounds({})) for x in frame.accesses if x.is_store)


def _in_place(op: Operation, i: int) -> bool:
    """The sum reads operand `i` at (its part's row, its column), or a number of each row at that row."""
    if op.name != "tensor.generic" or op["maps"][i] is None or fill_of(op, i) is not None:
        return False
    part, columns, last = op.attributes[BESIDE], op["dims"][1], len(op["dims"]) - 1
    bounds = space_bounds(op["dims"])
    offset: Dim = 0
    for e, stride in zip(op["maps"][i], op.operands[i].type.layout, strict=True):  # type: ignore[attr-defined]
        offset = offset + e * stride
    row = sym("d0") * part + sym(f"d{last}")
    single = {f"d{d}": 0 for d in range(2, last)}
    here = row if op.operands[i].type.numel * columns == op["dims"][0] * part * columns else row * columns + sym("d1")  # type: ignore[attr-defined]
    return simplify(substitute(offset, single), bounds) == simplify(here, bounds)


def _apart(rows: Operation, sums: Operation) -> bool:
    """As one kernel they would need what is made from their own results."""
    return _needs(sums, rows, direct=False) or _needs(rows, sums, direct=True)


def _needs(op: Operation, other: Operation, *, direct: bool) -> bool:
    """`op` needs a result of `other`, by way of a third op (or also directly)."""
    block = op.parent
    assert isinstance(block, Block)
    stack = [v.defining_op for v in op.operands if v.defining_op is not None and (direct or v.defining_op is not other)]
    seen: set[Operation] = set()
    while stack:
        p = stack.pop()
        if p is other:
            return True
        if p not in seen and p.parent is block:
            seen.add(p)
            stack += [v.defining_op for v in p.operands if v.defining_op is not None]
    return False


def _join(rows: Operation, sums: Operation) -> None:
    """One group of both, in the place of `rows`."""
    part = sums.body.ops[0].attributes[BESIDE]
    inner: dict[Value, Value] = dict(zip(rows.results, rows.body.terminator.operands, strict=True))
    inputs = list(dict.fromkeys([*rows.operands, *(v for v in sums.operands if v not in inner)]))
    block = Block([v.type for v in inputs], [v.name for v in inputs])
    known: dict[Value, Value] = {**dict(zip(inputs, block.args, strict=True)), **inner}
    yields: list[Value] = []
    for op in (rows, sums):
        for v, arg in zip(op.operands, op.body.args, strict=True):
            arg.replace_all_uses_with(known[v])
        yields += op.body.terminator.operands
        for member in op.body.ops[:-1]:
            block.append(member.detach())
    Builder(block, None, sums.location).create("tensor.yield", yields)
    attrs = {**rows.attributes, "kernel": f"{rows['kernel'].removesuffix('_columns')}_columns", "part": part}
    results = [*rows.results, *sums.results]
    made = Builder.before_op(rows).create("tensor.fused", inputs, attrs, [v.type for v in results], [Region([block])])
    for old, new in zip(results, made.results, strict=True):
        new.name = old.name
        old.replace_all_uses_with(new)
    for op in (sums, rows):
        op.erase()
