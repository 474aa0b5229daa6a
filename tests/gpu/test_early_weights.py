"""Products that read their weights before the kernel in front has ended: which take the form, what it computes, and how they are launched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from aicc.backends.triton import compile_gpu
from aicc.backends.triton.early_weights import print_early_weights
from aicc.backends.triton.printer import KernelSource
from aicc.ir import Operation
from aicc.ir.interpreter import interpret
from aicc.passes.tiling.gpu_tiles import early_columns
from torch import Tensor

from .cases import SM80, SM90, capture, error
from .gluon_model import launcher


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def linear(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, w, b)


def gelu(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.gelu(F.linear(x, w, b))


def relu(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, w, b).relu()


def residual(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
    return F.linear(x, w, b) + r


def in_parts(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, w, b).float().softmax(-1)


FORMS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "linear": (linear, (normal(128, 256), normal(2304, 256), normal(2304))),
    "f16": (linear, (normal(128, 256, dtype=torch.float16), normal(3072, 256, dtype=torch.float16), normal(3072, dtype=torch.float16))),
    "relu": (relu, (normal(128, 128), normal(3072, 128), normal(3072))),
    "residual": (residual, (normal(128, 128), normal(2304, 128), normal(2304), normal(128, 2304))),
    "in_parts": (in_parts, (normal(128, 3072), normal(768, 3072) / 16, normal(768))),
}


def module_of(f: Callable[..., Tensor], inputs: tuple[Tensor, ...], until: str = "tile", target: Any = SM90) -> tuple[Operation, list[Tensor]]:
    found: list[Any] = []

    def run(module: Operation, gm: torch.fx.GraphModule, args: list[Any]) -> Any:
        found.append((module, args))
        return gm.forward(*args)

    capture(f, inputs, run, until=until, target=target)
    return found[0]


def product_of(module: Operation) -> Operation:
    return next(op for op in module.body if op.name == "tile.kernel" and any(x.name == "tile.dot" for x in op.walk()))


def printed(f: Callable[..., Tensor], inputs: tuple[Tensor, ...], target: Any = SM90) -> KernelSource | str:
    kernel = product_of(module_of(f, inputs, target=target)[0])
    return print_early_weights(kernel, target, [True] * len(kernel.body.args))


@pytest.mark.parametrize("name", FORMS)
def test_what_it_computes(name: str) -> None:
    """All but the weight is poison until the program has waited."""
    f, inputs = FORMS[name]
    module, args = module_of(f, inputs)
    taken: list[KernelSource] = []

    launch = launcher(lambda kernel: print_early_weights(kernel, SM90, [True] * len(kernel.body.args)), taken,
                      lambda kernel: {o.operands[0].index for o in kernel.walk() if o.name == "tile.prefetch"})
    got, = interpret(module, args, handlers={"tile.launch": launch})
    assert len(taken) == 1 and taken[0].early and taken[0].dependent
    assert error(got, f(*(x.double() for x in inputs))) < (6e-3 if inputs[0].dtype == torch.bfloat16 else 2e-3)


@pytest.mark.parametrize(("why", "f", "inputs", "target"), [
    ("no weight", lambda x, w, b: F.linear(x, torch.sin(w).cumsum(0), b), FORMS["linear"][1], SM90),
    ("no weight", linear, (normal(16, 256), normal(2304, 256), normal(2304)), SM90),
    ("masked", linear, (normal(120, 256), normal(2304, 256), normal(2304)), SM90),
    ("fit", linear, (normal(128, 2048), normal(2304, 2048), normal(2304)), SM90),
    ("Hopper", linear, FORMS["linear"][1], SM80),
])
def test_other_products_are_printed_plainly(why: str, f: Callable[..., Tensor], inputs: tuple[Tensor, ...], target: Any) -> None:
    said = printed(f, inputs, target)
    assert isinstance(said, str) and why in said, said


@pytest.mark.parametrize(("sizes", "columns"), [
    ((1, 128, 2304, 768), 64),  # 144 programs of 32 would be more than multiprocessors
    ((1, 128, 768, 768), 32),
    ((4, 128, 768, 768), 64),
    ((1, 128, 768, 3072), 0),  # all of K does not fit
    ((1, 16, 768, 768), 0),
    ((1, 512, 768, 768), 0),
    ((1, 128, 8192, 768), 0),  # more programs than multiprocessors
    ((1, 128, 100, 768), 0),
])
def test_a_program_has_a_multiprocessor_to_itself(sizes: tuple[int, int, int, int], columns: int) -> None:
    assert early_columns(SM90, *sizes) == columns
    assert early_columns(SM80, *sizes) == 0


def test_weights_are_asked_for_before_the_wait_and_the_rest_after() -> None:
    source = printed(*FORMS["relu"])
    assert isinstance(source, KernelSource)
    before, after = source.text.split("griddepcontrol.wait")
    assert before.count("tma_load(left_map") == 1 and "tma_load(right_map" not in before and "gl.load(" not in before, "the weight's rows are the tile's"
    assert after.count("tma_load(right_map") == 1 and "tma_load(left_map" not in after and "griddepcontrol.launch_dependents" in after


@pytest.mark.parametrize(("f", "name"), [(gelu, "relu"), (in_parts, "in_parts")])
def test_it_compiles(f: Callable[..., Tensor], name: str, tmp_path: Path) -> None:
    x, *rest = FORMS[name][1]
    module, _ = module_of(lambda x, *rest: f(F.layer_norm(x.float(), x.shape[-1:]).to(x.dtype), *rest), (x, *rest), until="host")
    made = compile_gpu(module, SM90, cache_dir=tmp_path)
    (kernel, row), = ((name, row) for name, row in made.program["kernels"].items() if row["early"])
    assert row["dependent"] and made.kernels[kernel].spills == 0 and len(row["descriptors"]) == 2 and row["threads"] in (128, 256)
