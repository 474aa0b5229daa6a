"""The model of products in tiles: what a multiprocessor holds, waves, stages, and what it takes for shapes that were measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
from aicc.ir import Target
from aicc.passes.tiling.gpu_tile_cost import product_seconds, residents
from aicc.passes.tiling.gpu_tiles import GpuTile, gemm_tiles_gpu

H200 = Target(kind="cuda", name="sm_90", capability=90, multiprocessors=132, l2=60 << 20)
A100 = Target(kind="cuda", name="sm_80", capability=80, multiprocessors=108, l2=40 << 20)


def test_shared_memory_and_registers_bound_what_a_multiprocessor_holds() -> None:
    small = GpuTile(64, 128, 64, 4, 3)
    assert residents(H200, small) == 3 and residents(H200, replace(small, stages=4)) == 2, "24 KiB a stage, of 227"
    assert residents(H200, GpuTile(128, 256, 64, 8, 3)) == 1
    assert residents(H200, GpuTile(64, 64, 64, 4, 2)) == 5, "96 registers of 128 threads each, of 65536"
    assert residents(A100, small) == 2 and residents(H200, small, products=2) == 1


def test_the_busiest_multiprocessor_counts() -> None:
    tile = GpuTile(128, 256, 64, 8, 3)
    half, full, over = (product_seconds(H200, (1, m, 11 * 256, 2048), tile) for m in (768, 1536, 1537))  # 66, 132 and 143 tiles
    assert half == pytest.approx(full, rel=0.01) and over > 1.7 * full


def test_a_turned_tile_covers_the_transpose() -> None:
    tile, turned = GpuTile(64, 32, 128, 4, 4), GpuTile(64, 32, 128, 4, 4, True)
    assert product_seconds(H200, (1, 4096, 32, 1024), tile) == pytest.approx(product_seconds(H200, (1, 32, 4096, 1024), turned))
    assert turned.programs(2, 32, 4096) == 128 and turned.result == (32, 64)


def test_loads_ahead_hide_memory_where_a_program_is_alone() -> None:
    """512x4096x4096 in 128 tiles: 34 us with three stages and 27 with four (H200)."""
    three, four = (product_seconds(H200, (1, 512, 4096, 4096), GpuTile(128, 128, 64, 8, s)) for s in (3, 4))
    assert three > 1.1 * four


MEASURED = {  # microseconds on an H200, `gpu_tile_fit.py`; none of these shapes was fitted to
    (1, 256, 768, 768): {(64, 32, 128, 4, 4): 2.93, (64, 64, 128, 4, 3): 3.20, (64, 64, 128, 4, 4): 3.21, (64, 32, 128, 4, 3): 3.03},
    (1, 4096, 768, 768): {(64, 128, 64, 4, 3): 9.88, (128, 128, 64, 8, 3): 10.44, (128, 64, 64, 4, 3): 10.82, (128, 256, 64, 8, 3): 11.5},
    (1, 300, 2304, 768): {(64, 128, 64, 4, 4): 4.83, (64, 128, 64, 4, 3): 5.12, (64, 64, 64, 4, 4): 5.52, (64, 64, 64, 4, 3): 5.56},
    (1, 512, 4096, 4096): {(128, 128, 64, 8, 4): 27.56, (128, 128, 64, 4, 4): 26.99, (128, 128, 64, 8, 3): 34.26},
}


@pytest.mark.parametrize("shape", MEASURED)
def test_the_choice_is_within_a_twentieth_of_the_best(shape: tuple[int, int, int, int]) -> None:
    chosen = gemm_tiles_gpu(H200, *shape, 2)[0]
    times = MEASURED[shape]
    assert times[(chosen.rows, chosen.columns, chosen.step, chosen.warps, chosen.stages)] < 1.05 * min(times.values()), chosen


def test_only_packed_weights_and_older_units_take_flat_tiles() -> None:
    """Hopper's matrix units take 64 rows."""
    assert all(t.rows >= 64 for t in gemm_tiles_gpu(H200, 1, 32, 4096, 4096, 2)) and gemm_tiles_gpu(H200, 1, 32, 4096, 4096, 2)[0].turned
    assert min(t.rows for t in gemm_tiles_gpu(H200, 1, 32, 4096, 4096, 2, stored=1)) < 64
    assert not any(t.turned for t in gemm_tiles_gpu(A100, 1, 32, 4096, 4096, 2))


@pytest.mark.parametrize(("m", "n", "k", "rows", "columns"), [(200704, 64, 64, 128, 64), (200704, 64, 576, 128, 64), (50176, 128, 1152, 128, 128),
                                                            (200704, 256, 64, 128, 128), (50176, 512, 256, 128, 128), (4096, 4096, 4096, 128, 256), (8192, 1024, 4096, 128, 256)])
def test_beyond_what_was_fitted_large_tiles_are_taken(m: int, n: int, k: int, rows: int, columns: int) -> None:
    """Layers of ResNet-50, bound by memory: no tile reads the left operand more often than it has to (128x256 was measured to be slower there: 61.8 us
    and 54.9, 40.3 and 36.4). Products of long sums, bound by arithmetic."""
    tile = gemm_tiles_gpu(H200, 1, m, n, k, 2)[0]
    assert (tile.rows, tile.columns) == (rows, columns)


def test_no_tile_is_taken_for_a_bound_that_all_share() -> None:
    """Where memory bounds all tiles, the rest of their work still orders them: 64x32 was taken for being the first of equals."""
    small, large = (product_seconds(H200, (1, 200704, 64, 64), GpuTile(*t)) for t in ((64, 32, 64, 4, 4), (128, 64, 64, 4, 3)))
    assert large < small
    again = product_seconds(H200, (1, 200704, 128, 64), GpuTile(128, 64, 64, 4, 3))
    once = product_seconds(H200, (1, 200704, 128, 64), GpuTile(128, 128, 64, 8, 3))
    assert again > once, "200704 rows do not fit the L2: each column of tiles reads them from memory"
