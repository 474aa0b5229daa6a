"""How fast each of cuBLASLt's algorithms for a product is, by measurement (`mode="max-autotune"`).

    times = guess_seconds(lt, row, device)      # of the heuristic's guesses, the first one first; `row` as in `cublaslt.py`

The heuristic's first guess was up to 17 % slower than one of the next seven (H200, logits of 8192 x 50304 x 1024: 1382 us, 1145), most where a
product is bound by the power that the device may draw. So all are measured in turns, on random numbers, for long enough that the clock settles.
"""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .cublaslt import CublasLt, ProductPlans
from .dtypes import TORCH_DTYPES

__all__ = ["GUESSES", "guess_seconds"]

GUESSES = 8
WARM, TURN = 0.03, 0.003
"""Seconds of work before the first measurement, and of each guess in a turn."""
TURNS = 5
SPEED = 5e14
"""FLOP/s from which the number of runs follows."""


def guess_seconds(lt: CublasLt, row: Mapping[str, Any], device: torch.device) -> list[float]:
    """Median seconds of one product of known sizes with each of the library's first GUESSES guesses (fewer where it has no more); infinity for
    those that it refuses to run. CudaError where it has none."""
    with torch.cuda.device(device):
        plans = [ProductPlans(lt, [{**row, "guess": 0}], {}, device)]
        count = min(GUESSES, plans[0].guesses)
        plans += [ProductPlans(lt, [{**row, "guess": i}], {}, device) for i in range(1, count)]
        held = _operands(row, device)
        pointers = {name: t.data_ptr() for name, t in held.items()}
        stream = torch.cuda.current_stream().cuda_stream
        runs = [_run(lt, plan, row, pointers, stream) for plan in plans]
        able = [i for i, run in enumerate(runs) if run() == 0]
        torch.cuda.synchronize()
        batch, m, n, k = row["sizes"]
        guess = 2.0 * batch * m * n * k / SPEED
        for _ in range(round(WARM / guess) + 1 if able else 0):
            runs[able[0]]()
        times: dict[int, list[float]] = {i: [] for i in able}
        for _ in range(TURNS):
            for i in able:
                times[i].append(_seconds(runs[i], max(2, round(TURN / guess))))
    return [statistics.median(times[i]) if i in times else float("inf") for i in range(count)]


def _operands(row: Mapping[str, Any], device: torch.device) -> dict[str, torch.Tensor]:
    """Random numbers in memory as the product walks it; the workspace."""
    batch, m, n, k = row["sizes"]
    held = {}
    for name, (rows, columns) in {"a": (m, k), "b": (k, n), "d": (m, n)}.items():
        between, down, across = (*row[name], 1)[:3]
        size = (batch - 1) * between + (rows - 1) * down + (columns - 1) * across + 1
        held[name] = torch.randn(size, device=device).to(TORCH_DTYPES[row["types"][name]])
    if row["bias"]:
        held["bias"] = torch.randn(n, device=device).to(TORCH_DTYPES[row["types"]["bias"]])
    held["workspace"] = torch.empty(max(1, row["workspace"]), device=device, dtype=torch.uint8)
    return held


def _run(lt: CublasLt, plan: ProductPlans, row: Mapping[str, Any], pointers: Mapping[str, int], stream: int) -> Callable[[], int]:
    """Starts the product; the library's status."""
    assert plan.fixed is not None
    (address,) = (ctypes.c_uint64 * 1).from_address(plan.fixed)
    handle, descriptor, a, b, c, d, algorithm, alpha, beta, _ = map(ctypes.c_void_p, (ctypes.c_uint64 * 10).from_address(address))
    if row["bias"]:
        lt.set_bias(descriptor, pointers["bias"])
    at = {name: ctypes.c_void_p(p) for name, p in pointers.items()}

    def run() -> int:  # the transposed product: its first operand is our second
        return lt.matmul(handle, descriptor, alpha, at["b"], a, at["a"], b, beta, at["d"], c, at["d"], d, algorithm, at["workspace"],
                         ctypes.c_size_t(row["workspace"]), ctypes.c_void_p(stream))
    run.keep = plan  # type: ignore[attr-defined]
    return run


def _seconds(run: Callable[[], Any], rounds: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    run()
    start.record()
    for _ in range(rounds):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / rounds / 1e3
