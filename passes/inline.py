"""Pointwise producers merge into the bodies of their readers.

A producer is merged when it has one reader that visits each of its elements once, or when recomputing it is cheaper than storing it (constants,
positions, masks, casts). Contractions take in casts only: their inner loop must stay a multiply-add. But where one reads each element of a gather
once, and the gather is larger than what it picks from (an expert's weights for every token), it becomes a reduction that picks: nothing is used
again that storing it would help, and the gathered copies may be more than there is memory for.
After: no pointwise generic has a single structured reader that could have computed it in place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..ir import Operation, TensorType, Value, element_type
from ..ir.dialects.tensor import fill_of, parallel_dims
from ..ir.expr import free_symbols, product
from ..ir.opdef import Trait
from ..ir.passes import Pass, PassContext, register
from .narrow_results import note_rounding, rounding
from .structured import EXPENSIVE, body_ops, identity_map, inline_into, inline_into_gather, is_contraction, is_pointwise
from .tiling.roles import roles_of
from .unpack import UNPACKS

LITTLE, SMALLER = 8, 64
"""Ops that are done again rather than stored where all operands are so many times smaller than the result."""
FEW = 4
"""Simple ops that hide behind the loads of a kernel on a GPU."""
TRIVIAL = frozenset({"arith.cast", "arith.constant", "tensor.index", "tensor.sym"})


@register
@dataclass(frozen=True)
class Inline(Pass):
    """See the module docstring. Bodies do not grow past `max_ops` ops and `max_operands` operands; what is cheap is computed up to `repeats`
    times rather than stored for one reader."""

    name: ClassVar[str] = "inline"
    max_ops: int = 160
    max_operands: int = 20
    repeats: int = 4

    def run(self, module: Operation, ctx: PassContext) -> None:
        merged = 0
        for func in module.body:
            if func.name != "func":
                continue
            for op in list(func.body.reversed()):
                if op.parent is None or not is_pointwise(op):
                    continue
                merged += self._merge_into_readers(op, ctx.target.is_gpu)
                if not any(r.uses for r in op.results):
                    op.erase()
        ctx.remark("done", f"{merged} producers merged into readers")

    def _merge_into_readers(self, producer: Operation, gpu: bool) -> int:
        readers = list(dict.fromkeys(u for r in producer.results for u in r.users))
        if not readers or _absorbs_its_maker(producer):
            return 0
        if all(self._can_gather(producer, u) for u in readers):
            note_rounding(producer)
            for reader in readers:
                inline_into_gather(reader, producer)
            return len(readers)
        pickers = [u for u in readers if self._can_gather(producer, u)]
        eligible = [u for u in readers if self._can_merge(producer, u, gpu) and not _continues_a_sum(producer, u)]
        if rounding(producer) is not None and len(eligible) < len(readers):
            return 0  # the 16-bit numbers are stored anyway: all read them
        merged = 0
        if pickers and _cheap(producer) and len(pickers) + len(eligible) == len(readers):  # where all elements are computed too, some are again
            for reader in pickers:
                inline_into_gather(reader, producer)
            merged, readers = len(pickers), eligible
        single = len(readers) == 1
        if len(eligible) == len(readers) and _trivial(producer):
            note_rounding(producer)
        for reader in eligible:
            if _trivial(producer) or (single and _visits_once(producer, reader)) or (
                    len(eligible) == len(readers) and _multiplies_gathered(producer, reader, gpu)) or (
                    len(eligible) == len(readers) and _cheap(producer) and _visits(producer, reader) <= (self.repeats if single else 1)) or (
                    gpu and len(eligible) == len(readers) and _reads_less(producer, readers)) or (
                    gpu and single and reader.name == "tensor.scatter" and _few_ops(producer)):
                inline_into(reader, producer)
                merged += 1
        return merged

    def _can_gather(self, producer: Operation, reader: Operation) -> bool:
        """The reader picks elements of the producer, fewer than there are: they are computed where they are picked."""
        if reader.name != "tensor.generic" or not producer.operands or len(reader.body) + len(producer.body) > self.max_ops:
            return False
        if any(m is None or fill_of(producer, i) is not None for i, m in enumerate(producer["maps"])):
            return False
        points, made = product(reader["dims"]), product(parallel_dims(producer))
        fewer = points == made or (isinstance(points, int) and isinstance(made, int) and points <= made)
        return fewer and all(m is None and all(u.name == "tensor.extract" and u.operands[0] is arg for u in arg.users)
                             for v, m, arg in zip(reader.operands, reader["maps"], reader.body.args, strict=True) if v.defining_op is producer)

    def _can_merge(self, producer: Operation, reader: Operation, gpu: bool) -> bool:
        if not reader.has_trait(Trait.Structured) or len(reader.body) + len(producer.body) > self.max_ops or (
                len(reader.operands) + len(producer.operands) > self.max_operands):
            return False
        if is_contraction(reader) and roles_of(reader) is not None and not _multiplies_gathered(producer, reader, gpu) and (
                len(producer.operands) != 1 or any(o.name != "arith.cast" for o in body_ops(producer))
                or fill_of(producer, 0) is not None or producer["maps"][0] != identity_map(len(producer["dims"]))):
            return False  # packed and padded operands are there on purpose
        if reader.attributes.get("_turned") or reader.attributes.get(UNPACKS):
            return False  # and turned windows, and narrow panels
        if reader.attributes.get("_widened"):
            return False  # so is one that was converted before the inner loop
        if is_contraction(reader) and rounding(producer) is not None and not _is_batched(reader):
            return False  # matrix units multiply 16-bit numbers much faster than those that they were rounded from
        lead = 1 if reader.name == "tensor.scatter" else 0
        if lead and reader.operands[0].defining_op is producer:
            return False
        return all(m is not None and fill_of(reader, i) is None
                   for i, (v, m) in enumerate(zip(reader.operands[lead:], reader["maps"], strict=True)) if v.defining_op is producer)


def _absorbs_its_maker(producer: Operation) -> bool:
    """It rounds what a pointwise op makes for it alone: that op, merged into this one, has a 16-bit result for all readers."""
    maker = producer.operands[0].defining_op if rounding(producer) is not None else None
    return maker is not None and is_pointwise(maker) and len(maker.results) == 1 and len(maker.result.uses) == 1


def _continues_a_sum(producer: Operation, reader: Operation) -> bool:
    """Both add a product's result to what was summed before: as the ends of their products they share one buffer; in one op, all products'
    results would have to be there at once."""
    return is_pointwise(reader) and all(len(op.operands) > 1 and any(
        v is not own and v.defining_op is not None and is_contraction(v.defining_op) and len(v.uses) == 1 for v in op.operands)
        for op, own in ((producer, None), (reader, producer.result if len(producer.results) == 1 else None)))


def _is_batched(contraction: Operation) -> bool:
    """Both operands are read at a parallel dimension of the result, as in attention."""
    reads = [{s for e in m for s in free_symbols(e)} for m in contraction["maps"]]
    return any(f"d{i}" in reads[0] & reads[1] for i in range(len(parallel_dims(contraction))))


def _trivial(producer: Operation) -> bool:
    """Nothing is saved by storing it: no tensor is read, or one is only converted or moved."""
    real = [o for o in body_ops(producer) if o.name not in TRIVIAL]
    if not producer.operands:
        return not any(o.name in EXPENSIVE for o in real)
    return not real and len(producer.operands) == 1 and producer["maps"][0] is not None


def _few_ops(producer: Operation) -> bool:
    """Arithmetic that hides behind a scatter's memory accesses on a GPU, where a kernel of its own would cost a launch."""
    real = [o for o in body_ops(producer) if o.name not in TRIVIAL]
    return len(real) <= 12 and not any(o.name in EXPENSIVE or o.name == "tensor.extract" for o in real)


