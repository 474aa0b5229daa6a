"""About how long a launch takes on one thread of a CPU, and when sharing work among threads pays.

Facts of kernels (`flops`, `bytes`, `grid`) and four rates: rough, but the same for the pass that puts launches side by side and for the code
generator that splits them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .core import Operation
from .expr import Dim, product

__all__ = ["FORK_NANOSECONDS", "SERIAL_NANOSECONDS", "Share", "estimated_nanoseconds", "share_of", "side_by_side_gain"]

SERIAL_NANOSECONDS = 20_000
"""Launches estimated shorter than this run on the calling thread alone: the others have to hear of a launch, and to fetch its data. So do
calls in which threads can share less."""
FORK_NANOSECONDS = 4_000
"""What it costs to share a launch between two threads: to hear of it, to fetch data from the other core, to wait for the end."""

BYTES_PER_NANOSECOND = 10
DOT_FLOPS_PER_NANOSECOND = 40
FLOPS_PER_NANOSECOND = 8
UNKNOWN_PROGRAM_NANOSECONDS = 500


def estimated_nanoseconds(kernel: Operation) -> Dim:
    """Rough single-thread time of a launch, from the kernel's own figures; may be symbolic."""
    flops, moved = kernel["flops"], kernel["bytes"]
    if isinstance(flops, int) and isinstance(moved, int) and not flops and not moved:
        return product(kernel["grid"]) * UNKNOWN_PROGRAM_NANOSECONDS
    has_dot = any(op.name == "tile.dot" for op in kernel.walk())
    return flops // (DOT_FLOPS_PER_NANOSECOND if has_dot else FLOPS_PER_NANOSECOND) + moved // BYTES_PER_NANOSECOND


@dataclass(frozen=True)
class Share:
    """A launch, or a chain of them, as work for several threads: nanoseconds on one thread, those of the largest piece that one thread has to
    do alone, and what two threads save if it is split by itself (for that price)."""

    whole: int
    largest: int
    apart: int = 0


def share_of(nanoseconds: int, programs: int) -> Share:
    """Of one launch of so many programs."""
    splits = programs > 1 and nanoseconds >= SERIAL_NANOSECONDS
    return Share(nanoseconds, nanoseconds // max(1, programs), max(0, nanoseconds // 2 - FORK_NANOSECONDS) if splits else 0)


def side_by_side_gain(members: Sequence[Share]) -> int:
    """Nanoseconds that two threads save by sharing the members as one launch, over what they would save anyway."""
    whole = sum(m.whole for m in members)
    return whole - max(whole // 2, *(m.largest for m in members)) - FORK_NANOSECONDS - sum(m.apart for m in members)
