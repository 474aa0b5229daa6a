"""Which launches write their results past the caches (`nontemporal` stores).

Before: host functions with planned memory. After: launches and copies whose working set exceeds the caches have `nontemporal`, the numbers of
the operands that are written so; where sizes are symbolic, `excess` too, in bytes: the launch does so if that is not negative.

An ordinary store reads the line that it writes: a copy moves three bytes for each two that it needs. A nontemporal store does not, but its
line is in no cache afterwards. So it pays where the line would be thrown out before anybody reads it again:
- a result that no later op of the function reads: if the launch moves more bytes than the last cache holds;
- one that is read again: if `DISTANCE` times that much is touched from the write up to the read;
- packed parameters, which are all made before the program begins: if together they are `DISTANCE` times that much.

A kernel is left alone if it computes products (its tiles are not whole lines), reads what it writes (then the line is there already), or writes
less than whole lines in a row. So are buffers that take over the memory of an operand, and what the caller owns, whose address may be odd.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..ir.core import BlockArg, Operation, Value
from ..ir.expr import Dim, as_int, substitute
from ..ir.passes import Pass, PassContext, register
from ..ir.ranges import known_nonnegative, lower_bound, split_linear, upper_bound
from ..ir.target import Target
from ..ir.types import BufferType, TileType
from .storage import storage_bytes, symbol_bounds

__all__ = ["Nontemporal", "cache_bytes"]

LINE = 64
DISTANCE = 2
SHARED = 64 << 20
"""A last cache larger than this is shared with more cores than a program has."""


def cache_bytes(target: Target) -> int:
    """What the last cache holds for one program."""
    return min(target.l3, SHARED)


@register
@dataclass(frozen=True)
class Nontemporal(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "nontemporal"

    def run(self, module: Operation, ctx: PassContext) -> None:
        kernels = {op["sym_name"]: op for op in module.body if op.name == "tile.kernel"}
        functions = [op for op in module.body if op.name == "func"]
        bodies = {op["body"].name for f in functions for op in f.body if op.name == "host.loop"}
        count = 0
        for func in functions:
            if func["sym_name"] not in bodies:  # what a trip writes, the next one reads
                count += _Function(func, kernels, cache_bytes(ctx.target)).run()
        ctx.remark("done", f"{count} launches write past the caches")


class _Function:
    def __init__(self, func: Operation, kernels: Mapping[str, Operation], cache: int):
        self.func, self.kernels, self.cache = func, kernels, cache
        self.bounds = symbol_bounds(func)
        self.ops = [op for op in func.body if op.name.startswith("host.") and not op.results]
        self._packed: Dim = sum((self._moved(op) for op in self.ops if op.name == "host.launch" and op["cached"]), 0)

    def run(self) -> int:
        count = 0
        for at, op in enumerate(self.ops):
            if op.name not in ("host.launch", "host.copy") or op.attributes.get("beside"):
                continue
            written = self._candidates(op)
            packs = op.name == "host.launch" and op["cached"]
            excess = [(k, self._packed - DISTANCE * self.cache if packs else self._excess(at, op.operands[k])) for k in written]
            chosen = [(k, e) for k, e in excess if self._possible(e)]
            if not chosen:
                continue
            op.attributes["nontemporal"] = tuple(k for k, _ in chosen)
            least = next((e for _, e in chosen if not self._certain(e)), None)
            if least is not None:  # one test for all: they are written together
                op.attributes["excess"] = least
            count += 1
        return count

    def _certain(self, excess: Dim) -> bool:
        low = lower_bound(excess, self.bounds)
        return low is not None and known_nonnegative(low)

    def _possible(self, excess: Dim) -> bool:
        if isinstance(excess, int):
            return excess >= 0
        high = upper_bound(excess, self.bounds)
        return not (isinstance(high, int) and high < 0)

    def _candidates(self, op: Operation) -> list[int]:
        """Operands that are written by whole lines, to memory of their own that is aligned."""
        n = len(op.operands)
        outputs = range(n - 1, n) if op.name == "host.copy" else range(n - op["outputs"], n)
        kernel = None if op.name == "host.copy" else self.kernels.get(op["kernel"].name)
        if op.name == "host.copy":
            source, target = (v.type for v in op.operands)
            assert isinstance(source, BufferType) and isinstance(target, BufferType)
            if target.rank and not any(s == 1 and n != 1 for n, s in zip(target.shape, target.layout, strict=True)):
                return []
        elif kernel is None or any(inner.name == "tile.dot" for inner in kernel.walk()):
            return []
        inputs = [v for k, v in enumerate(op.operands) if k not in outputs]
        if any(_overlap(op.operands[k], v) for k in outputs for v in inputs):
            return []
        return [k for k in outputs if self._is_own(op.operands[k]) and (kernel is None or _writes_lines(kernel, k))]

    def _is_own(self, v: Value) -> bool:
        root, offset = _root(v)
        if offset is None or offset % LINE:
            return False
        if isinstance(root, BlockArg):
            return bool(self.func["arg_attrs"]) and self.func["arg_attrs"][root.index].get("kind") == "output"
        return root.defining_op is not None and root.defining_op.name in ("host.slot", "host.persistent")

    def _excess(self, at: int, v: Value) -> Dim:
        """Bytes by which what is touched until `v` is read again (or, if it is not, by the op that writes it) exceeds the caches."""
        touched = self._moved(self.ops[at])
        for op in self.ops[at + 1:]:
            outputs = 1 if op.name == "host.copy" else op.attributes.get("outputs", 0)
            touched = touched + self._moved(op)
            if any(_overlap(v, x) for x in op.operands[:len(op.operands) - outputs]):
                return touched - DISTANCE * self.cache
        return self._moved(self.ops[at]) - self.cache

    def _moved(self, op: Operation) -> Dim:
        """Bytes that an op touches: what its kernel says, or all of its operands. At most the latter: a kernel may count a byte twice."""
        total: Dim = sum((storage_bytes(v.type) for v in dict.fromkeys(op.operands)), 0)  # type: ignore[arg-type, misc]
        kernel = self.kernels.get(op["kernel"].name) if op.name == "host.launch" else None
        moved = kernel["bytes"] if kernel is not None else 0
        if isinstance(moved, int) and isinstance(total, int):
            return min(moved, total) if moved else total
        return moved if isinstance(moved, int) and moved else total


def _root(v: Value) -> tuple[Value, int | None]:
    """The memory of a buffer, and at which byte of it the buffer begins; None if that is not constant."""
    offset: int | None = 0
    while (op := v.defining_op) is not None and op.name == "host.view":
        source = op.operands[0].type
        assert isinstance(source, BufferType)
        step = op["offset"]
        offset = offset + step * source.dtype.bytes if isinstance(step, int) and offset is not None else None
        v = op.operands[0]
    return v, offset


def _overlap(a: Value, b: Value) -> bool:
    """Whether two buffers may share memory."""
    (x, _), (y, _) = _root(a), _root(b)
    if x is y:
        return True
    p, q = x.defining_op, y.defining_op
    if p is None or q is None or p.name != "host.slot" or q.name != "host.slot":
        return False
    first, second = (op["offset"] for op in (p, q))
    ends = (first + p["bytes"], second + q["bytes"])
    if not all(isinstance(e, int) for e in (first, second, *ends)):
        return bool(first == second)
    return bool(first < ends[1] and second < ends[0])


def _writes_lines(kernel: Operation, argument: int) -> bool:
    """The kernel never reads this buffer, and writes it in runs of whole lines."""
    buffer = kernel.body.args[argument]
    stores: list[Operation] = []
    for op in kernel.walk():
        if op.name == "tile.store" and op.operands[0] is buffer:
            stores.append(op)
        elif op is not kernel and buffer in op.operands:
            return False
    return bool(stores) and all(_is_run(op) for op in stores)


def _is_run(op: Operation) -> bool:
    t = op.operands[1].type
    if op["atomic"] or not isinstance(t, TileType) or not t.shape:
        return False
    width = as_int(t.shape[-1])
    fixed: dict[str, Dim] = {f"t{d}": 0 for d in range(t.rank - 1)}
    run = split_linear(substitute(op["offset"], fixed), f"t{t.rank - 1}")
    return width * t.dtype.bytes >= LINE and run is not None and run[0] == 1
