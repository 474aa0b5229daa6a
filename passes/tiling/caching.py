"""What a kernel reads twice stays in the cache in between: loads say so on GPUs."""

from __future__ import annotations

from ...ir import Block, Operation, Value

__all__ = ["mark_second_readings"]


def mark_second_readings(kernel: Block) -> None:
    """Of a buffer that several of the kernel's outermost loops read, all but the last reading ask that it be kept, and the last that it be
    dropped: it is the output's turn then, and other programs'."""
    readings: dict[Value, list[list[Operation]]] = {}
    for loop in kernel:
        if loop.name != "tile.for":
            continue
        here: dict[Value, list[Operation]] = {}
        for op in loop.walk():
            if op.name == "tile.load" and op["shape"]:
                here.setdefault(op.operands[0], []).append(op)
        for buffer, loads in here.items():
            readings.setdefault(buffer, []).append(loads)
    for loads_of_loops in readings.values():
        if len(loads_of_loops) < 2:
            continue
        for loads in loads_of_loops[:-1]:
            for op in loads:
                op.attributes["evict"] = "last"
        for op in loads_of_loops[-1]:
            op.attributes["evict"] = "first"
