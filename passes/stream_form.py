"""What a stream is: the members of one kernel, by what they do, and where each stands in the shared space (see `stream.py`)."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..ir import Dim, Operation, Value
from ..ir.expr import product
from .dead_region import Alive

__all__ = ["Stream"]


@dataclass
class Stream:
    """One kernel. The frame's dimensions f0, f1, ... are split into `batch`, `rows` and `stream`; `sizes` has their extents.

    `position[op]` gives the op's parallel dimensions over the frame; columns of the seconds and of `tail` are n0, n1, ...
    """

    sizes: dict[str, Dim]
    batch: tuple[str, ...]
    rows: tuple[str, ...]
    stream: tuple[str, ...]
    columns: tuple[Dim, ...]
    position: dict[Operation, tuple[Dim, ...]] = field(default_factory=dict)
    firsts: list[Operation] = field(default_factory=list)
    full: list[Operation] = field(default_factory=list)
    reductions: list[Operation] = field(default_factory=list)
    row: list[Operation] = field(default_factory=list)
    seconds: list[Operation] = field(default_factory=list)
    tail: list[Operation] = field(default_factory=list)
    shifts: dict[Operation, Value | None] = field(default_factory=dict)
    scales: dict[Operation, list[tuple[Value, str, bool]]] = field(default_factory=dict)
    guarded: set[Operation] = field(default_factory=set)  # sums of products in which a select of 0 hides exp(-inf + inf)
    alive: Alive = field(default_factory=Alive)

    @property
    def members(self) -> list[Operation]:
        return [*self.firsts, *self.full, *self.reductions, *self.row, *self.seconds, *self.tail]

    def kind_of(self, v: Value) -> str:
        """Where an internal value lives: "first", "full", "reduction", "row", "second", "tail"; "" for a value from outside."""
        op = v.defining_op
        for kind, ops in (("first", self.firsts), ("full", self.full), ("reduction", self.reductions), ("row", self.row),
                          ("second", self.seconds), ("tail", self.tail)):
            if op in ops:
                return kind
        return ""

    def streamed(self, op: Operation) -> Value:
        """The operand of a second contraction that the stream computes; the other one is `op`'s own."""
        return next(v for v in op.operands if self.kind_of(v) in ("first", "full"))

    @property
    def row_count(self) -> Dim:
        return product(self.sizes[f] for f in self.rows)

    @property
    def length(self) -> Dim:
        return product(self.sizes[f] for f in self.stream)
