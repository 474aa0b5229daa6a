"""In which order the programs of a stream are numbered, where a launch shares them out among multiprocessors once and for all.

Within a window, all blocks of rows but the first few of each batch element have the same number of steps. Programs are dealt out in rounds (see
`backends/triton/group_schedule.py`); with short ones among long ones the lots differ by up to a program's steps. So all programs of full length come
first, one batch element after another, as they share keys and values in the L2 cache; then the short ones of all batch elements, longest first, which
fill up what is uneven.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from ...ir import Dim
from ...ir.expr import floordiv, maximum, minimum, mod
from .emit import Emitter

__all__ = ["full_length", "place_in_order"]


def full_length(steps: Sequence[int]) -> int:
    """How many programs of a batch element have full length, for the numbers of steps in the order in which they would be launched; 0 where another
    order is of no use: all have, at most half have (a causal stream, which would lose its neighbours), or they do not come first."""
    full = steps.count(max(steps, default=0))
    falling = all(a >= b for a, b in pairwise(steps))
    return full if falling and len(steps) < 2 * full < 2 * len(steps) else 0


def place_in_order(e: Emitter, x: Dim, elements: int, blocks: int, full: int) -> tuple[Dim, Dim]:
    """(batch element, block) of program x of elements * blocks, of which the first `full` blocks of each element are long."""
    short = e.named(minimum(maximum(x - (elements * full - 1), 0), 1), 1)
    element = minimum((1 - short) * floordiv(x, full) + short * mod(x, elements), elements - 1)  # the minimum is for readers that want a bound
    block = (1 - short) * mod(x, full) + short * floordiv(x, elements)
    return e.named(element, elements - 1), e.named(block, blocks - 1)
