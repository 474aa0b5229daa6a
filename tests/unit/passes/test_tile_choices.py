"""What the models of tiles choose, and the small print of kernels that no result shows: bounds, masks, readings, unrolling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from aicc.ir import Block, BufferType, Builder, Operation, TileType, sym
from aicc.ir.expr import FloorDiv, Mod, free_symbols
from aicc.ir.types import DTYPES
from aicc.passes.tiling import stream_tiles
from aicc.passes.tiling.caching import mark_second_readings
from aicc.passes.tiling.contraction import EVEN, LEAST_TILES, shared_rows
from aicc.passes.tiling.cpu_candidates import CpuTile, contraction_candidates
from aicc.passes.tiling.emit import Emitter
from aicc.passes.tiling.gpu_tiles import _thin_columns, gemm_tiles_gpu
from aicc.passes.tiling.turned import turned
from support.stages import AVX2, AVX512, CUDA, capture, lowered


def power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def kernels(function: Callable[..., Any], *inputs: torch.Tensor, target: Any = CUDA) -> list[Operation]:
    return [op for op in lowered(capture(function, inputs), target).body if op.name == "tile.kernel"]


# -- the models' choices


def test_tiles_of_streams_are_such_as_triton_takes() -> None:
    for rows, steps, warps, stages in (*stream_tiles.FEW, *stream_tiles.MANY):
        assert all(map(power_of_two, (rows, steps, warps))) and min(rows, steps) >= 16 and warps <= 8 and 1 <= stages <= 4


def test_streams_of_few_programs_take_fewer_rows() -> None:
    """As many programs as multiprocessors, if rows allow; never more programs than that for the sake of it, nor fewer rows than 16."""
    assert stream_tiles.spread_rows(CUDA, 128, 128, 12) == 16
    assert stream_tiles.spread_rows(CUDA, 128, 512, 12) == 64
    assert stream_tiles.spread_rows(CUDA, 128, 128, 16 * 32) == 128 and stream_tiles.spread_rows(CUDA, 64, 16, 1) == 16


@pytest.mark.parametrize("target", [AVX2, AVX512], ids=lambda t: t.name)
def test_candidates_of_products(target: Any) -> None:
    """The model's own first, without limits of its own; no other height where the product has one row, and none that registers do not hold."""
    product = Operation.create("tensor.generic")  # only its packing is read, and it has none
    assert contraction_candidates(product, (4, 16, 1), target)[0] == CpuTile(4, 16, 0, 0, 0)
    assert {c.rows for c in contraction_candidates(product, (1, 16, 1), target, few=False)} == {1}
    assert {c.rows for c in contraction_candidates(product, (1, 16, 1), target)} == {1}
    several = {c.rows for c in contraction_candidates(product, (4, 16, 1), target, few=False)}
    assert 4 in several and len(several) > 1 and max(several) <= (14 if target.vector_registers >= 32 else 6)


