"""Which of cuBLASLt's algorithms for a product is fastest, by measurement (`mode="max-autotune"`).

    result = fastest(lt, handle, product, results)      # of several of the library's heuristic, the best guess first

The heuristic's first guess is up to 17 % slower than one of the next seven (H200, logits of 8192 x 50304 x 1024: 1382 us, 1145), most where a product
is bound by the power that the device may draw: there the algorithm that moves least wins. So all are measured in turns, on random numbers, for
long enough that the clock settles; another than the first must be MARGIN faster.
"""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["CANDIDATES", "LEAST_FLOPS", "Measured", "choose", "fastest"]

CANDIDATES = 8
LEAST_FLOPS = 4e9
"""Operations of a product from which it is measured: some 10 us on a large device."""
WARM, TURNS, SECONDS = 0.03, 5, 0.004
"""Seconds of work before the first measurement; turns, and seconds of each candidate in a turn."""
MARGIN = 0.015


@dataclass(frozen=True)
class Measured:
    """A product in memory of its own: `run(result)` starts it with one of the heuristic's results and gives cuBLAS's status."""

    run: Callable[[Any], int]
    flops: float


def choose(milliseconds: Sequence[float]) -> int:
    """The number of the fastest, but the first if that is nearly as fast."""
    best = min(range(len(milliseconds)), key=lambda i: (milliseconds[i], i))
    return best if milliseconds[best] < milliseconds[0] * (1 - MARGIN) else 0


def fastest(product: Measured, results: Sequence[Any]) -> int:
    """The number of the fastest of `results` on the current device and stream; those that the library refuses to run count as slow."""
    refused = [i for i, result in enumerate(results) if product.run(result)]
    torch.cuda.synchronize()
    able = [i for i in range(len(results)) if i not in refused]
    if len(able) < 2:
        return able[0] if able else 0
    guess = product.flops / 5e14  # seconds of one run, about
    rounds = max(2, round(SECONDS / guess))
    for _ in range(max(1, round(WARM / guess))):
        product.run(results[able[0]])
    times: dict[int, list[float]] = {i: [] for i in able}
    for _ in range(TURNS):
        for i in able:
            times[i].append(_milliseconds(lambda i=i: product.run(results[i]), rounds))  # type: ignore[misc]
    found = [statistics.median(times[i]) if i in times else float("inf") for i in range(len(results))]
    return choose(found) if 0 not in refused else min(able, key=lambda i: found[i])


def _milliseconds(run: Callable[[], Any], rounds: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    run()
    start.record()
    for _ in range(rounds):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / rounds
