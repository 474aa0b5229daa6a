"""Timing several contenders in one process, fairly on a machine that others use too.

    eager, ours = measure_blocks([lambda: model(x), lambda: compiled(x)])
    eager.seconds, eager.spread

The contenders take turns in blocks (A B C A B C ...), so that a change of the machine's load meets all alike; within a block a
contender runs alone, so that it finds its own data in the caches, and between blocks there is a pause, so that nobody pays for the heat or the
waiting threads of another. A block's figure is the median of its calls, and the result is that of the best block: the time that the code
takes when nobody disturbs it. The spread says how much worse the worst block was.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Time", "best_block_medians", "environment", "first_call", "geometric_mean", "measure_blocks"]

MIN_CALLS, MAX_CALLS = 3, 400
MIN_BLOCKS, MAX_BLOCKS = 2, 6


@dataclass(frozen=True)
class Time:
    """Seconds per call of the best block, and by which part the median of the worst block is longer (0.1: ten percent)."""

    seconds: float
    spread: float


def measure_blocks(contenders: Sequence[Callable[[], Any]], seconds: float = 1.5, clock: Callable[[], float] = time.perf_counter,
                   pause: float = 0.02) -> list[Time]:
    """The time of a call of each contender. `seconds` is about how long each is measured; very slow ones take longer.

    Every contender is called twice beforehand, unmeasured, and once more after each pause (`pause` seconds).
    `clock=time.thread_time` counts the calling thread's CPU time: for work that stays in one thread, on a machine whose other users take
    turns with it.
    """
    estimates = []
    for call in contenders:
        call()
        estimates.append(_timed(call, clock))
    blocks = max(MIN_BLOCKS, min(MAX_BLOCKS, int(seconds / (MIN_CALLS * max(estimates)))))
    counts = [max(MIN_CALLS, min(MAX_CALLS, int(seconds / blocks / t))) for t in estimates]
    medians: list[list[float]] = [[] for _ in contenders]
    for _ in range(blocks):
        for call, count, found in zip(contenders, counts, medians, strict=True):
            time.sleep(pause)
            call()
            found.append(statistics.median(_timed(call, clock) for _ in range(count)))
    return [Time(min(found), max(found) / min(found) - 1) for found in medians]


def best_block_medians(contenders: Sequence[Callable[[], Any]], seconds: float = 1.5, clock: Callable[[], float] = time.perf_counter) -> list[float]:
    """`measure_blocks`, the seconds alone."""
    return [t.seconds for t in measure_blocks(contenders, seconds, clock)]


def first_call(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of one call, and its result: for a fresh `torch.compile`, the time to compile and run."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def _timed(call: Callable[[], Any], clock: Callable[[], float]) -> float:
    start = clock()
    call()
    return clock() - start


def geometric_mean(values: Sequence[float]) -> float:
    """NaN for no values."""
    return math.exp(statistics.fmean(map(math.log, values))) if values else math.nan


def environment() -> dict[str, Any]:
    """What a table of times means nothing without."""
    return {"torch": torch.__version__, "python": platform.python_version(), "cpu": _cpu_name(), "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), "load": [round(x, 2) for x in os.getloadavg()]}


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as f:
            return next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), platform.machine())
    except OSError:
        return platform.processor() or platform.machine()