@pytest.mark.parametrize("m", [1, 6, 17, 32, 49, 196, 200, 784, 12544])
@pytest.mark.parametrize("others", [1, 2, 5, 9, 17])
def test_programs_of_a_product_are_even_for_two_threads(m: int, others: int) -> None:
    """Or many, or each has few tiles of rows already; never more rows than before, and no rows cut that need not be."""
    mr, before = 6, 198
    rows = shared_rows(m, before, mr, others)
    assert rows <= before and (rows == before or rows % mr == 0)
    programs = others * -(-m // rows)
    assert programs % 2 == 0 or programs >= EVEN or rows == before
    if rows == before and others % 2 and others * -(-m // before) < EVEN and -(-m // before) % 2:
        assert -(-m // mr) // (-(-m // before) + 1) < LEAST_TILES
    if others * -(-m // before) % 2 == 0 or others >= EVEN:
        assert rows == before
    assert shared_rows(sym("s0"), before, mr, others) == before == shared_rows(m, before, mr, sym("s1"))


def test_few_columns_are_shared_by_rows() -> None:
    """196 rows by 64 columns, a layer of MobileNetV2, were one program: work for one thread."""
    x, w = torch.randn(196, 384), torch.randn(384, 64)
    kernel = next(k for k in kernels(lambda x, w: x @ w, x, w, target=AVX512) if any(op.name == "tile.dot" for op in k.walk()))
    assert kernel["grid"][0] * kernel["grid"][1] % 2 == 0, kernel["grid"]


def test_columns_of_thin_products_are_powers_of_two() -> None:
    assert _thin_columns(CUDA, 1, 64 * 132) == 64  # each multiprocessor reads one block of 64
    assert _thin_columns(CUDA, 1, 16 * 132) == 16
    assert all(_thin_columns(CUDA, b, n) in (16, 32, 64) for b in (1, 3) for n in (16, 1000, 4096, 11008, 100_000))


def test_few_rows_go_to_the_columns_of_hoppers_matrix_units() -> None:
    """Those take 64 rows at a time: the weight's. A program that has a multiprocessor to itself asks for more at once; not where numbers are packed."""
    alone, shared = (gemm_tiles_gpu(CUDA, 1, 16, n, 4096, 2)[0] for n in (4096, 11008))
    assert (alone.rows, alone.columns, alone.turned) == (shared.rows, shared.columns, shared.turned) == (64, 16, True)
    assert alone.stages > shared.stages and alone.programs(1, 16, 4096) == 64 and shared.programs(1, 16, 11008) == 172
    assert not gemm_tiles_gpu(CUDA, 1, 16, 4096, 4096, 2, stored=1)[0].turned
    assert not gemm_tiles_gpu(replace(CUDA, capability=80), 1, 16, 4096, 4096, 2)[0].turned
    assert not gemm_tiles_gpu(CUDA, 1, 65, 4096, 4096, 2)[0].turned


@pytest.mark.parametrize(("columns", "parts"), [(4096, 2), (2048, 4), (6144, 1), (11008, 1)])
def test_few_rows_are_summed_in_as_many_parts_as_fill_the_multiprocessors(columns: int, parts: int) -> None:
    grids = [k["grid"] for k in kernels(torch.nn.functional.linear, torch.randn(16, 4096).bfloat16(), torch.randn(columns, 4096).bfloat16())]
    assert grids[0] == ((parts, columns // 64, 1) if parts > 1 else (columns // 64, 1)), grids


def test_tiles_of_products_are_not_larger_than_the_product() -> None:
    for m, n in ((64, 4096), (4096, 32), (48, 48), (4096, 4096)):
        tiles = gemm_tiles_gpu(CUDA, 1, m, n, 1024, 2)
        most_rows, most_columns = (1 << (x - 1).bit_length() for x in (m, n))
        assert max(t.rows for t in tiles) == min(most_rows, 128) and max(t.columns for t in tiles) == min(most_columns, 256), (m, n, tiles)


@pytest.mark.parametrize(("elements", "width"), [(100, 128), (128, 128), (129, 256), (3, 4), (5000, 1024)])
def test_a_pointwise_tile_is_the_power_of_two_that_holds_the_elements(elements: int, width: int) -> None:
    (kernel,) = kernels(lambda x: x + 1, torch.randn(elements))
    (load,) = (op for op in kernel.walk() if op.name == "tile.load")
    assert load["shape"][-1] == width


# -- what kernels say of themselves


def test_one_iteration_at_a_time_is_not_called_unrolled() -> None:
    block = Block([])
    e = Emitter(Builder(block), (1, 1), {})
    for unroll, said in ((1, None), (4, 4)):
        e.loop(0, 8, 1, [], lambda inner, i, carried: [], unroll=unroll)
        assert block.last is not None and block.last.attributes.get("unroll") == said


def test_programs_of_a_grouped_grid_stay_inside() -> None:
    """Whole tiles need no masks, also where the numbers of rows and columns are found from one program number."""
    (kernel,) = kernels(torch.matmul, torch.randn(1024, 64).bfloat16(), torch.randn(64, 1024).bfloat16())
    assert len(kernel["grid"]) == 1, "the grid is grouped"
    assert [op["mask"] for op in kernel.walk() if op.name in ("tile.load", "tile.store")] and not any(
        op["mask"] for op in kernel.walk() if op.name in ("tile.load", "tile.store")), kernel


def test_a_row_read_three_times_is_dropped_at_the_last() -> None:
    shape, buffer = TileType((1, 8), DTYPES["f32"]), BufferType((64,), DTYPES["f32"])
    kernel = Block([buffer])
    e = Emitter(Builder(kernel), (1, 8), {})
    for _ in range(3):
        def body(inner: Emitter, i: Any, carried: list[Any]) -> list[Any]:
            inner.builder.create("tile.load", [kernel.args[0]], {"offset": sym("t1"), "shape": (1, 8)}, [shape])
            return []
        e.loop(0, 8, 1, [], body)
    mark_second_readings(kernel)
    assert [op.attributes["evict"] for loop in kernel for op in loop.walk() if op.name == "tile.load"] == ["last", "last", "first"]


def test_a_running_result_is_stored_once() -> None:
    """Its tile is one row high, and as wide as the positions that the store tells apart: more would store everything twice."""
    for function, shape in ((lambda x: x.cumsum(0), (300, 64)), (lambda x: x.cumprod(-1), (4, 64)), (lambda x: x.logcumsumexp(0), (300, 64))):
        stores = [op for k in kernels(function, torch.rand(*shape), target=AVX2) for op in k.walk() if op.name == "tile.store"]
        assert stores
        for op in stores:
            tile = next(v.type.shape for v in op.operands if isinstance(v.type, TileType))
            assert all(f"t{i}" in free_symbols(op["offset"]) for i, n in enumerate(tile) if n > 1), op


# -- tiles that are read both ways round

LOADS = {"offset": sym("i") * 64 + sym("t0") * 64 + sym("t1"), "shape": (16, 32), "mask": ((sym("t0"), sym("s")),)}
MIRRORED = {"offset": sym("i") * 64 + sym("t1") * 64 + sym("t0"), "shape": (32, 16), "mask": ((sym("t1"), sym("s")),)}


@pytest.mark.parametrize(("change", "is_turned"), [
    ({}, True), ({"shape": (16, 32)}, False), ({"mask": ((sym("t0"), sym("s")),)}, False), ({"mask": ((sym("t1"), sym("r")),)}, False),
    ({"mask": ()}, False), ({"offset": sym("i") * 64 + sym("t0") * 64 + sym("t1")}, False), ({"other": 1.0}, False), ({"mask_low": (sym("t1"),)}, False)])
def test_only_the_mirror_of_a_load_is_its_transposition(change: dict[str, Any], is_turned: bool) -> None:
    buffer = BufferType((4096,), DTYPES["f32"])
    block = Block([buffer])
    b = Builder(block)
    first, second = (b.create("tile.load", [block.args[0]], attrs, [TileType(attrs["shape"], DTYPES["f32"])]).result
                     for attrs in (LOADS, {**MIRRORED, **change}))
    got = turned(b, second, [first])
    assert (got.defining_op is not None and got.defining_op.name == "tile.transpose") == is_turned
    assert sum(op.name == "tile.load" for op in block) == 2 - is_turned


# -- tiles of convolutions


def test_a_tile_within_a_line_of_the_image_has_one_address() -> None:
    """Fourteen positions of a line of 56: their places differ by constants. All tiles are whole, so no row is masked."""
    kernel = kernels(lambda x, w: F.conv2d(x, w, stride=2, padding=1), torch.randn(1, 3, 112, 112), torch.randn(32, 3, 3, 3), target=AVX512)[-1]
    (left,) = (op for op in kernel.walk() if op.name == "tile.load" and op.result.type.shape == (14, 1))
    assert all("t0" not in free_symbols(d) for d in divisions(left["offset"]))
    assert all(not op.attributes.get("mask") for op in kernel.walk() if op.name == "tile.store")


def test_a_tile_across_lines_has_an_address_for_each_row() -> None:
    kernel = kernels(lambda x, w: F.conv2d(x, w, stride=2, padding=1), torch.randn(1, 3, 100, 100), torch.randn(32, 3, 3, 3), target=AVX512)[-1]
    (left,) = (op for op in kernel.walk() if op.name == "tile.load" and op.result.type.shape == (14, 1))
    assert any("t0" in free_symbols(d) for d in divisions(left["offset"]))


def divisions(e: Any) -> list[Any]:
    """What is divided in an expression."""
    return [a.args[0] for m, _ in e.terms for a in m if isinstance(a, (FloorDiv, Mod))]


@pytest.mark.parametrize(("n", "columns"), [(24, 24), (20, 20), (40, 40), (28, 32), (22, 32), (16, 16), (8, 8), (48, 48)])
def test_half_of_the_last_vector_is_left_out(n: int, columns: int) -> None:
    kernel = kernels(torch.mm, torch.randn(280, 96), torch.randn(96, n), target=AVX512)[-1]
    assert {op.result.type.shape[1] for op in kernel.walk() if op.name == "tile.dot"} == {columns}


# -- values that are kept between stages


def test_a_long_row_is_kept_only_where_there_is_room() -> None:
    """`y` is needed after its sum is known; the only result of the kernel has one element a row: no place for a row."""
    def f(x: torch.Tensor) -> torch.Tensor:
        y = (x / x.exp().sum(-1, keepdim=True)).exp()
        return (y * y.sum(-1, keepdim=True)).sum(-1)
    (kernel,) = kernels(f, torch.randn(2, 60_000), target=AVX2)
    (store,) = (op for op in kernel.walk() if op.name == "tile.store")
    assert store.operands[0].type == BufferType((2,), DTYPES["f32"]), "nothing but the two sums is stored"


def test_one_number_of_a_row_is_no_row_to_keep() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        t = torch.rsqrt((x * x).mean(-1, keepdim=True) + 1)
        return x * (t * (x * t).exp().sum(-1, keepdim=True))
    (kernel,) = kernels(f, torch.randn(8, 512), target=AVX2)
    kept = [op.result.type.shape for op in kernel.walk() if op.name == "tile.alloca"]
    assert len(kept) <= 1, kept
