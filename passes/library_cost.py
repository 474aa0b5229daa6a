"""How long a matrix product takes on a GPU, by the library and as a generated kernel: seconds, from peak rates and bytes moved.

    work = Work("bf16", (1, 4096, 4096, 4096), result_bytes=2, fused=True, heavy=1.0)
    library_seconds(target, work), generated_seconds(target, work)

Rates are per multiprocessor, from NVIDIA's data sheets at boost clocks. What share of them kernels reach, and what issuing a call costs the
host, was measured on an H100 (`tests/gpu/host_check.py choice` prints the times of both ways beside the choice).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..ir import Target
from .tiling.gpu_tile_cost import product_seconds
from .tiling.gpu_tiles import gemm_tile_gpu

__all__ = ["BYTES", "LAUNCH", "TILE", "Work", "generated_seconds", "host_is_early",
           "library_seconds", "memory_rate", "peak_rate", "turning_pays", "unpack_seconds"]

LAUNCH = 2e-6
"""Seconds that one more kernel costs the device: its start and end overlap with nothing."""
LIBRARY_LAUNCH = 3.5e-6
"""The same of the library's kernels: they begin by reading descriptions of their operands (128x768x768 takes 4.4 us, generated 4.1)."""
HOST_LIBRARY, HOST_GENERATED = 12e-6, 2.7e-6
"""Seconds that the host needs to issue a product (chains of 8 and 40 of them in one native call, beside an H200; 15 and 4.5 beside an H100): the
device cannot be faster, unless launches are replayed, or the host is early anyway."""
OTHERS = 1
"""Generated kernels that a program is reckoned to have for each product."""
HEAVY = 1.6e-12 * 132
"""Seconds times multiprocessors for one erf in the epilogue of a product: registers are full there, and nothing hides it."""
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
GENERATED_SHARE = {"bf16": 0.68, "f16": 0.68, "tf32": 0.40, "f32": 0.30, "f64": 0.10}
MEMORY_SHARE = 0.9
TILE = 64
"""Rows and columns of the tiles of which the library has enough for every multiprocessor."""
WIDE = 128
"""Those of generated products whose operands have more than 16 bits."""


@dataclass(frozen=True)
class Work:
    """A product: the type it computes in, (batch, m, n, k), the width of its result, whether a pointwise op alone reads that (and would be
    fused into a generated kernel), how much that op computes per element, in units of one erf, and whether launches are replayed."""

    kind: str
    sizes: tuple[int, ...]
    result_bytes: int
    fused: bool = False
    heavy: float = 0.0
    replayed: bool = False

    @property
    def elements(self) -> int:
        batch, m, n, _ = self.sizes
        return batch * m * n


TURNED_SHARE = 0.17
"""What a generated kernel reaches whose operand is contiguous along neither the summed dimensions nor one walk of the others (H100)."""


def memory_rate(target: Target) -> float:
    """Bytes/s that kernels reach."""
    return MEMORY_SHARE * _rates(target).bandwidth


def peak_rate(target: Target, kind: str, library: bool = False) -> float:
    """FLOP/s that generated kernels (or the library's) reach on the whole device, by the type in which they compute."""
    known = kind if kind in GENERATED_SHARE else "f32"
    return (LIBRARY_SHARE if library else GENERATED_SHARE)[known] * _rates(target).flops[known] * max(1, target.multiprocessors)


def turning_pays(target: Target, kind: str, flops: float, moved: float) -> bool:
    """Whether copying `moved` bytes (read and written) costs less than computing at `TURNED_SHARE` instead of by the library."""
    rates = _rates(target)
    peak = rates.flops[kind] * max(1, target.multiprocessors)
    return flops / peak * (1 / TURNED_SHARE - 1 / LIBRARY_SHARE[kind]) > LAUNCH + moved / (MEMORY_SHARE * rates.bandwidth)