def _cheap(producer: Operation) -> bool:
    """Recomputing costs no more than reading it back: at most two simple ops on at most one tensor of its own size, or a few more on nothing
    but small ones."""
    if _reads_little(producer):
        return True
    real = [o for o in body_ops(producer) if o.name not in TRIVIAL]
    if len(real) > 2 or any(o.name in EXPENSIVE or o.name == "tensor.extract" for o in real):
        return False
    full = [v for v in producer.operands if getattr(v.type, "numel", 0) == product(parallel_dims(producer))]
    return len(full) <= 1


def _reads_less(producer: Operation, readers: Sequence[Operation]) -> bool:
    """A few simple ops whose operands, read again by each kernel of readers, are fewer bytes than writing the result once and reading it as often.
    Each reader walks all of the result once; reductions of the same space will be one kernel."""
    real = [o for o in body_ops(producer) if o.name not in TRIVIAL]
    if len(real) > FEW or any(o.name in EXPENSIVE or o.name == "tensor.extract" for o in real) or len(producer.results) != 1:
        return False
    if any(u.name != "tensor.generic" or is_contraction(u) or not _visits_once(producer, u) for u in readers):
        return False
    made, read = _bytes(producer.result), [_bytes(v) for v in producer.operands]
    if made is None or any(b is None for b in read):
        return False
    kernels: dict[object, set[Value]] = {}
    for u in readers:
        kernels.setdefault((u["dims"], u["reductions"]) if u["reductions"] else u, set()).update(u.operands)
    again = sum(b for known in kernels.values() for v, b in zip(producer.operands, read, strict=True) if b is not None and v not in known)
    return again < sum(b for b in read if b is not None) + made * (1 + len(kernels))


