"""Which steps of a host function on two streams may run at the same time.

    for op, (first, last) in zip(func.body, concurrent(func)): ...

Steps of one stream run in order. A step of the other stream is known to have ended if a `host.wait` lies between; all others may run at the same
time. Steps without a stream of their own (operator calls) count as the caller's stream, 0.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from ..ir.core import Operation

__all__ = ["STEPS", "concurrent", "uses_streams"]

STEPS = ("host.launch", "host.loop", "host.copy", "host.library", "host.extern")


def uses_streams(func: Operation) -> bool:
    """Whether anything of a function is launched on a second stream."""
    return any(op.name == "host.wait" for op in func.body)


def concurrent(func: Operation) -> list[tuple[int, int]]:
    """For each position of the body: the first and the last position of the steps that may run at the same time as the one there, itself included.

    Two steps whose ranges do not meet are ordered; so memory that is used within ranges that do not meet may be the same.
    """
    ops = func.body.ops
    found = [(at, at) for at in range(len(ops))]
    steps: tuple[list[int], list[int]] = ([], [])  # positions of the steps of each stream
    known: tuple[list[int], list[int]] = ([], [])  # for each: how many steps of the other stream have ended before it
    ended = [0, 0]
    for at, op in enumerate(ops):
        if op.name == "host.wait":
            ended[op["stream"]] = len(steps[op["on"]])
        elif op.name in STEPS and not op.attributes.get("cached"):
            stream = op.attributes.get("stream", 0)
            steps[stream].append(at)
            known[stream].append(ended[stream])
    for mine, theirs in ((0, 1), (1, 0)):
        for i, at in enumerate(steps[mine]):
            # Of the other stream: those from known[i] on, up to the first that waited for this one.
            run = steps[theirs][known[mine][i]:_waited(known[theirs], i)]
            if run:
                found[at] = (min(at, run[0]), max(at, run[-1]))
    return found


def _waited(known: Sequence[int], step: int) -> int:
    """The first of a stream's steps that begins after step number `step` of the other one has ended; their number if there is none."""
    return bisect_right(known, step)
