"""Passes over collectives: fewer, larger, and beside the computation.

    dist-simplify           equal collectives are merged; what is gathered and cut again is not gathered; an all-reduce of which
                            only pieces are read is a reduce-scatter
    dist-bucket{bytes=N small=M}  reductions and gathers whose results are only returned (gradients, updated parameters) go right behind
                            what computes their operand; those of up to M bytes are joined into messages of up to N bytes (joining copies:
                            large ones are messages of their own)
    dist-overlap{ahead=N}   collectives start as soon as their operand exists and are waited for where their result is read;
                            gathers start so early that at most N bytes are gathered and not yet read, for they must be kept
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ...ir.attributes import attribute_equal
from ...ir.builder import Builder
from ...ir.core import Operation, Value
from ...ir.opdef import Trait
from ...ir.passes import Pass, PassContext, register
from ...ir.sharding import Placement
from ...ir.types import TensorType
from .build import LocalBuilder, sizes_of, tensor_type

__all__ = ["BucketCollectives", "OverlapCollectives", "SimplifyCollectives", "from_rank_major", "to_rank_major"]


def _functions(module: Operation) -> list[Operation]:
    return [op for op in module.body if op.name == "func"]


def _bytes(v: Value) -> int:
    t = tensor_type(v)
    return int(t.numel) * t.dtype.bytes  # type: ignore[arg-type, call-overload]


@register
@dataclass(frozen=True)
class SimplifyCollectives(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "dist-simplify"

    def run(self, module: Operation, ctx: PassContext) -> None:
        merged = sum(_merge_equal(func) for func in _functions(module))
        folded = sum(_fold_pairs(func) for func in _functions(module))
        ctx.remark("done", f"{merged} collectives merged, {folded} folded")


def _plain(op: Operation) -> dict:
    return {k: v for k, v in op.attributes.items() if k != "_sharding"}


def _merge_equal(func: Operation) -> int:
    count = 0
    seen: dict[Value, list[Operation]] = {}
    for op in func.body:
        if not op.name.startswith("dist.") or len(op.operands) != 1 or not op.results:
            continue
        twins = seen.setdefault(op.operands[0], [])
        twin = next((t for t in twins if t.name == op.name and attribute_equal(_plain(t), _plain(op))), None)
        if twin is None:
            twins.append(op)
            continue
        op.result.replace_all_uses_with(twin.result)
        op.erase()
        count += 1
    return count


def _fold_pairs(func: Operation) -> int:
    count = 0
    for op in func.body:
        if op.name != "dist.shard" or op["shift"]:
            continue
        source = op.operands[0].defining_op
        if source is None or source.attributes.get("axis") != op["axis"] or source.attributes.get("stage"):
            continue
        if source.name == "dist.all_gather" and (source["dim"], source["parts"]) == (op["dim"], op["parts"]):
            op.result.replace_all_uses_with(source.operands[0])
            op.erase()
        elif source.name == "dist.all_reduce" and len(source.result.uses) == 1:
            b = LocalBuilder(Builder.before_op(op), op["axis"], op["ranks"])
            made = b.reduce_scatter(source.operands[0], Placement("shard", op["dim"], op["parts"]), source["kind"])
            if "_sharding" in op.attributes:
                made.defining_op.attributes["_sharding"] = op.attributes["_sharding"]  # type: ignore[union-attr]
            op.result.replace_all_uses_with(made)
            op.erase()
        else:
            continue
        if not source.result.uses:
            source.erase()
        count += 1
    return count


# -- rank-major forms ----------------------------------------------------------------------------------------------------


def to_rank_major(b: LocalBuilder, x: Value, dim: int, parts: int) -> Value:
    """[.., parts * ranks * c, ..] -> [ranks, elements of one rank's piece]."""
    shape = list(sizes_of(x))
    c = shape[dim] // (parts * b.ranks)
    cut = b.reshape(x, [*shape[:dim], parts, b.ranks, c, *shape[dim + 1:]])
    perm = [dim + 1, *(i for i in range(len(shape) + 2) if i != dim + 1)]
    return b.reshape(b.permute(cut, perm), (b.ranks, _count(shape) // b.ranks))


def from_rank_major(b: LocalBuilder, x: Value, piece: Sequence[int], dim: int, parts: int) -> Value:
    """[ranks, elements of a piece of shape `piece`] -> [.., parts * ranks * c, ..]: the inverse of `to_rank_major`."""
    c = piece[dim] // parts
    cut = b.reshape(x, [b.ranks, *piece[:dim], parts, c, *piece[dim + 1:]])
    perm = [*range(1, dim + 2), 0, *range(dim + 2, len(piece) + 2)]
    whole = [*piece[:dim], piece[dim] * b.ranks, *piece[dim + 1:]]
    return b.reshape(b.permute(cut, perm), whole)


def _count(shape: Sequence[int]) -> int:
    total = 1
    for s in shape:
        total *= s
    return total


# -- buckets -------------------------------------------------------------------------------------------------------------


@register
@dataclass(frozen=True)
class BucketCollectives(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "dist-bucket"
    bytes: int = 1 << 25
    small: int = 1 << 20

    def run(self, module: Operation, ctx: PassContext) -> None:
        for func in _functions(module):
            groups: dict[tuple, list[list[Operation]]] = {}
            last = [op for op in func.body if op.name in _JOIN and not op["stage"] and all(u.has_trait(Trait.Terminator) for u in op.result.users)]
            for op in last:
                source = op.operands[0].defining_op
                if source is not None:
                    func.body.insert_after(source, op.detach())
            for op in [op for op in func.body if op in set(last)]:
                if _bytes(op.operands[0]) > self.small:
                    continue
                key = (op.name, op["axis"], op.attributes.get("kind", "sum"), tensor_type(op.result).dtype)
                buckets = groups.setdefault(key, [[]])
                if buckets[-1] and sum(_bytes(o.operands[0]) for o in (*buckets[-1], op)) > self.bytes:
                    buckets.append([])
                buckets[-1].append(op)
            for buckets in groups.values():
                for bucket in buckets:
                    if len(bucket) > 1:
                        _JOIN[bucket[0].name](bucket)
                        ctx.remark("done", f"{len(bucket)} of {bucket[0].name} over '{bucket[0]['axis']}' joined", bucket[0].location)


def _builder(bucket: list[Operation]) -> LocalBuilder:
    """Builds before the last op of the bucket: all operands exist there, and all results are returned."""
    return LocalBuilder(Builder.before_op(bucket[-1]), bucket[0]["axis"], bucket[0]["ranks"])


def _cat(b: LocalBuilder, xs: list[Value], dim: int) -> Value:
    shape = list(tensor_type(xs[0]).shape)
    shape[dim] = sum(tensor_type(x).shape[dim] for x in xs)  # type: ignore[misc, arg-type]
    return b.b.op("graph.cat", *xs, type=TensorType(tuple(shape), tensor_type(xs[0]).dtype), dim=dim)


def _replace(b: LocalBuilder, bucket: list[Operation], made: list[Value]) -> None:
    for op, value in zip(bucket, made, strict=True):
        new = value.defining_op
        if "_sharding" in op.attributes and new is not None:
            new.attributes["_sharding"] = op.attributes["_sharding"]
        op.result.replace_all_uses_with(value)
        op.erase()


def _join_all_reduce(bucket: list[Operation]) -> None:
    b = _builder(bucket)
    flat = [b.reshape(op.operands[0], (_count(sizes_of(op.operands[0])),)) for op in bucket]
    total = b.all_reduce(_cat(b, flat, 0), bucket[0]["kind"])
    made, at = [], 0
    for op, x in zip(bucket, flat, strict=True):
        size = sizes_of(x)[0]
        made.append(b.reshape(b.slice(total, 0, at, size), sizes_of(op.result)))
        at += size
    _replace(b, bucket, made)


def _join_reduce_scatter(bucket: list[Operation]) -> None:
    b = _builder(bucket)
    rows = [to_rank_major(b, op.operands[0], op["dim"], op["parts"]) for op in bucket]
    total = b.reduce_scatter(_cat(b, rows, 1), Placement("shard", 0), bucket[0]["kind"])
    made, at = [], 0
    for op, x in zip(bucket, rows, strict=True):
        size = sizes_of(x)[1]
        made.append(b.reshape(b.slice(total, 1, at, size), sizes_of(op.result)))
        at += size
    _replace(b, bucket, made)


def _join_all_gather(bucket: list[Operation]) -> None:
    b = _builder(bucket)
    rows = [b.reshape(op.operands[0], (1, _count(sizes_of(op.operands[0])))) for op in bucket]
    total = b.all_gather(_cat(b, rows, 1), Placement("shard", 0))
    made, at = [], 0
    for op, x in zip(bucket, rows, strict=True):
        size = sizes_of(x)[1]
        piece = sizes_of(op.operands[0])
        made.append(from_rank_major(b, b.slice(total, 1, at, size), piece, op["dim"], op["parts"]))
        at += size
    _replace(b, bucket, made)


_JOIN = {"dist.all_reduce": _join_all_reduce, "dist.reduce_scatter": _join_reduce_scatter, "dist.all_gather": _join_all_gather}


# -- overlap -------------------------------------------------------------------------------------------------------------


@register
@dataclass(frozen=True)
class OverlapCollectives(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "dist-overlap"
    ahead: int = 1 << 26

    def run(self, module: Operation, ctx: PassContext) -> None:
        for func in _functions(module):
            started = [op for op in func.body if op.name in _STARTED and not op["stage"]]
            index = {op: i for i, op in enumerate(func.body.ops)}
            first_read = {op: min((index[u] for u in op.result.users), default=len(index)) for op in started}
            for op in started:
                _separate(op)
                for wait in op.result.users:  # it belongs to the reader: what may start only behind that does not start before the wait
                    index[wait] = first_read[op] - 1
            gathers: list[Operation] = []
            for op in started:
                floor = 0
                if op.name == "dist.all_gather":
                    gathers.append(op)
                    floor = self._floor(gathers, first_read)
                _hoist(op, floor, index)
            ctx.remark("done", f"{len(started)} collectives started early in '{func['sym_name']}'")

    def _floor(self, gathers: Sequence[Operation], first_read: dict[Operation, int]) -> int:
        """Where the last of `gathers` may start: where the last one is read that does not fit beside it."""
        total = _bytes(gathers[-1].result)
        for earlier in reversed(gathers[:-1]):
            if total > self.ahead:
                return first_read[earlier]
            total += _bytes(earlier.result)
        return first_read[gathers[0]] if total > self.ahead and len(gathers) > 1 else 0


_STARTED = ("dist.all_reduce", "dist.all_gather", "dist.reduce_scatter", "dist.all_to_all", "dist.shift")


def _separate(op: Operation) -> None:
    """op -> start, and a wait before the first use."""
    op.attributes["stage"] = "start"
    users = op.result.users
    wait = Operation.create("dist.wait", [op.result, op.operands[0]], {}, [op.result.type], (), op.location)
    if "_sharding" in op.attributes:
        wait.attributes["_sharding"] = op.attributes["_sharding"]
    wait.result.name = op.result.name
    op.result.replace_uses_if(wait.result, lambda user: user is not wait)
    first = op.next
    waiting = set(users)
    while first is not None and first not in waiting:
        first = first.next
    assert op.parent is not None
    if first is None:
        op.parent.insert_after(op, wait)
    else:
        op.parent.insert_before(first, wait)


def _hoist(op: Operation, floor: int, index: dict[Operation, int]) -> None:
    """Moves a start up to right behind its operand, not above the op that was at `floor`, and behind earlier starts. A gather of something
    that is there anyway (a parameter) passes reductions that start before it."""
    source = op.operands[0].defining_op
    target = op
    while True:
        before = target.prev
        if before is None or before is source or index.get(before, floor) < floor:
            break
        if before.name in _STARTED and not (op.name == "dist.all_gather" and source is None and before.name != "dist.all_gather"):
            break
        target = before
    if target is not op:
        op.move_before(target)
