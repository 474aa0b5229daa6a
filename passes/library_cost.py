"""How long a matrix product takes on a GPU, by the library and as a generated kernel: seconds, from peak rates and bytes moved.

    library_seconds(target, "bf16", (1, 4096, 4096, 4096), result_bytes=2, readers=1)

Rates are per multiprocessor, from NVIDIA's data sheets at boost clocks; the shares of them that kernels reach are measured ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir import Target

__all__ = ["generated_seconds", "library_seconds"]

LAUNCH = 2e-6
"""Seconds that one more kernel costs the device: its start and end overlap with nothing."""
BYTES = {"bf16": 2, "f16": 2, "f32": 4, "tf32": 4, "f64": 8}


@dataclass(frozen=True)
class _Rates:
    """FLOP/s of one multiprocessor by kind, and bytes/s of the device's memory."""

    flops: dict[str, float]
    bandwidth: float


RATES = {
    80: _Rates({"bf16": 2.89e12, "f16": 2.89e12, "tf32": 1.44e12, "f32": 0.181e12, "f64": 0.181e12}, 1.9e12),
    90: _Rates({"bf16": 7.49e12, "f16": 7.49e12, "tf32": 3.75e12, "f32": 0.507e12, "f64": 0.507e12}, 3.35e12),
    100: _Rates({"bf16": 15.2e12, "f16": 15.2e12, "tf32": 7.6e12, "f32": 0.54e12, "f64": 0.27e12}, 8e12),
}
LIBRARY_SHARE = {"bf16": 0.78, "f16": 0.78, "tf32": 0.75, "f32": 0.80, "f64": 0.80}
GENERATED_SHARE = {"bf16": 0.55, "f16": 0.55, "tf32": 0.40, "f32": 0.30, "f64": 0.10}
MEMORY_SHARE = 0.9
TILE = 128
"""Rows and columns of the tile that one multiprocessor works on."""


def library_seconds(target: Target, kind: str, sizes: tuple[int, ...], result_bytes: int, readers: int) -> float:
    """By cuBLASLt. sizes: (batch, m, n, k); readers: pointwise ops that would have been fused, and now read the result from memory."""
    batch, m, n, _ = sizes
    extra = readers * (LAUNCH + 2 * batch * m * n * result_bytes / (MEMORY_SHARE * _rates(target).bandwidth))
    return _product(target, kind, sizes, result_bytes, LIBRARY_SHARE[kind], TILE // 2) + extra


def generated_seconds(target: Target, kind: str, sizes: tuple[int, ...], result_bytes: int) -> float:
    """By a generated kernel, its pointwise reader fused."""
    return _product(target, kind, sizes, result_bytes, GENERATED_SHARE[kind], TILE)


def _product(target: Target, kind: str, sizes: tuple[int, ...], result_bytes: int, share: float, tile: int) -> float:
    batch, m, n, k = sizes
    rates, processors = _rates(target), max(1, target.multiprocessors)
    tiles = batch * -(-m // tile) * -(-n // tile)
    rounds = -(-tiles // processors)  # multiprocessors that wait for the last tiles count as busy
    busy = max(rounds * processors / tiles, 1.0) if rounds > 1 else processors / tiles
    flops = 2.0 * batch * m * n * k
    compute = flops * min(busy, 8.0) / (share * rates.flops[kind] * processors)
    moved = batch * (m * k + k * n) * BYTES[kind] + batch * m * n * result_bytes
    return LAUNCH + max(compute, moved / (MEMORY_SHARE * rates.bandwidth))


def _rates(target: Target) -> _Rates:
    """Those of the newest generation that is not newer than the target."""
    return RATES[max((c for c in RATES if c <= target.capability), default=min(RATES))]
