"""The roofline's arithmetic, and that a program run launch by launch gives its results and a time for each launch."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from aicc.backends.llvm import host_target
from aicc.benchmarks.roofline import Point, Roof, plot, profile, table
from aicc.benchmarks.vector_work import function_instructions, vector_instructions
from aicc.compiler.driver import watching
from aicc.ir import Operation

ROOF = Roof(peak=100e9, bandwidth=20e9)


def test_arithmetic() -> None:
    assert ROOF.ridge == 5
    assert ROOF.seconds(100e9, 1) == 1 and ROOF.seconds(1, 40e9) == 2
    add = Point("add", 2, flops=10**6, bytes=12 * 10**6, seconds=1.2e-3)
    assert add.intensity == pytest.approx(1 / 12) and add.limit(ROOF) == "memory"
    assert add.percent(ROOF) == pytest.approx(50)  # 12 MB at 20 GB/s are 0.6 ms
    product = Point("matmul", 1, flops=10**9, bytes=10**7, seconds=12.5e-3)
    assert product.limit(ROOF) == "compute" and product.percent(ROOF) == pytest.approx(80)
    lines = table([product, add], ROOF)
    assert "80%" in lines[1] and "50%" in lines[2]
    assert "77%" in lines[3]  # 10.6 of 13.7 ms


def test_profile_of_a_program() -> None:
    """Two kernels of known size; a parameter that is packed once is no launch of a call."""
    layer, x = torch.nn.Linear(256, 512, bias=False), torch.randn(64, 256)
    points = profile(lambda x: layer(x).softmax(-1), (x,), 2)
    assert sum(p.launches for p in points) == len(points)
    product = next(p for p in points if "matmul" in p.name)
    assert product.flops == 2 * 64 * 256 * 512
    assert product.bytes >= 4 * (64 * 256 + 256 * 512 + 64 * 512)
    assert all(p.seconds > 0 for p in points)


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_plot(tmp_path: Path) -> None:
    plot({"case": [Point("add", 1, 10**6, 10**7, 1e-3)]}, ROOF, tmp_path / "roof.png")
    assert (tmp_path / "roof.png").stat().st_size > 1000


def test_the_limit_has_a_name() -> None:
    """Reading alone may be slower than the copy's bytes, and an exponential is not one instruction."""
    roof = Roof(peak=100e9, bandwidth=30e9, read=16e9, instructions=6e9)
    total = Point("sum", 1, 0, 16 * 10**6, 2e-3, read=16 * 10**6, instructions=10**6)
    assert total.limit(roof) == "read" and total.percent(roof) == pytest.approx(50)
    gelu = Point("gelu", 1, 0, 6 * 10**6, 10e-3, read=3 * 10**6, instructions=48 * 10**6)
    assert gelu.limit(roof) == "vector" and gelu.percent(roof) == pytest.approx(80)
    assert Point("copy", 1, 0, 3 * 10**7, 1e-3, read=15 * 10**6).limit(roof) == "memory"


def test_vector_instructions() -> None:
    """Of sixteen registers: one each for a sum, and an exponential as many as its code has."""
    target = host_target()
    n = 16 * target.lanes(32)
    counts = {}
    for name, function in (("add", lambda x: x + x), ("exp", lambda x: x.exp())):
        torch._dynamo.reset()
        kernels: list[Operation] = []

        def observe(stage: str, p: Any, module: Operation) -> None:
            if stage == "tile" and p is None:
                kernels.extend(op.clone() for op in module.body if op.name == "tile.kernel")  # noqa: B023
        with watching(observe), torch.no_grad():
            torch.compile(function, backend="aicc", options={"strict": True, "cache": False})(torch.randn(n))
        counts[name] = sum(vector_instructions(k, target) for k in kernels)
    assert counts["add"] == 16
    each = function_instructions("exp", 1, target.lanes(32), frozenset(target.features), False)
    assert 10 <= each <= 30 and counts["exp"] == 16 * each