def _bytes(v: Value) -> int | None:
    """Of a tensor; None where its size is symbolic."""
    t = v.type
    assert isinstance(t, TensorType)
    return t.numel * t.dtype.bytes if isinstance(t.numel, int) else None


def _reads_little(producer: Operation) -> bool:
    """A few simple ops on operands that are far smaller than the result: a comparison of positions, say."""
    real, made = [o for o in body_ops(producer) if o.name not in TRIVIAL], product(parallel_dims(producer))
    if len(real) > LITTLE or not producer.operands or any(o.name in EXPENSIVE or o.name == "tensor.extract" for o in real):
        return False
    return isinstance(made, int) and all(isinstance(v.type, TensorType) and isinstance(v.type.numel, int) and v.type.numel * SMALLER <= made
                                         for v in producer.operands)


def _multiplies_gathered(producer: Operation, reader: Operation, gpu: bool) -> bool:
    """A product that reads each element of a gather once, where that is larger than all that it is made from. On CPUs tables do not count: no more
    is read of one than is gathered, however large it is (a bag's weighted rows)."""
    if not is_contraction(reader) or not _visits_once(producer, reader) or not any(o.name == "tensor.extract" for o in body_ops(producer)):
        return False
    tables = [i for i, m in enumerate(producer["maps"]) if m is None]
    if len(producer.results) != 1 or (gpu and any(_bytes(producer.operands[i]) is None for i in tables)):
        return False
    share = sum(_share(producer, i) for i in range(len(producer.operands)) if not (i in tables and not gpu))
    return share < 1


def _share(producer: Operation, operand: int) -> float:
    """Bytes of an operand for each byte of the result: those of a table, whose size is known, or of what a map reads again and again."""
    v, m, made = producer.operands[operand], producer["maps"][operand], producer.result
    if m is None:
        return (_bytes(v) or 0) / size if (size := _bytes(made)) else math.inf
    moved = {s for e in m for s in free_symbols(e)}
    again = product(n for i, n in enumerate(parallel_dims(producer)) if f"d{i}" not in moved)
    return element_type(v.type).bytes / (element_type(made.type).bytes * again) if isinstance(again, int) and again else 1.0


def _visits(producer: Operation, reader: Operation) -> float:
    """How often the reader's points pass an element of the producer, on average; infinity where sizes are symbols that differ."""
    points, made = product(reader["dims"]), product(parallel_dims(producer))
    if points == made:
        return 1
    return points / made if isinstance(points, int) and isinstance(made, int) and made else float("inf")


def _visits_once(producer: Operation, reader: Operation) -> bool:
    """The reader's space has as many points as the producer's: nothing is computed twice."""
    return product(reader["dims"]) == product(parallel_dims(producer))
