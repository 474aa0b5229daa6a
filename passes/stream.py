"""Streaming: chains contraction -> pointwise and row reductions -> contraction as one pass over the shared dimension.

The space in the middle, (batch, rows, stream), is never stored: a kernel walks `stream` in steps and keeps, for each row, the running
reductions and the running second contraction. A reduction may depend on an earlier one if the dependence can be rescaled (`rescale.py`).

Softmax times values with any elementwise change of the scores, any mask, and its backward (where log-sum-exp is an input) all have this form; no op
is recognised by name. Values of the middle space are computed anew by every stream that needs them.

After the pass `stream`, each such chain is a `tensor.fused` of its own; `analyse(ops)` finds the stream that the members of one form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..ir import Block, Builder, Operation, Region, Target, TensorType, Value
from ..ir.passes import Pass, PassContext, register
from .block_ranges import BLOCK, block_ranges, worth_ranges
from .rescale import Declined, TooLarge
from .stream_access import why_slow
from .stream_form import Stream
from .stream_growth import candidates, grown
from .stream_legality import circle, escapes, waits_for_itself
from .structured import is_contraction
from .topology import topological_sort
from .wide_weights import keep_wide, round_again

__all__ = ["Stream", "analyse"]


# -- finding them -------------------------------------------------------------------------------------------------------------


def analyse(ops: Sequence[Operation]) -> Stream | None:
    """The stream whose members are exactly `ops` (all in one block); None if they form none."""
    for seed, which in reversed(candidates(ops)):
        try:
            s = grown(seed, which)
        except Declined:
            continue
        if set(s.members) == set(ops):
            return s
    return None


def _grown(seed: Operation, which: int, target: Target) -> Stream:
    s = grown(seed, which)
    if waits_for_itself(s):
        raise Declined("an input depends on a result")
    slow = why_slow(s, target)
    if slow:
        raise Declined(slow)
    return s


def _find_streams(func: Operation, target: Target, decline: Callable[[Operation, str], None], relaxed: bool) -> list[Stream]:
    """Streams worth taking out of `func`; `decline(op, why)` hears about chains that come close. `relaxed`: weights may stay in float32
    (`wide_weights.py`)."""
    found: list[Stream] = []
    covered: set[Operation] = set()
    widened: dict[Operation, tuple[Value, Operation]] = {}
    for seed, which in reversed(candidates(func.body)):
        if seed in covered:
            continue
        try:
            try:
                s = _grown(seed, which, target)
            except TooLarge as why:
                if not relaxed or not keep_wide(seed.operands[which], why.rounding):
                    raise
                widened[seed] = seed.operands[which], why.rounding
                s = _grown(seed, which, target)
        except Declined as why:
            if seed in widened:
                round_again(*widened.pop(seed))
            if _near_miss(seed.operands[which]):
                decline(seed, str(why))
            continue
        found.append(s)
        covered.update(s.seconds)
    kept = _standing(found, decline)
    for s in found:
        if s not in kept:
            for op in widened.keys() & set(s.seconds):
                round_again(*widened.pop(op))
    return kept


def _standing(found: list[Stream], decline: Callable[[Operation, str], None]) -> list[Stream]:
    """Those that need nothing which another one, or nobody, keeps in memory."""
    while True:
        members = {op for s in found for op in s.members}
        kept = [s for s in found if not escapes(s, members)]
        for s in found:
            if s not in kept:
                decline(s.seconds[0], "a value of the middle space is needed in memory all the same")
        if len(kept) == len(found):
            waiting = circle(found)
            if waiting is None:
                return found
            decline(waiting.seconds[0], "kernels would wait for each other")
            kept = [s for s in found if s is not waiting]
        found = kept


def _near_miss(v: Value) -> bool:
    """The operand comes from a contraction by way of a few generics."""
    for _ in range(4):
        op = v.defining_op
        if op is None or op.name != "tensor.generic":
            return False
        if is_contraction(op):
            return True
        if not op.operands:
            return False
        v = op.operands[0]
    return False


# -- taking them out ----------------------------------------------------------------------------------------------------------


def _describe(s: Stream) -> str:
    """For remarks: what streams over what."""
    kinds = [c for op in s.reductions for c in op["combine"]]
    sizes = "x".join(str(s.sizes[f]) for f in (*s.batch, *s.rows, *s.stream))
    return f"{len(s.firsts)} + {len(s.seconds)} contractions around [{', '.join(kinds)}] in the space {sizes}"



def _outline(streams: Sequence[Stream], name: Callable[[int], str], by_data: Callable[[Stream], bool]) -> None:
    """Makes each stream a `tensor.fused` of copies of its members, placed at the last of them, and erases the members. `by_data`: whether its masks'
    data are to say which blocks it skips.

    A value that two streams compute is stored by the first, for readers that are in no stream which computes it."""
    members = {op for s in streams for op in s.members}
    stored: dict[Value, Value] = {}
    for k, s in enumerate(streams):
        order = {op: i for i, op in enumerate(s.seconds[0].parent)}  # type: ignore[arg-type]
        inside = sorted(s.members, key=order.__getitem__)
        outputs = [r for op in inside for r in op.results if r not in stored and s.kind_of(r) not in ("first", "full") and _is_stored(r, streams)]
        if not outputs:
            continue  # its readers compute it themselves, or another stream stores it
        fused = _fused(s, inside, outputs, name(k), by_data(s))
        stored |= dict(zip(outputs, fused.results, strict=True))
    for old, new in stored.items():
        new.name = old.name
        old.replace_uses_if(new, lambda user: user not in members)
    left = sorted(members, key={op: i for i, op in enumerate(streams[0].seconds[0].parent)}.__getitem__)  # type: ignore[arg-type]
    for op in reversed(left):
        if not any(r.uses for r in op.results):
            op.erase()


def _is_stored(v: Value, streams: Sequence[Stream]) -> bool:
    """Some reader of `v` is in no stream, or in one that does not compute `v`."""
    for user in v.users:
        homes = [s for s in streams if user in s.position]
        if not homes or any(v.defining_op not in s.position for s in homes):
            return True
    return False


def _fused(s: Stream, members: Sequence[Operation], outputs: Sequence[Value], name: str, by_data: bool) -> Operation:
    inside = set(members)
    inputs = list(dict.fromkeys(v for op in members for v in op.operands if v.defining_op not in inside))
    last = members[-1]
    assert isinstance(last.parent, Block)
    block = Block([v.type for v in inputs], [v.name for v in inputs])
    types = [TensorType(r.type.shape, r.type.dtype, r.type.strides) for r in outputs]  # type: ignore[attr-defined]
    at = Builder(last.parent, last, s.seconds[0].location)
    ranges = block_ranges(s, at) if by_data else []
    attrs = {"kernel": name, "why": f"streams {_describe(s)}"} | ({"ranges": (len(inputs), BLOCK)} if ranges else {})
    renamed: dict[Value, Value] = dict(zip(inputs, block.args, strict=True))
    for v in ranges:
        block.add_arg(v.type, v.name)
    fused = at.create("tensor.fused", [*inputs, *ranges], attrs, types, [Region([block])])
    for op in members:
        block.append(op.clone(renamed))
    Builder(block, None, last.location).create("tensor.yield", [renamed[v] for v in outputs])
    return fused


@register
@dataclass(frozen=True)
class StreamPass(Pass):
    """See the module docstring. `relax_casts`: a value rounded to 16 bits and widened again may keep its precision."""

    name: ClassVar[str] = "stream"
    relax_casts: bool = True

    def run(self, module: Operation, ctx: PassContext) -> None:
        for func in [f for f in module.body if f.name == "func"]:
            found = _find_streams(func, ctx.target, lambda op, why: ctx.remark("declined", f"no streaming: {why}", op.location),
                                  self.relax_casts)
            for s in found:
                by_data = ctx.target.is_gpu and worth_ranges(s)
                skips = ", in the blocks that its masks' data leave" if by_data else ""
                ctx.remark("done", f"streams {_describe(s)}{skips}", s.seconds[0].location)
            if found:
                _outline(found, lambda k: "stream" if k == 0 else f"stream_{k + 1}", lambda s: ctx.target.is_gpu and worth_ranges(s))
                topological_sort(func.body)
