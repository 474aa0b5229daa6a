"""An independent check of a memory plan: runs the host program on memory that remembers who wrote each byte range.

    check_plan(func, kernels)        # raises IRError where a buffer would be read after something else overwrote it; how often it looked

It shares nothing with the planner: no live ranges, no groups. A buffer is a `host.slot`, an argument, or a view of an output
(scratch); writing marks the byte range as that buffer's, reading demands that the whole range still is. Within a launch an
output may touch an input's bytes only where the kernel says so (`inplace`) and the ranges are equal. Of launches side by side
(`beside`), which stand next to each other, none may touch bytes that another writes; nor of launches on two streams, unless a `host.wait`
for the other's stream lies between. Stream 1 must have been waited for before an operator call and at the end. At the end all outputs
must hold their own data. Symbolic plans are run at several symbol values within their ranges; where a size is not defined (it divides
by a size that is zero there), at the next larger ones for which all are. Slots must be aligned and inside the arena, views inside the output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..ir.core import IRError, Operation, Value
from ..ir.expr import as_int
from .liveness import inplace_pairs
from .storage import ALIGNMENT, representative_symbols, size_at, sizes_exist, storage_bytes

__all__ = ["check_plan"]

_SIZES = (0, 1, 3, 61, 128, 1000)
_RAISED = 65  # where sizes exist only for larger ones, the representative values alone are checked


@dataclass(frozen=True)
class _Slot:
    """A buffer's byte range [low, high) in a space: the arena (-1) or the memory of an argument (its number)."""

    value: Value
    space: int
    low: int
    high: int

    def overlaps(self, other: _Slot) -> bool:
        return self.space == other.space and self.low < other.high and other.low < self.high

    def __str__(self) -> str:
        place = "the arena" if self.space < 0 else f"argument {self.space}"
        return f"'{self.value.name or 'buffer'}' [{self.low}, {self.high}) of {place}"


class _Memory:
    """Byte ranges and the slot whose data they hold; ranges of different slots are disjoint."""

    def __init__(self) -> None:
        self.holds: dict[Value, _Slot] = {}

    def write(self, slot: _Slot) -> None:
        self.holds = {v: s for v, s in self.holds.items() if not s.overlaps(slot)}
        if slot.low < slot.high:
            self.holds[slot.value] = slot

    def has(self, slot: _Slot) -> bool:
        return slot.low == slot.high or slot.value in self.holds


def check_plan(func: Operation, kernels: Mapping[str, Operation]) -> int:
    """Raises IRError naming the op and the two slots if the plan of `func` is wrong; gives the number of sets of sizes that it was run at."""
    symbols = func["symbols"]
    wanted = [_defined(func, {name: _SIZES[(k + i * i) % len(_SIZES)] for i, name in enumerate(symbols)}) for k in range(len(_SIZES))]
    tried: list[dict[str, int]] = []
    for values in (*wanted, representative_symbols(func)):
        if values is not None and values not in tried:
            _check(func, kernels, values)
            tried.append(values)
    return len(tried)


def _defined(func: Operation, wanted: Mapping[str, int]) -> dict[str, int] | None:
    """The wanted values within the symbols' ranges, raised together until the program's sizes exist; None if they do not soon."""
    for more in range(_RAISED if wanted else 1):
        values = {}
        for name, (low, high) in func["symbols"].items():
            value = max(as_int(low), wanted[name] + more)
            values[name] = value if high is None else min(value, as_int(high))
        if sizes_exist(func, values):
            return values
    return None


def _check(func: Operation, kernels: Mapping[str, Operation], symbols: Mapping[str, int]) -> None:
    arena = size_at(func["stats"].get("arena_bytes", 0), symbols)
    slots: dict[Value, _Slot] = {}
    memory = _Memory()
    outputs = []
    kinds = [attrs.get("kind") for attrs in func["arg_attrs"]] or ["input"] * len(func.body.args)
    for arg, kind in zip(func.body.args, kinds, strict=True):
        slots[arg] = _Slot(arg, arg.index, 0, size_at(storage_bytes(arg.type), symbols))  # type: ignore[arg-type]
        if kind == "output":
            outputs.append(arg)
        elif kind not in ("extern", "late"):
            memory.write(slots[arg])
    beside, streams = _Beside(), _Streams()
    for op in func.body:
        if op.name == "host.alloc":
            raise IRError(f"'host.alloc' of '{op.result.name}' is left after planning")
        if op.name == "host.slot":
            low = size_at(op["offset"], symbols)
            slot = slots[op.result] = _Slot(op.result, -1, low, low + size_at(op["bytes"], symbols))
            if low % ALIGNMENT or low < 0 or slot.high > arena:
                raise IRError(f"{slot} is misaligned or outside the arena of {arena} bytes; sizes {dict(symbols)}")
        elif op.name == "host.view":
            source = op.operands[0]
            if source in outputs and not memory.has(slots[source]):  # temporary memory in an output that has yet to be made
                low = size_at(op["offset"], symbols) * source.type.dtype.bytes  # type: ignore[attr-defined]
                slot = _Slot(op.result, slots[source].space, low,
                             low + size_at(storage_bytes(op.result.type), symbols))  # type: ignore[arg-type]
                slots[op.result] = slot
                if low % ALIGNMENT or low < 0 or slot.high > slots[source].high:
                    raise IRError(f"{slot} is misaligned or outside {slots[source]}; sizes {dict(symbols)}")
            elif source in slots:
                slots[op.result] = slots[source]
        elif op.name in _SPLIT:
            read, written = _SPLIT[op.name](op)
            touched = tuple([slots[op.operands[i]] for i in which if op.operands[i] in slots] for which in (read, written))
            beside.check(op, *touched)
            streams.check(op, *touched)
            _check_access(op, kernels, [(i, slots[op.operands[i]]) for i in read if op.operands[i] in slots],
                          [(i, slots[op.operands[i]]) for i in written if op.operands[i] in slots], memory, symbols)
        elif op.name == "host.wait":
            streams.wait(op["stream"])
    streams.check_joined("at the end")
    for arg in outputs:
        if arg.uses and not memory.has(slots[arg]):
            raise IRError(f"{slots[arg]} does not hold the result at the end; sizes {dict(symbols)}")


