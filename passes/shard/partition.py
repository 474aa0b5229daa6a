"""Which blocks each model part holds.

Entry points: `even_split(layers, parts)`, `part_blocks(config, plan, split)`. The embedding joins the first part and the
head the last.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

from .model import ModelConfig
from .plan import Plan
from .schedules import SCHEDULES

__all__ = ["PartLayout", "even_split", "part_blocks", "part_ranks"]


@dataclass(frozen=True)
class PartLayout:
    """Per part: run-length block kinds, and the pipeline rank that holds it."""

    runs: tuple[tuple[tuple[str, int], ...], ...]
    ranks: tuple[int, ...]


def even_split(layers: int, parts: int) -> tuple[int, ...]:
    """Blocks per part as even as possible; the parts that hold the embedding and the head are the first to get fewer."""
    base, extra = divmod(layers, parts)
    order = [*range(1, parts - 1), 0, parts - 1] if parts > 1 else [0]
    more = set(order[:extra])
    return tuple(base + (i in more) for i in range(parts))


def part_ranks(schedule: str, pp: int, parts: int) -> tuple[int, ...]:
    """The rank of each part (of the downward direction, when there are two)."""
    if SCHEDULES[schedule].placement == "vee":
        return tuple(min(i, parts - 1 - i) for i in range(parts))
    return tuple(i % pp for i in range(parts))


def part_blocks(config: ModelConfig, plan: Plan, split: tuple[int, ...]) -> PartLayout:
    """Lay the model's blocks on parts by `split` (blocks per part, embedding and head not counted)."""
    kinds = config.blocks
    runs, start = [], 1
    for i, count in enumerate(split):
        first = 0 if i == 0 else start
        last = start + count + (1 if i == len(split) - 1 else 0)
        runs.append(tuple((kind, len(list(group))) for kind, group in groupby(kinds[first:last])))
        start += count
    return PartLayout(tuple(runs), part_ranks(plan.schedule, plan.pp, len(split)))
