"""How long a product in tiles takes on a GPU: seconds, from what a multiprocessor does with the tiles that it gets.

    product_seconds(target, (batch, m, n, k), tile, stored=2)

A multiprocessor holds several programs at once, as many as registers and shared memory allow. Its tiles cost the larger of
  - work: what all of its tiles together ask of the matrix units, of shared memory and of the path from the L2 cache, and
  - a chain: the programs that run one after another in one place, each with the latency of its first loads, its steps (at best the latency of a
    load over the loads in flight) and its result.
That is wave quantisation: the busiest multiprocessor counts. Reading and writing memory is a bound for all together: an operand that does not fit
half of the L2 cache is read again by each group of programs that run after those that had it.

`COSTS` are fitted by `benchmarks/gpu_tile_fit.py`, to shapes other than those that it prints the regret of.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ...ir import Dim, Target

__all__ = ["COSTS", "Tile", "TileCosts", "costs_of", "product_seconds", "residents", "row_group"]

REGISTERS, SHARED, MOST_WARPS = 65536, {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}, 64
"""Of a multiprocessor: registers, bytes of shared memory for programs, warps."""
WHOLE, ASYNCHRONOUS = 64, 90
"""Rows from which on, and capability from which on, products run by themselves: the operands of one that is under way hold a stage."""
OTHER_REGISTERS = 58
"""Of a thread beside its sums: addresses, counters and pieces of operands (seen: 40 to 80)."""


class Tile(Protocol):
    """What `gpu_tiles.GpuTile` has."""

    @property
    def rows(self) -> int: ...

    @property
    def columns(self) -> int: ...

    @property
    def step(self) -> int: ...

    @property
    def warps(self) -> int: ...

    @property
    def stages(self) -> int: ...

    @property
    def turned(self) -> bool: ...


@dataclass(frozen=True)
class TileCosts:
    """Nanoseconds, and units per nanosecond of one multiprocessor.

    start     launch and end of a kernel
    far       of a load where operands do not fit a third of the L2 cache
    fill      from the start of a program to its first product
    latency   of a load, which the steps ahead share
    turn      of a step by itself: waiting for its operands and for the products
    rate      multiply-adds of the matrix units
    shared    bytes of operands that the matrix units read from shared memory, and that loads write there
    l2        bytes from the L2 cache
    store     bytes of results
    flat      share of `rate` that tiles of 16 and of 32 rows reach (on Hopper: older instructions)
    memory    bytes of the device's memory, for all multiprocessors together (a data sheet's, less a tenth; not fitted)
    """

    start: float
    fill: float
    latency: float
    far: float
    turn: float
    rate: float
    shared: float
    l2: float
    store: float
    flat: tuple[float, float]
    memory: float
    sharpness: float = 4.0
    """How close to the larger of work and chain their sum is (a norm: 1 is the sum, infinity the larger)."""


HOPPER = TileCosts(start=541, fill=194, latency=318, far=886, turn=21, rate=3000, shared=368, l2=108, store=60, flat=(0.12, 0.25), memory=3000,
                   sharpness=7.5)
COSTS = {
    80: TileCosts(start=541, fill=250, latency=400, far=1000, turn=30, rate=980, shared=290, l2=40, store=70, flat=(0.5, 0.8), memory=1700,
                  sharpness=7.5),
    90: HOPPER,
    100: TileCosts(start=541, fill=194, latency=318, far=886, turn=21, rate=5200, shared=400, l2=70, store=90, flat=(0.06, 0.12), memory=7200,
                   sharpness=7.5),
}
"""By compute capability. Only 90 was measured (H200). 80 and 100 are scaled by NVIDIA's data sheets, with the share of the peak that generated
products are reckoned to reach beside a library's (`library_cost.py`)."""


def costs_of(target: Target) -> TileCosts:
    """Those of the newest generation that is not newer than the target."""
    return COSTS[max((c for c in COSTS if c <= target.capability), default=min(COSTS))]


def residents(target: Target, tile: Tile, width: int = 2, products: int = 1) -> int:
    """Programs that a multiprocessor holds at once. `width`: bytes of an operand's element; `products`: of one left operand, side by side."""
    shared = SHARED[max((c for c in SHARED if c <= target.capability), default=min(SHARED))]
    rows, columns = _sides(tile, products)
    bytes_held = (rows + columns) * tile.step * width * max(1, tile.stages) + 1024
    registers = min(255, -(-(tile.rows * tile.columns * products // (32 * tile.warps) + OTHER_REGISTERS) // 8) * 8)
    return max(1, min(shared // bytes_held, REGISTERS // (registers * 32 * tile.warps), MOST_WARPS // tile.warps))


def product_seconds(target: Target, sizes: tuple[int, int, int, int], tile: Tile, *, stored: int = 2, products: int = 1, width: int = 2,
                    costs: TileCosts | None = None) -> float:
    """Seconds of `products` products of one left operand, of batch, m, n, k, as one kernel. `stored`: bytes of an element of the result, `width`: of
    an operand."""
    c = costs or costs_of(target)
    batch, m, n, k = sizes
    processors = max(1, target.multiprocessors)
    rows, columns = _sides(tile, products)
    tiles = batch * (-(-n // tile.rows) * -(-m // tile.columns) if tile.turned else -(-m // tile.rows) * -(-n // tile.columns))
    each = -(-tiles // processors)
    held = min(each, residents(target, tile, width, products))
    steps = -(-k // tile.step)
    rate = c.rate * (c.flat[0 if tile.rows <= 16 else 1] if tile.rows < WHOLE else 1.0)
    multiply = rows * columns * tile.step / rate
    loaded = (rows + columns) * tile.step * width
    # Matrix units take WHOLE rows at a time, and read the columns' operand for each of them again.
    shared = (loaded + (rows + -(-rows // WHOLE) * columns) * tile.step * width) / c.shared
    own = max(multiply, shared, loaded / c.l2)
    result = rows * columns * stored / c.store
    held_bytes = batch * (m * k + products * k * n) * width
    latency = c.latency if 3 * held_bytes <= target.l2 else c.far
    ahead = max(1, tile.stages - 1 - (tile.rows >= WHOLE and target.capability >= ASYNCHRONOUS))
    work = each * (steps * own + result)
    chain = -(-each // held) * (c.fill + steps * max(own + c.turn, latency / ahead) + result)
    blocks = (-(-n // tile.rows), -(-m // tile.columns)) if tile.turned else (-(-m // tile.rows), -(-n // tile.columns))
    left, right = (products * k * n * width, m * k * width) if tile.turned else (m * k * width, products * k * n * width)
    group = row_group(*blocks)
    left *= blocks[1] if group == 1 and 2 * left > target.l2 else 1
    right *= -(-blocks[0] // group) if 2 * right > target.l2 else 1
    moved = batch * (left + right + products * m * n * stored) / c.memory
    return float(c.start + (work**c.sharpness + chain**c.sharpness + moved**c.sharpness) ** (1 / c.sharpness)) * 1e-9


def row_group(blocks_m: Dim, blocks_n: Dim) -> int:
    """Programs that run together cover a block of this many tile rows, so that they share what they read in the L2 cache."""
    if not isinstance(blocks_m, int) or not isinstance(blocks_n, int) or blocks_n < 4:
        return 1
    return next(g for g in (8, 4, 2, 1) if blocks_m % g == 0)


def _sides(tile: Tile, products: int) -> tuple[int, int]:
    """Rows and columns that a step loads: products of one left operand (of one right operand, turned) load it once."""
    return (tile.rows * products, tile.columns) if tile.turned else (tile.rows, tile.columns * products)
