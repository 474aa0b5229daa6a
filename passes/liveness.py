"""Which buffers are alive when, and which may share memory because one takes over from another.

Entry points: `live_ranges`, `find_groups`. Positions are those of the ops in the function's body; ranges are inclusive at both
ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from ..ir.core import Operation, Value
from ..ir.expr import Dim
from .storage import align
from .stream_order import concurrent, uses_streams

__all__ = ["Group", "base_of", "buffer_bytes", "find_groups", "inplace_pairs", "live_ranges", "spans"]


@dataclass(eq=False)
class Group:
    """Buffers that share one place: the same memory handed from launch to launch. All members have `bytes` bytes."""

    bytes: Dim
    start: int
    end: int
    members: list[Value] = field(default_factory=list)

    @cached_property
    def size(self) -> Dim:
        """Bytes with the padding that keeps what follows aligned."""
        return align(self.bytes)

    def meets(self, other: Group) -> bool:
        """True if both are alive at some time."""
        return self.start <= other.end and other.start <= self.end


def buffer_bytes(v: Value) -> Dim:
    """The size of a `host.alloc` result."""
    assert v.defining_op is not None
    return v.defining_op["bytes"]


def base_of(v: Value) -> Value:
    """The buffer that `v` is a view of, or itself."""
    while v.defining_op is not None and v.defining_op.name == "host.view":
        v = v.defining_op.operands[0]
    return v


def spans(func: Operation) -> list[tuple[int, int]]:
    """For each position of the body: the first and last position of the ops that run side by side with the one there, or may at the same time on
    another stream."""
    if uses_streams(func):
        return concurrent(func)
    ops = func.body.ops
    found: dict[int, tuple[int, int]] = {}
    for at, op in enumerate(ops):
        if number := op.attributes.get("beside"):
            found[number] = (found.get(number, (at, at))[0], at)
    return [found.get(op.attributes.get("beside", 0), (at, at)) for at, op in enumerate(ops)]


def live_ranges(func: Operation) -> dict[Value, tuple[int, int]]:
    """`host.alloc` result -> (position of the first, of the last op that touches it or a view of it, or runs side by side with such an op)."""
    base: dict[Value, Value] = {}
    ranges: dict[Value, tuple[int, int]] = {}
    around = spans(func)
    for at, op in enumerate(func.body):
        if op.name == "host.alloc":
            base[op.result] = op.result
        elif op.name == "host.view":
            if op.operands[0] in base:
                base[op.result] = base[op.operands[0]]
        else:
            for v in op.operands:
                if v in base:
                    first, last = ranges.get(base[v], around[at])
                    ranges[base[v]] = (min(first, around[at][0]), max(last, around[at][1]))
    return ranges


def inplace_pairs(op: Operation, kernels: Mapping[str, Operation]) -> tuple[tuple[int, int], ...]:
    """(input, output) operand numbers of a host op that may share memory: what its kernel says, and of a product the summand and the result."""
    if op.name == "host.launch":
        kernel = kernels.get(op["kernel"].name)
        return tuple(map(tuple, kernel["inplace"])) if kernel is not None else ()
    if op.name == "host.library" and "c" in op["roles"]:
        c, d = op["roles"].index("c"), op["roles"].index("d")
        return ((c, d),) if op.operands[c].type.dtype == op.operands[d].type.dtype else ()  # type: ignore[attr-defined]
    return ()


def find_groups(func: Operation, kernels: Mapping[str, Operation]) -> dict[Value, Group]:
    """Every allocation's group, after in-place reuse.

    An output takes over from an input where the kernel's `inplace` allows it, the input dies at the launch, and the sizes are
    equal; not from one that a launch beside it reads.
    """
    around = spans(func)
    ops = func.body.ops
    found = {v: Group(buffer_bytes(v), start, end, [v]) for v, (start, end) in live_ranges(func).items()}
    for at, op in enumerate(func.body):
        taken: set[Group] = set()
        for i, j in inplace_pairs(op, kernels):
            source, target = found.get(op.operands[i]), found.get(op.operands[j])
            first, last = around[at]
            if (source is None or target is None or source in taken or source.end != last or target.start != first
                    or any(o is not op and found.get(base_of(v)) is source for o in ops[first:last + 1] for v in o.operands)
                    or source.bytes != target.bytes or op.operands.count(op.operands[i]) > 1):
                continue
            taken.add(source)
            source.end = target.end
            source.members += target.members
            for v in target.members:
                found[v] = source
    return found
