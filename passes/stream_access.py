"""How the contractions of a stream walk their operands."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..ir import Dim, Operation, Target, element_type, sym
from ..ir.dialects.tensor import parallel_dims
from ..ir.expr import as_int, ceildiv, free_symbols, product, substitute
from ..ir.ranges import simplify, split_linear

if TYPE_CHECKING:
    from .stream_form import Stream

FEW_ROWS = 16
"""With fewer rows there is nothing to reuse: on a CPU the plain kernels are as good, and on a GPU without reductions in between (two layers in a row
read weights, which want all multiprocessors)."""
SMALL = 1 << 16
"""Points of the middle space, per batch element, below which storing them costs a CPU little."""

__all__ = ["packed", "reduced_order", "stream_side", "why_slow", "why_small"]


def reduced_order(s: Stream, op: Operation, which: int) -> list[str]:
    """Frame names of the summed dimensions of a second contraction, in its own order."""
    made = op.operands[which].defining_op
    assert made is not None
    names = {str(d): str(x) for d, x in zip(op["maps"][which], s.position[made], strict=True)}  # these dimensions are read as they are
    return [names[f"d{d}"] for d in range(len(op["dims"]) - op["reductions"], len(op["dims"]))]


def packed(op: Operation, i: int) -> bool:
    """Operand i is stored as whole panels of its own columns, padded with zeros (`pack.py`)."""
    return bool(op.attributes.get("_packed")) and any("//" in str(e) for e in op["maps"][i]) and any("%" in str(e) for e in op["maps"][i])


def stream_side(s: Stream, op: Operation) -> int:
    """The operand number of a first contraction that moves along the stream."""
    at = {f"d{j}": x for j, x in enumerate(s.position[op])}
    moving = set().union(set(), *(free_symbols(substitute(x, at)) for x in op["maps"][0]))
    return 0 if moving & set(s.stream) else 1


def _stride(s: Stream, op: Operation, i: int, name: str) -> Dim:
    """The distance in operand i between steps of a frame dimension; 0 if it does not walk it evenly."""
    at = {f"d{j}": x for j, x in enumerate(s.position[op])}
    first = len(parallel_dims(op))
    if op in s.seconds:
        which = next(k for k, v in enumerate(op.operands) if v is s.streamed(op))
        at |= {f"d{first + k}": sym(f) for k, f in enumerate(reduced_order(s, op, which))}
    offset: Dim = 0
    for e, stride in zip(op["maps"][i], op.operands[i].type.layout, strict=True):  # type: ignore[attr-defined]
        offset = offset + substitute(e, at) * stride
    bounds = {f: (0, n - 1) for f, n in s.sizes.items()}
    linear = split_linear(simplify(offset, bounds), name)
    return 0 if linear is None else linear[0]


def _splits_panels(op: Operation, i: int, target: Target) -> bool:
    """Operand i lies in panels that the vectors of a stream's tile (`cpu_tiles.square_tile`) would cross."""
    panel = op.operands[i].type.shape[-1]  # type: ignore[attr-defined]
    columns = target.lanes(32) * (3 if target.vector_registers >= 32 and target.vector_bits < 512 else 2)
    return packed(op, i) and panel % columns != 0


def why_small(s: Stream, target: Target) -> str:
    """Why the sizes alone make a stream slow on a CPU; "" if they do not."""
    if isinstance(s.row_count, int) and s.row_count < FEW_ROWS:
        return "too few rows"
    points = s.row_count * s.length
    if isinstance(points, int) and points < SMALL:
        return "the middle space stays in the cache"
    masked = s.alive.pairs or s.alive.data  # a stream leaves out what they hide, often half
    if not s.reductions and not masked and isinstance(points, int) and points * 4 <= target.l3 // 2:
        return "the middle space stays in the outer cache, from which products of their own run at full speed"
    return ""


def _why_slow_on_cpu(s: Stream, target: Target) -> str:
    """Why the stream would be slow on a CPU; "" if it would not."""
    small = why_small(s, target)
    if small:
        return small
    if any(_splits_panels(op, i, target) for op in (*s.firsts, *s.seconds) for i in (0, 1)):
        return "an operand is packed in panels of another width"
    for op in s.firsts:
        i = stream_side(s, op)
        if not packed(op, i) and _stride(s, op, i, s.stream[-1]) != 1:
            return "an operand is not contiguous along the stream"
    for op in s.seconds:
        other = next(i for i, v in enumerate(op.operands) if v is not s.streamed(op))
        if not packed(op, other) and _stride(s, op, other, f"n{len(s.columns) - 1}") != 1:
            return "an operand is not contiguous along the columns"
    types = {element_type(v.type).name for op in (*s.firsts, *s.seconds) for v in (*op.operands, *op.results)}
    if not types <= {"f32", "bf16", "f16"} or any(element_type(op.result.type).name != "f32" for op in (*s.firsts, *s.seconds)):
        return "not summed in float32"
    if "bf16" in types and {"avx512bf16", "amx-bf16"} & set(target.features):
        return "products of bf16 have instructions of their own"
    return ""


def why_slow(s: Stream, target: Target) -> str:
    """Why kernels of their own would be quicker than the stream; "" if they would not."""
    return _why_slow_on_gpu(s, target) if target.is_gpu else _why_slow_on_cpu(s, target)


FLOPS_PER_US = {2: 2.5e6, 4: 2e5, 8: 1e5}
"""What one multiprocessor does in a microsecond, by bytes per element (of an H100, at half its peak)."""
BYTES_PER_US = 3e6
PROGRAM_BYTES_PER_US = 5e4
"""Of one program alone, from memory: two or three tiles are under way for about a microsecond."""
TOGETHER = 4
"""Programs of few rows that a multiprocessor runs at a time."""
LAUNCH_US = 4.0


def _why_slow_on_gpu(s: Stream, target: Target) -> str:
    """A stream has a program per block of rows; kernels of their own have one per tile of the middle space, but store it and read it."""
    space = [*(s.sizes[f] for f in s.batch), s.row_count, s.length]
    widths = [product(op["dims"][len(s.position[op]):]) for op in s.firsts] + [product(s.columns)] * len(s.seconds)
    if not all(isinstance(n, int) for n in (*space, *widths)):
        return ""
    if as_int(s.row_count) < FEW_ROWS and not s.reductions:
        return "too few rows"
    batch, points = as_int(product(space[:-2])), as_int(product(space))
    narrowest = min(element_type(v.type).bytes for op in s.firsts for v in op.operands)
    processors = max(1, target.multiprocessors)
    rate = FLOPS_PER_US[max(2, narrowest)]
    flops = 2.0 * points * sum(as_int(w) for w in widths)
    programs = batch * as_int(ceildiv(space[-2], 64))
    tiles = programs * as_int(ceildiv(space[-1], 64))
    rounds = -(-programs // processors)
    read = as_int(space[-1]) * sum(as_int(w) for w in widths) * narrowest  # what a program walks through
    from_memory = batch * read / BYTES_PER_US
    resident = -(-programs // (TOGETHER * processors))
    streamed = LAUNCH_US + max(rounds * flops / programs / rate, resident * read / PROGRAM_BYTES_PER_US, from_memory)
    kernels = len(s.firsts) + len(s.seconds) + bool(s.reductions)
    apart = kernels * LAUNCH_US + max(flops / rate / min(tiles, processors), from_memory) + 2 * (kernels - 1) * narrowest * points / BYTES_PER_US
    return "" if streamed <= apart else f"{programs} programs would take {streamed:.0f} us, kernels of their own {apart:.0f} us"
