"""Seconds of one kernel on a device: GEMMs by tiles and waves, memory-bound kernels by bytes, streaming attention by FLOPs.

Entry points: `gemm_time`, `memory_time`, `attention_time`. The model is a roofline with the quantisation that real GEMM
libraries have: the output is cut into tiles, tiles are dealt to the device's cores in waves, a tile's time grows with K
plus a constant part (`gemm_half_k`), and a smaller tile reuses less and so runs below the peak. The library picks the
best tile shape. All fitted constants live in `Efficiency` (see `cluster.py`); the tile table below is fixed.
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil

from .cluster import Device
from .curves import curve_seconds

__all__ = ["attention_time", "gemm_time", "memory_time"]

# Tile (rows, columns) and the share of a large tile's rate that it reaches.
TILES = ((256, 128, 1.0), (128, 128, 0.95), (128, 64, 0.80), (64, 64, 0.60))
ATTENTION_BACKWARD = 2.5  # GEMMs of streaming attention backward over forward (5 over 2)


@lru_cache(maxsize=1 << 16)
def gemm_time(device: Device, dtype: str, batch: float, m: float, n: float, k: float, accumulate: float = 0.0,
              unit: int = 2) -> float:
    """Seconds of `batch` GEMMs of m x k by k x n side by side.

    `accumulate`: extra bytes per output element (fused accumulation).
    """
    if batch * m * n * k <= 0:
        return 0.0
    e, peak = device.efficiency, device.flops(dtype)
    per_core = peak / device.cores * e.gemm
    compute = float("inf")
    for rows, columns, rate in TILES:
        tiles = ceil(batch) * ceil(m / rows) * ceil(n / columns)
        waves = ceil(tiles / device.cores) if device.cores > 1 else batch * m * n / (rows * columns)
        compute = min(compute, waves * 2 * rows * columns * (k + e.gemm_half_k) / (per_core * rate))
    moved = batch * (unit * (m * k + k * n + m * n) + accumulate * m * n)
    return max(compute, moved / (device.memory_bandwidth * e.memory)) + e.kernel_overhead_s


def memory_time(device: Device, nbytes: float) -> float:
    """Seconds of a memory-bound kernel that moves `nbytes`."""
    if nbytes <= 0:
        return 0.0
    if device.efficiency.memory_curve:
        return curve_seconds(device.efficiency.memory_curve, nbytes)
    return nbytes / (device.memory_bandwidth * device.efficiency.memory) + device.efficiency.kernel_overhead_s


def attention_time(device: Device, dtype: str, flops: float, backward: bool = False) -> float:
    """Seconds of a streaming attention kernel that does `flops` forward; backward does ATTENTION_BACKWARD times as many."""
    rate = device.flops(dtype) * device.efficiency.attention
    if backward:
        flops, rate = flops * ATTENTION_BACKWARD, rate * device.efficiency.attention_backward
    return flops / rate + device.efficiency.kernel_overhead_s
