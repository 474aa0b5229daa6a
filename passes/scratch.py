"""Outputs as scratch memory: what is dead before an output is first written may live where that output will be.

    hosted = find_scratch(func, kernels, groups, bounds)       # group -> (output, offset in the output's elements)

The outputs are allocated for the whole call anyway, so such a group costs nothing. In particular the input of the launch that
writes an output in place lives there itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..ir.core import BlockArg, Operation, Value
from ..ir.expr import Dim, as_int, free_symbols
from ..ir.ranges import Bounds, known_less
from .liveness import Group, spans
from .storage import align, storage_bytes

__all__ = ["find_scratch"]

Hosted = dict[Group, tuple[BlockArg, int]]


def find_scratch(func: Operation, kernels: Mapping[str, Operation], groups: Sequence[Group], bounds: Bounds) -> Hosted:
    """Places as many bytes as it can, large groups and large outputs first."""
    hosted: Hosted = {}
    outputs = []
    first_writes = _first_writes(func)
    # an output whose size an extern decides does not exist from the start
    unknown = {s for op in func.body if op.name == "host.extern" for s in op["defines"]}
    for arg, attrs in zip(func.body.args, func["arg_attrs"], strict=False):
        if attrs.get("kind") == "output" and not attrs.get("extern") and not free_symbols(storage_bytes(arg.type)) & unknown:  # type: ignore[arg-type]
            first = first_writes.get(arg)
            if first is not None:
                outputs.append((storage_bytes(arg.type), arg, *first))  # type: ignore[arg-type]
    outputs.sort(key=lambda row: (-row[0] if isinstance(row[0], int) else 0, row[1].index))
    waiting = sorted(groups, key=lambda g: (-g.bytes if isinstance(g.bytes, int) else 0, g.start))
    for size, arg, at, last, op in outputs:
        inside: list[tuple[Group, int]] = []
        successor = _taken_over(op, arg, kernels, waiting, at, size) if at == last else None
        if successor is not None:
            inside.append((successor, 0))
        for g in waiting:
            offset = _offset(g, inside, size, bounds) if g.end < at else None
            if offset is not None:
                inside.append((g, offset))
        for g, offset in inside:
            hosted[g] = arg, offset // arg.type.dtype.bytes  # type: ignore[attr-defined]
        waiting = [g for g in waiting if g not in hosted]
    return hosted


def _first_writes(func: Operation) -> dict[Value, tuple[int, int, Operation]]:
    """The first use of each argument that is used and not seen through a view (if it is an output, that writes it), and the positions of the first
    and last op that may run beside it."""
    found: dict[Value, tuple[int, int, Operation]] = {}
    for (first, last), op in zip(spans(func), func.body, strict=True):
        for v in op.operands:
            if isinstance(v, BlockArg):
                found.setdefault(v, (first, last, op))
    return {v: where for v, where in found.items() if not any(op.name == "host.view" for op in v.users)}


def _taken_over(op: Operation, arg: BlockArg, kernels: Mapping[str, Operation], groups: Sequence[Group], at: int,
                size: Dim) -> Group | None:
    """The group that dies at `op`, beside which nothing runs, and that `op` may overwrite with the output."""
    if op.name != "host.launch" or op["kernel"].name not in kernels or op.operands.count(arg) > 1:
        return None
    out = op.operands.index(arg)
    for i, j in kernels[op["kernel"].name]["inplace"]:
        if j != out:
            continue
        others = {v for k, v in enumerate(op.operands) if k != i}
        for g in groups:
            if g.end == at and op.operands[i] in g.members and g.bytes == size and others.isdisjoint(g.members):
                return g  # with another member here, this launch would write the place twice
    return None


def _offset(g: Group, inside: Sequence[tuple[Group, int]], size: Dim, bounds: Bounds) -> int | None:
    """The lowest aligned offset at which `g` fits into `size` bytes beside the groups that are alive at the same time."""
    around = sorted([(offset, other.bytes) for other, offset in inside if other.meets(g)], key=lambda row: row[0])
    if not all(isinstance(n, int) for n in (g.bytes, size, *[taken for _, taken in around])):
        # symbolic sizes: alone at its time, and proved not to be larger
        return 0 if not around and (g.bytes == size or known_less(g.bytes, size + 1, bounds)) else None
    at, room = 0, as_int(size)
    for offset, taken in around:
        if offset - at >= as_int(g.bytes):
            break
        at = max(at, as_int(align(offset + as_int(taken))))
    return at if at + as_int(g.bytes) <= room else None
