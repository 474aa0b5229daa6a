"""Programs per multiprocessor against figures of NVIDIA's occupancy calculator, and what `aicc explain` gets of each kernel."""

from __future__ import annotations

from pathlib import Path

import pytest
from aicc.backends.triton.occupancy import occupancy
from aicc.compiler.gpu import kernel_resources

from .cases import CASES, SM90
from .test_compile import compile_all


@pytest.mark.parametrize(("capability", "warps", "registers", "shared", "programs", "limit"), [
    (90, 4, 32, 0, 16, "warps"), (90, 8, 255, 0, 1, "registers"), (90, 8, 128, 0, 2, "registers"), (90, 4, 64, 49152, 4, "shared memory"),
    (90, 1, 16, 0, 32, "blocks"), (80, 8, 64, 0, 4, "registers"), (86, 8, 32, 0, 6, "warps"), (90, 8, 168, 147512, 1, "registers"),
    (90, 4, 100, 227 * 1024, 1, "shared memory")])
def test_occupancy(capability: int, warps: int, registers: int, shared: int, programs: int, limit: str) -> None:
    found = occupancy(capability, warps, registers, shared)
    assert (found.programs, found.limit) == (programs, limit)


def test_every_kernel_says_what_it_takes(tmp_path: Path) -> None:
    function, inputs = CASES["gemm_bf16"].build()
    (compiled,) = compile_all(function, inputs, SM90, tmp_path)
    found = kernel_resources({"cuda": compiled.program}, 90)
    assert found.keys() == compiled.kernels.keys()
    for name, k in compiled.kernels.items():
        row = found[name]
        assert (row["registers"], row["spills"], row["shared"], row["warps"]) == (k.registers, k.spills, k.shared, k.num_warps)
        assert row["programs"] >= 1 and 0 < row["occupancy"] <= 1
