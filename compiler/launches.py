"""How often a host-level module launches each kernel in one call, loops included.

    counts = launches(module)               # {kernel: Launches}
    str(counts["step"])                     # "2 per trip x 64 trips"

What runs only when a parameter has changed (`cached`) does not count.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ..ir.core import Operation
from ..ir.expr import Dim

__all__ = ["Launches", "launches", "total"]


@dataclass
class Launches:
    """`once`: outside loops. `in_loops`: number of trips (those of loops around each other multiplied) -> launches per trip."""

    once: int = 0
    in_loops: Counter[Dim] = field(default_factory=Counter)

    def __str__(self) -> str:
        parts = [str(self.once)] if self.once or not self.in_loops else []
        return " + ".join([*parts, *(f"{n} per trip x {trips} trips" for trips, n in self.in_loops.items())])

    def to_json(self) -> dict[str, Any]:
        """Trips are numbers, or texts where they depend on sizes."""
        return {"launches": self.once, "in_loops": [{"per_trip": n, "trips": trips if isinstance(trips, int) else str(trips)}
                                                    for trips, n in self.in_loops.items()]}


def launches(module: Operation) -> dict[str, Launches]:
    """Of every kernel that is launched at all."""
    functions = {op["sym_name"]: op for op in module.body if op.name == "func"}
    found: dict[str, Launches] = {}

    def visit(func: Operation, trips: Dim | None) -> None:
        for op in func.body:
            if op.name == "host.launch" and not op["cached"]:
                mine = found.setdefault(op["kernel"].name, Launches())
                if trips is None:
                    mine.once += 1
                else:
                    mine.in_loops[trips] += 1
            elif op.name == "host.loop":
                visit(functions[op["body"].name], op["trips"] if trips is None else trips * op["trips"])

    for func in functions.values():
        if not func["private"]:
            visit(func, None)
    return found


def total(counts: dict[str, Launches]) -> Launches:
    """Of all kernels together."""
    made = Launches(sum(c.once for c in counts.values()))
    for c in counts.values():
        made.in_loops.update(c.in_loops)
    return made
