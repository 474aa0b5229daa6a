"""Tiles that are measured: which candidates there are, that the fastest is used, and that it is remembered."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from aicc.backends.triton import compile_gpu
from aicc.compiler.autotune import Tuner, candidate_module, tune_tiles
from aicc.compiler.autotune_products import tune_products
from aicc.compiler.options import Options
from aicc.compiler.pipelines import pipeline
from aicc.frontend.importer import import_graph
from aicc.ir import Operation
from aicc.ir.passes import PassContext, parse_pipeline, run_pipeline
from aicc.ir.verifier import verify
from aicc.passes.tiling.gpu_tiles import GpuTile
from aicc.passes.tiling.lower import candidate_tiles
from torch import fx

from .cases import SM90

OPTIONS = Options()


def _module() -> Operation:
    """relu(a @ b) and the same again: two equal groups."""
    def f(a: Any, b: Any) -> Any:
        return (torch.relu(torch.ops.aten.mm.default(a, b)),)

    gm = fx.experimental.proxy_tensor.make_fx(f)(torch.empty(300, 64, dtype=torch.bfloat16), torch.empty(64, 520, dtype=torch.bfloat16))
    module = import_graph(gm)
    for stage in ("graph", "tensor"):
        run_pipeline(module, parse_pipeline(pipeline(stage, SM90, OPTIONS)), PassContext(SM90))
    return module


def _group(module: Operation) -> Operation:
    return next(op for op in module.walk() if op.name == "tensor.fused")


def _second_is_best(asked: list[int]) -> Any:
    def measure(fused: Operation, tiles: Sequence[GpuTile], ctx: PassContext, options: Options) -> list[float]:
        asked.append(len(tiles))
        return [1.0 if i != 1 else 0.5 for i in range(len(tiles))]

    return measure


def test_the_fastest_tile_is_used_and_remembered(tmp_path: Path) -> None:
    asked: list[int] = []
    for _ in range(2):  # two processes, as it were
        module = _module()
        tiles = candidate_tiles(_group(module), SM90)
        tune_tiles(module, PassContext(SM90), Tuner(OPTIONS, tmp_path, _second_is_best(asked)))
        group = _group(module)
        assert group["tile"] == dataclasses.astuple(tiles[1])
        run_pipeline(module, parse_pipeline(pipeline("tile", SM90, OPTIONS)), PassContext(SM90))
        dot = next(op for op in module.walk() if op.name == "tile.dot")
        assert dot.result.type.shape == (tiles[1].rows, tiles[1].columns)  # type: ignore[attr-defined]
    assert len(asked) == 1 and asked[0] >= 2


def test_a_damaged_memory_is_measured_again(tmp_path: Path) -> None:
    asked: list[int] = []
    tune_tiles(_module(), PassContext(SM90), Tuner(OPTIONS, tmp_path, _second_is_best(asked)))
    (file,) = (tmp_path / "tiles").glob("*.json")
    file.write_text("[128, 0]")
    tune_tiles(_module(), PassContext(SM90), Tuner(OPTIONS, tmp_path, _second_is_best(asked)))
    assert len(asked) == 2


def test_candidates_compile(tmp_path: Path) -> None:
    module = _module()
    group = _group(module)
    ctx = PassContext(SM90)
    tiles = candidate_tiles(group, SM90)[:2]
    made = candidate_module(group, tiles, ctx)
    verify(made)
    assert not group["tile"]
    run_pipeline(made, parse_pipeline(pipeline("host", SM90, OPTIONS)), ctx)
    assert len(compile_gpu(made, SM90, cache_dir=tmp_path).kernels) == 2


def _attention(rows: int, length: int) -> Operation:
    def f(q: Any, k: Any, v: Any) -> Any:
        scores = torch.ops.aten.bmm.default(q, torch.ops.aten.transpose.int(k, 1, 2))
        return (torch.ops.aten.bmm.default(torch.ops.aten._softmax.default(scores, -1, False), v),)

    inputs = [torch.empty(160, n, 64, dtype=torch.bfloat16) for n in (rows, length, length)]
    module = import_graph(fx.experimental.proxy_tensor.make_fx(f)(*inputs))
    for stage in ("graph", "tensor"):
        run_pipeline(module, parse_pipeline(pipeline(stage, SM90, OPTIONS)), PassContext(SM90))
    return module


@pytest.mark.parametrize(("rows", "length"), [(300, 300), (1, 600)])
def test_tiles_of_attention_are_measured(rows: int, length: int, tmp_path: Path) -> None:
    module = _attention(rows, length)
    group = _group(module)
    tiles = candidate_tiles(group, SM90)
    assert group["why"].startswith("streams") and len(set(tiles)) == len(tiles) > 3
    tune_tiles(module, PassContext(SM90), Tuner(OPTIONS, tmp_path, _second_is_best([])))
    run_pipeline(module, parse_pipeline(pipeline("tile", SM90, OPTIONS)), PassContext(SM90))
    kernel = next(op for op in module.body if op.name == "tile.kernel")
    scores = next(op for op in kernel.walk() if op.name == "tile.dot")
    assert (kernel["num_warps"], kernel["num_stages"]) == (tiles[1].warps, tiles[1].stages)
    assert scores.result.type.shape == (tiles[1].rows, tiles[1].columns)  # type: ignore[attr-defined]
    verify(module)


def test_the_fastest_algorithm_of_a_large_product_is_used_and_remembered(tmp_path: Path) -> None:
    def f(a: Any, b: Any, c: Any) -> Any:
        return torch.ops.aten.mm.default(a, b), torch.ops.aten.mm.default(a, c)

    asked: list[Any] = []

    def measure(row: Any) -> list[float]:
        asked.append(row["sizes"])
        return [1.0, 0.99, 0.9, 1.1] if row["sizes"][2] == 4096 else [1.0, 0.99]
    for _ in range(2):  # two processes, as it were
        bf16 = torch.bfloat16
        gm = fx.experimental.proxy_tensor.make_fx(f, tracing_mode="fake")(
            torch.empty(8192, 1024, dtype=bf16), torch.empty(1024, 4096, dtype=bf16), torch.empty(1024, 2048, dtype=bf16))
        module = import_graph(gm)
        for stage in ("graph", "tensor"):
            run_pipeline(module, parse_pipeline(pipeline(stage, SM90, OPTIONS)), PassContext(SM90))
        tune_products(module, PassContext(SM90), torch.device("cuda", 0), tmp_path, measure)
        for stage in ("tile", "host"):
            run_pipeline(module, parse_pipeline(pipeline(stage, SM90, OPTIONS)), PassContext(SM90))
        shapes = [op["shape"] for op in module.walk() if op.name == "host.library"]
        assert [s.get("guess", 0) for s in shapes] == [2, 0]
    assert asked == [[1, 8192, 4096, 1024], [1, 8192, 2048, 1024]]
