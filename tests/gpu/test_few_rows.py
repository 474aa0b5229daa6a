"""Products of few rows with a ring of tiles under way: which take the form, what it computes (on a model of the machine), and that it compiles."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from aicc.backends.triton import compile_gpu
from aicc.backends.triton.few_rows import print_few_rows
from aicc.backends.triton.printer import KernelSource
from aicc.ir import Operation
from aicc.ir.interpreter import interpret
from aicc.passes.tiling import gpu_tiles
from aicc.passes.tiling.gpu_tiles import gemm_tile_gpu
from torch import Tensor

from .cases import SM80, SM90, capture, error
from .gluon_model import launcher
from .hopper_cases import SMALL_CASES

FEW = dataclasses.replace(SM90, multiprocessors=4)
"""As many as 128 rows of a weight have programs."""


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def gelu(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.gelu(F.linear(x, w, b))


def relu(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, w, b).relu()


def residual(x: Tensor, w: Tensor, r: Tensor) -> Tensor:
    return F.linear(x, w) * 2 + r


FORMS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "linear": (F.linear, (normal(16, 4096), normal(128, 4096))),
    "f16": (F.linear, (normal(16, 512, dtype=torch.float16), normal(128, 512, dtype=torch.float16))),
    "odd steps": (F.linear, (normal(16, 640), normal(128, 640))),
    "relu": (relu, (normal(16, 384), normal(128, 384), normal(128))),
    "ten rows": (residual, (normal(10, 384), normal(128, 384), normal(10, 128))),
    "by columns": (lambda x, w: x @ w, (normal(16, 512), normal(512, 128))),
    "part of a matrix": (lambda x, w: F.linear(x, w[:, 128:]), (normal(16, 384), normal(128, 512))),
}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small products take the form too."""
    monkeypatch.setattr(gpu_tiles, "LONG", 0)


def module_of(f: Callable[..., Tensor], inputs: tuple[Tensor, ...], until: str = "tile", target: Any = FEW) -> tuple[Operation, list[Tensor]]:
    found: list[Any] = []

    def run(module: Operation, gm: torch.fx.GraphModule, args: list[Any]) -> Any:
        found.append((module, args))
        return gm.forward(*args)

    capture(f, inputs, run, until=until, target=target)
    return found[0]


def printed(f: Callable[..., Tensor], inputs: tuple[Tensor, ...], target: Any = FEW, divisible: bool = True) -> KernelSource | str:
    module, _ = module_of(f, inputs, target=target)
    kernel = next(op for op in module.body if op.name == "tile.kernel" and any(x.name == "tile.dot" for x in op.walk()))
    return print_few_rows(kernel, target, [divisible] * len(kernel.body.args))


@pytest.mark.parametrize("name", FORMS)
def test_what_it_computes(name: str) -> None:
    """All is poison until the program has waited, and what is in shared memory beside the tiles always is."""
    f, inputs = FORMS[name]
    module, args = module_of(f, inputs)
    taken: list[KernelSource] = []

    launch = launcher(lambda kernel: print_few_rows(kernel, FEW, [True] * len(kernel.body.args)), taken, lambda _: ())
    got, = interpret(module, args, handlers={"tile.launch": launch})
    assert len(taken) == 1 and taken[0].dependent and taken[0].programs == 4
    assert error(got, f(*(x.double() for x in inputs))) < (6e-3 if inputs[0].dtype == torch.bfloat16 else 2e-3)


@pytest.mark.parametrize(("why", "inputs", "target"), [
    ("Hopper", FORMS["linear"][1], dataclasses.replace(SM80, multiprocessors=4)),
    ("other sizes", (normal(16, 512), normal(256, 512)), FEW),  # eight programs: 64 rows each
    ("other sizes", (normal(32, 512), normal(128, 512)), FEW),
    ("steps that do not divide K", (normal(16, 576), normal(128, 576)), FEW),
])
def test_other_products_are_printed_plainly(why: str, inputs: tuple[Tensor, ...], target: Any) -> None:
    said = printed(F.linear, inputs, target)
    assert isinstance(said, str) and why in said, said


def test_an_operand_that_may_start_anywhere_is_not_copied_by_the_engine() -> None:
    said = printed(*FORMS["linear"], divisible=False)
    assert isinstance(said, str) and "start anywhere" in said


def test_when_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where programs of 32 rows are as many as multiprocessors, and K is long."""
    monkeypatch.undo()
    target = dataclasses.replace(SM90, multiprocessors=132)
    assert gemm_tile_gpu(target, 1, 16, 4096, 11008, 2).result == (16, 32)
    assert gemm_tile_gpu(target, 1, 16, 4096, 2048, 2).result == (16, 64)
    assert gemm_tile_gpu(target, 1, 16, 11008, 11008, 2).result == (16, 64)
    assert gemm_tile_gpu(target, 1, 16, 4096, 11008, 2, row_major=True).result == (16, 32)
    assert gemm_tile_gpu(dataclasses.replace(SM80, multiprocessors=132), 1, 16, 4096, 11008, 2).result[0] == 16


@pytest.mark.parametrize(("f", "name"), [(residual, "ten rows"), (gelu, "relu"), (torch.mm, "by columns")])
def test_it_compiles(f: Callable[..., Tensor], name: str, tmp_path: Path) -> None:
    module, _ = module_of(f, FORMS[name][1], until="host")
    made = compile_gpu(module, FEW, cache_dir=tmp_path)
    (kernel, row), = ((name, row) for name, row in made.program["kernels"].items() if row["descriptors"])
    assert row["dependent"] and row["grid"] == [4] and made.kernels[kernel].spills == 0 and row["threads"] in (160, 256)
    assert [d["box"] for d in row["descriptors"]] == [[32, 64] if name == "by columns" else [64, 32], [64, 16]]


@pytest.mark.parametrize("name", [name for name in SMALL_CASES if name.startswith("ring")])
def test_cases_for_the_sanitizer_take_the_form(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As `gpu_check.py` compiles them."""
    monkeypatch.undo()
    case = SMALL_CASES[name]
    f, inputs = case.build()
    module, _ = module_of(f, inputs, until="host", target=dataclasses.replace(SM90, multiprocessors=case.multiprocessors))
    made = compile_gpu(module, FEW, cache_dir=tmp_path)
    assert [(row["grid"], bool(row["descriptors"])) for row in made.program["kernels"].values()] == [([4], True)]
