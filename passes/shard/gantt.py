"""A pipeline's run as text: a row per rank, time to the right.

Entry point: `gantt_text(run, width)`. Letters: F forward, B backward for the input, W for the weights, X both in one, O a forward and a
backward that overlap; lower case from the second model part of a rank on; a dot is waiting.
"""

from __future__ import annotations

from .schedules import Schedule
from .simulator import PipelineRun

__all__ = ["LEGEND", "gantt_text", "shown_ranks"]

LEGEND = "F forward, B input gradient, W weight gradient, X both in one, O forward and backward together, lower case: further parts, . idle"
_LETTER = {"F": "F", "B": "B", "W": "W", "BW": "X"}


def shown_ranks(ranks: int, most: int = 16) -> list[int]:
    """All ranks, or `most` of them evenly spread with both ends."""
    if ranks <= most:
        return list(range(ranks))
    return sorted({round(i * (ranks - 1) / (most - 1)) for i in range(most)})


def gantt_text(run: PipelineRun, schedule: Schedule, width: int = 120, most: int = 16) -> str:
    """The chart. Every column is the operation that takes most of its time on that rank."""
    if not run.timeline or run.seconds <= 0:
        raise ValueError("the run has no timeline; simulate(..., timeline=True)")
    step, rows = run.seconds / width, []
    for rank in shown_ranks(len(run.timeline), most):
        covered: list[dict[str, float]] = [{} for _ in range(width)]
        first = min((item.op.stage for item in run.timeline[rank]), default=0)
        for item in run.timeline[rank]:
            letter = "O" if item.op.overlapped else _LETTER[item.op.kind]
            letter = letter if item.op.stage == first else letter.lower()
            for column in range(int(item.start / step), min(width - 1, int(item.end / step)) + 1):
                share = min(item.end, (column + 1) * step) - max(item.start, column * step)
                covered[column][letter] = covered[column].get(letter, 0.0) + share
        row = ""
        for cell in covered:
            cell["."] = step - sum(cell.values())
            row += max(cell, key=lambda k: cell[k])
        rows.append(f"rank {rank:4d} |{row}| busy {run.busy[rank] / run.seconds:5.1%}")
    return "\n".join(rows)