def library_seconds(target: Target, work: Work) -> float:
    """By cuBLASLt; a pointwise reader then reads the result from memory."""
    extra = LAUNCH + 2 * work.elements * work.result_bytes / (MEMORY_SHARE * _rates(target).bandwidth) if work.fused else 0.0
    batch, m, n, _ = work.sizes
    processors = max(1, target.multiprocessors)
    tiles = batch * -(-m // TILE) * -(-n // TILE)
    busy = min(8.0, -(-tiles // processors) * processors / max(1, tiles))  # multiprocessors that wait for the last tiles count as busy
    made = LIBRARY_LAUNCH + _product(target, work, LIBRARY_SHARE[work.kind], busy)
    return max(made, 0 if work.replayed else HOST_LIBRARY) + extra


def generated_seconds(target: Target, work: Work) -> float:
    """By a generated kernel, its pointwise reader fused."""
    extra = work.heavy * work.elements * HEAVY / max(1, target.multiprocessors) if work.fused else 0.0
    batch, m, n, _ = work.sizes
    processors = max(1, target.multiprocessors)
    if BYTES[work.kind] == 2:
        return max(_in_tiles(target, work, processors), 0 if work.replayed else HOST_GENERATED) + extra
    tiles = batch * -(-m // WIDE) * -(-n // WIDE)
    whole = WIDE * WIDE * -(-tiles // processors) * processors / max(1, work.elements)  # whole tiles, and multiprocessors that wait, count as busy
    made = LAUNCH + _product(target, work, GENERATED_SHARE[work.kind], min(whole, 8.0))
    return max(made, 0 if work.replayed else HOST_GENERATED) + extra


def _in_tiles(target: Target, work: Work, processors: int) -> float:
    """By the tile that a kernel of 16-bit operands takes, perhaps in parts whose sums its reader adds up."""
    batch, m, n, k = work.sizes
    tile = gemm_tile_gpu(target, batch, m, n, k, 2, heavy=work.heavy > 0)
    parts = _parts(work, tile.programs(batch, m, n), processors)
    if parts == 1:
        return product_seconds(target, (batch, m, n, k), tile, stored=work.result_bytes)
    made = product_seconds(target, (batch * parts, m, n, k // parts), gemm_tile_gpu(target, batch * parts, m, n, k // parts, 2), stored=4)
    return made + 8 * parts * work.elements / (MEMORY_SHARE * _rates(target).bandwidth)


def host_is_early(target: Target, works: Sequence[Work]) -> bool:
    """The device is busy for longer with these products than the host with issuing them by the library, and what else there is: what a call costs the
    host is hidden behind the products in front of it."""
    device = sum(min(library_seconds(target, w), generated_seconds(target, w)) for w in (replace(w, replayed=True) for w in works))
    return device > len(works) * (HOST_LIBRARY + OTHERS * HOST_GENERATED)


PARTS, LEAST = 8, 256
"""Most parts that the model reckons with, and the least that each of them sums."""


def _parts(work: Work, tiles: int, processors: int) -> int:
    """Into how many parts `split-reductions` takes the sum of a product of few tiles (16 bits; it does not so for others that keep a reader)."""
    batch, m, n, k = work.sizes
    if 2 * tiles > processors:
        return 1
    affordable = batch * (m * k + k * n) * BYTES[work.kind] // max(1, 8 * work.elements)
    return max(1, min(-(-2 * processors // tiles), PARTS, k // LEAST, affordable))


def unpack_seconds(target: Target, read: int, made: int) -> float:
    """A kernel of its own that makes an operand for the library, of `made` bytes, from `read` bytes."""
    return LAUNCH + (read + made) / (MEMORY_SHARE * _rates(target).bandwidth)


def _product(target: Target, work: Work, share: float, busy: float) -> float:
    """Seconds on the device without the launch, where every operation counts as `busy`."""
    batch, m, n, k = work.sizes
    rates = _rates(target)
    compute = 2.0 * work.elements * k * busy / (share * rates.flops[work.kind] * max(1, target.multiprocessors))
    moved = batch * (m * k + k * n) * BYTES[work.kind] + work.elements * work.result_bytes
    return max(compute, moved / (MEMORY_SHARE * rates.bandwidth))


def _rates(target: Target) -> _Rates:
    """Those of the newest generation that is not newer than the target."""
    return RATES[max((c for c in RATES if c <= target.capability), default=min(RATES))]
