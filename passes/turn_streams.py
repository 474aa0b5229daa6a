"""Streams for CPUs see their operands the right way round: the middle space [batch, rows, stream], results [batch, rows, columns].

A program of a stream keeps rows in registers' rows and walks the stream in vectors, so the operand of a first contraction that moves along the
stream, and that of a second which moves along the columns, must be the right ones, which `pack` puts in panels. The backward of attention walks
the middle space along the keys for one gradient and along the queries for the others: the second gets a transposed copy of the
contractions and pointwise ops that make the space (they are computed by each stream anyway).

Contractions of streams are marked, for `pack` to make all their panels as wide as the stream's tiles.

After: of each stream the parallel dimensions that its middle space shares with the stream come last, and the columns of its seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..ir import Builder, Operation, Target, Value, sym
from ..ir.dialects.tensor import fill_of, parallel_dims
from ..ir.expr import free_symbols, substitute
from ..ir.passes import Pass, PassContext, register
from .rescale import Declined
from .stream_access import why_small
from .stream_form import Stream
from .stream_growth import candidates, grown
from .stream_legality import escapes
from .structured import rebuild

__all__ = ["TurnStreams"]


@register
@dataclass(frozen=True)
class TurnStreams(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "turn-streams"

    def run(self, module: Operation, ctx: PassContext) -> None:
        if ctx.target.is_gpu:
            ctx.remark("note", "tensor cores take their operands either way round")
            return
        turned = 0
        for func in [f for f in module.body if f.name == "func"]:
            for s in _streams(func, ctx.target):
                for op in (*s.firsts, *s.seconds):
                    op.attributes["_streams"] = True
                turned += _turn(s)
        ctx.remark("done", f"{turned} ops of streams turned")


def _streams(func: Operation, target: Target) -> list[Stream]:
    found: list[Stream] = []
    covered: set[Operation] = set()
    for seed, which in reversed(candidates(func.body)):
        if seed not in covered:
            try:
                s = grown(seed, which)
            except Declined:
                continue
            if why_small(s, target):
                continue  # turned products would be read and written across the order in which others keep the same tensors
            found.append(s)
            covered.update(s.seconds)
    members = {op for s in found for op in s.members}
    return [s for s in found if not escapes(s, members)]  # else their middle space is stored, and they will not be streams


def _order(s: Stream, op: Operation, last: Sequence[str]) -> list[int] | None:
    """The parallel dimensions of `op` with those that move along `last` at the end; None if they are there."""
    at = s.position[op]
    order = sorted(range(len(at)), key=lambda d: bool(free_symbols(at[d]) & set(last)))
    wide = [d for d in order if parallel_dims(op)[d] != 1]
    return order if wide != sorted(wide) else None


def _turn(s: Stream) -> int:
    made: dict[Value, tuple[Value, list[int]]] = {}
    count = 0
    if any(_order(s, op, s.stream) is not None for op in s.firsts):
        inside = sorted([*s.firsts, *s.full], key={op: i for i, op in enumerate(s.seconds[0].parent)}.__getitem__)  # type: ignore[arg-type]
        for op in inside:
            order = _order(s, op, s.stream) or list(range(len(parallel_dims(op))))
            copy = _permuted(op, order, made)
            made |= {r: (c, order) for r, c in zip(op.results, copy.results, strict=True)}
            count += 1
        for op in (*s.reductions, *s.row, *s.tail, *s.seconds):
            _read(op, made)
    columns = [f"n{k}" for k in range(len(s.columns))]
    for op in s.seconds:
        back = _order(s, op, columns)
        if back is not None:
            _turn_result(op, back)
            count += 1
    return count


def _permuted(op: Operation, order: list[int], made: dict[Value, tuple[Value, list[int]]]) -> Operation:
    """A copy of `op` with its parallel dimensions in another order, reading what is `made`."""
    parallel = len(parallel_dims(op))
    place = {old: sym(f"d{new}") for new, old in enumerate(order)} | {d: sym(f"d{d}") for d in range(parallel, len(op["dims"]))}
    env = {f"d{d}": e for d, e in place.items()}
    operands, maps = [], []
    for v, m in zip(op.operands, op["maps"], strict=True):
        source, at = (v, m) if m is None or v not in made else (made[v][0], tuple(m[k] for k in made[v][1]))
        operands.append(source)
        maps.append(None if at is None else tuple(substitute(e, env) for e in at))
    dims = (*(op["dims"][d] for d in order), *op["dims"][parallel:])
    return rebuild(op, Builder.before_op(op), operands, maps, [fill_of(op, i) for i in range(len(op.operands))], dims, place)


def _read(op: Operation, made: dict[Value, tuple[Value, list[int]]]) -> None:
    """Lets `op` read the copies."""
    maps = list(op["maps"])
    for i, v in enumerate(op.operands):
        if v in made and maps[i] is not None:
            copy, order = made[v]
            maps[i] = tuple(maps[i][k] for k in order)
            op.set_operand(i, copy)
    op.attributes["maps"] = tuple(maps)


def _turn_result(op: Operation, order: list[int]) -> None:
    """Replaces `op` by one with its parallel dimensions in another order and a transposed view of that one's result."""
    copy = _permuted(op, order, {})
    back = tuple(sym(f"d{d}") for d in order)
    view = Builder.before_op(op).generic([copy.result], [back], parallel_dims(op), lambda b, x: x, name=op.result.name)
    op.result.replace_all_uses_with(view.result)
    op.erase()
