"""Measured tiles on CPUs: every candidate is right, the fastest is used, noise changes nothing, and what was found is remembered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from aicc.compiler.autotune import Tuner, tune_tiles
from aicc.compiler.autotune_cpu import _compiled, measure_on_cpu
from aicc.compiler.driver import Compilation, cpu_target, watching
from aicc.compiler.options import Options
from aicc.compiler.pipelines import pipeline
from aicc.frontend.importer import import_graph
from aicc.ir import Operation
from aicc.ir.passes import PassContext, parse_pipeline, run_pipeline
from aicc.passes.tiling.cpu_candidates import CpuTile
from aicc.passes.tiling.lower import candidate_tiles_cpu
from torch import fx

OPTIONS = Options()
TARGET = cpu_target(OPTIONS)


def _group(function: Callable[..., Any], *inputs: torch.Tensor) -> tuple[Operation, Operation]:
    """The tensor-level module of a function, and its largest fused group."""
    module = import_graph(fx.experimental.proxy_tensor.make_fx(function)(*inputs))
    for stage in ("graph", "tensor"):
        run_pipeline(module, parse_pipeline(pipeline(stage, TARGET, OPTIONS)), PassContext(TARGET))
    return module, max((op for op in module.walk() if op.name == "tensor.fused"), key=lambda op: len(op.operands))


CASES = {
    "product": (lambda a, b, c: F.gelu(torch.addmm(c, a, b)), ((70, 600), (600, 64), (64,))),
    "pointwise": (lambda a, b: torch.tanh(a) * b, ((300, 257), (300, 257))),
    "row_reduction": (lambda a, b: (a + b).softmax(-1), ((33, 1000), (33, 1000))),
    "column_reduction": (lambda a, b: (a * b).sum(0), ((200, 333), (200, 333))),
    "stream": (lambda q, k, v: (q @ k.transpose(-1, -2)).softmax(-1) @ v, ((2, 130, 32), (2, 150, 32), (2, 150, 32))),
}


@pytest.mark.parametrize("name", CASES)
def test_every_candidate_computes_the_same(name: str) -> None:
    function, shapes = CASES[name]
    torch.manual_seed(0)
    inputs = [torch.randn(s) for s in shapes]
    _, group = _group(lambda *a: (function(*a),), *inputs)
    tiles = candidate_tiles_cpu(group, TARGET)
    assert len(tiles) >= 2 and len(set(tiles)) == len(tiles)
    given = [torch.randn(tuple(v.type.shape)) for v in group.operands]  # type: ignore[attr-defined]
    ctx = PassContext(TARGET)
    first = _compiled(group, tiles[0], ctx, OPTIONS)(*given)
    assert not group["tile"], "trying tiles leaves no mark"
    for tile in tiles[1:]:
        for found, expected in zip(_compiled(group, tile, ctx, OPTIONS)(*given), first, strict=True):
            torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5, msg=lambda m, tile=tile: f"{tile}: {m}")


def test_the_exhaustive_list_contains_the_short_one() -> None:
    for name in ("product", "pointwise"):
        function, shapes = CASES[name]
        _, group = _group(lambda *a, function=function: (function(*a),), *(torch.randn(s) for s in shapes))
        every = candidate_tiles_cpu(group, TARGET, few=False)
        assert len(every) > len(candidate_tiles_cpu(group, TARGET)) and every[0] == candidate_tiles_cpu(group, TARGET)[0]


def _fixed(times: Sequence[float], asked: list[int]) -> Any:
    def measure(fused: Operation, tiles: Sequence[CpuTile], ctx: PassContext, options: Options) -> list[float]:
        asked.append(len(tiles))
        return [*times, *[9.0] * len(tiles)][:len(tiles)]

    return measure


def _product() -> tuple[Operation, Operation]:
    function, _ = CASES["product"]
    return _group(lambda *a: (function(*a),), torch.randn(130, 600), torch.randn(600, 64), torch.randn(64))


def test_the_fastest_is_used_and_remembered(tmp_path: Path) -> None:
    asked: list[int] = []
    for _ in range(2):  # two processes, as it were
        module, group = _product()
        tune_tiles(module, PassContext(TARGET), Tuner(OPTIONS, tmp_path, _fixed((1.0, 0.5), asked)))
        assert group["tile"] == astuple(candidate_tiles_cpu(group, TARGET)[1])
        run_pipeline(module, parse_pipeline(pipeline("tile", TARGET, OPTIONS)), PassContext(TARGET))
    assert len([n for n in asked if n]) == len(asked) <= 2


def test_noise_does_not_change_the_choice(tmp_path: Path) -> None:
    module, group = _product()
    tune_tiles(module, PassContext(TARGET), Tuner(OPTIONS, tmp_path, _fixed((1.0, 0.99), [])))
    assert group["tile"] == astuple(candidate_tiles_cpu(group, TARGET)[0])


def test_equal_groups_of_different_layers_are_measured_once(tmp_path: Path) -> None:
    asked: list[int] = []
    a, w, v = torch.randn(130, 600), torch.randn(600, 600), torch.randn(600, 600)
    module, _ = _group(lambda a, w, v: (torch.relu(torch.relu(a @ w) @ v),), a, w, v)
    assert sum(op.name == "tensor.fused" and len(op.operands) == 2 for op in module.walk()) == 2
    tune_tiles(module, PassContext(TARGET), Tuner(OPTIONS, tmp_path, _fixed((1.0, 0.5), asked)))
    products = [op["tile"] for op in module.walk() if op.name == "tensor.fused" and len(op.operands) == 2]
    assert products[0] == products[1] != () and len(list((tmp_path / "tiles").glob("*.json"))) == len(asked)


def test_the_number_of_threads_is_part_of_what_is_remembered(tmp_path: Path) -> None:
    asked: list[int] = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            module, _ = _product()
            tune_tiles(module, PassContext(TARGET), Tuner(OPTIONS, tmp_path, _fixed((1.0, 0.5), asked)))
    finally:
        torch.set_num_threads(threads)
    assert len(asked) >= 2


def test_measured_on_this_machine() -> None:
    _, group = _group(lambda a, b: (a + b,), torch.randn(64, 1000), torch.randn(64, 1000))
    tiles = candidate_tiles_cpu(group, TARGET)[:2]
    times = measure_on_cpu(group, tiles, PassContext(TARGET), OPTIONS)
    assert len(times) == 2 and all(0 < t < 1e3 for t in times)


def test_max_autotune_through_torch_compile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AICC_CACHE_DIR", str(tmp_path))
    seen: list[Compilation] = []
    layer = torch.nn.Linear(256, 256)
    x = torch.randn(64, 256)
    with watching(compiled=seen.append), torch.no_grad():
        result = torch.compile(layer, backend="aicc", mode="max-autotune")(x)
    torch.testing.assert_close(result, layer(x), rtol=1e-4, atol=1e-5)
    assert any("measured with tiles" in r.message for r in seen[0].remarks)
    assert list((tmp_path / "tiles").glob("*.json"))