class _Beside:
    """The launches side by side so far."""

    def __init__(self) -> None:
        self.number = 0
        self.done: set[int] = set()
        self.members: list[_Access] = []

    def check(self, op: Operation, read: list[_Slot], written: list[_Slot]) -> None:
        number = op.attributes.get("beside", 0)
        if number != self.number:
            self.done.add(self.number)
            self.number, self.members = number, []
        if not number:
            return
        if number in self.done:
            raise IRError(f"launches of group {number} are not next to each other: '{op.name}' {op.attributes.get('kernel', '')} is apart")
        for other in self.members:
            _check_apart((op, read, written), other, "run side by side")
        self.members.append((op, read, written))


class _Streams:
    """What has been launched on each of two streams since the other one waited for it."""

    def __init__(self) -> None:
        self.unknown: tuple[list[_Access], list[_Access]] = ([], [])

    def check(self, op: Operation, read: list[_Slot], written: list[_Slot]) -> None:
        if op.attributes.get("cached"):
            return
        stream = op.attributes.get("stream", 0)
        if op.name == "host.extern":
            self.check_joined(f"at '{op['target']}'")
        for other in self.unknown[1 - stream]:
            _check_apart((op, read, written), other, "may run at the same time")
        self.unknown[stream].append((op, read, written))

    def wait(self, stream: int) -> None:
        self.unknown[1 - stream].clear()

    def check_joined(self, where: str) -> None:
        if self.unknown[1]:
            raise IRError(f"'{self.unknown[1][0][0].name}' on stream 1 may still run {where}: a 'host.wait' of stream 0 is missing")


_Access = tuple[Operation, list[_Slot], list[_Slot]]
"""A step, what it reads and what it writes."""


def _check_apart(one: _Access, other: _Access, why: str) -> None:
    """Raises IRError if either writes bytes that the other touches."""
    (op, read, written), (op2, reads, writes) = one, other
    for mine, theirs in ((written, reads + writes), (read, writes)):
        for a, b in ((a, b) for a in mine for b in theirs if a.overlaps(b)):
            raise IRError(f"'{op.name}' {op.attributes.get('kernel', '')} and '{op2.name}' {op2.attributes.get('kernel', '')} {why}, but {a} "
                          f"and {b} overlap and one is written")


def _launch(op: Operation) -> tuple[range, range]:
    split = len(op.operands) - op["outputs"]
    return range(split), range(split, len(op.operands))


def _extern(op: Operation) -> tuple[range, range]:
    return range(op["inputs"]), range(op["inputs"], len(op.operands))


_SPLIT = {"host.launch": _launch, "host.loop": _launch, "host.library": _launch, "host.extern": _extern,
          "host.copy": lambda op: (range(1), range(1, 2))}


def _check_access(op: Operation, kernels: Mapping[str, Operation], inputs: list[tuple[int, _Slot]],
                  outputs: list[tuple[int, _Slot]],
                  memory: _Memory, symbols: Mapping[str, int]) -> None:
    allowed = set(inplace_pairs(op, kernels))
    where = f"at '{op.name}' {op.attributes.get('kernel', '')} with sizes {dict(symbols)}"
    for _, slot in inputs:
        if not memory.has(slot):
            raise IRError(f"{slot} is read {where}, but its memory was never written or holds something else by then")
    for k, (i, target) in enumerate(outputs):
        for j, source in inputs:
            if target.overlaps(source) and not ((j, i) in allowed and (source.low, source.high) == (target.low, target.high)):
                raise IRError(f"output {target} overwrites input {source} {where}")
        for _, other in outputs[:k]:
            if target.overlaps(other):
                raise IRError(f"outputs {target} and {other} overlap {where}")
    for _, target in outputs:
        memory.write(target)
