"""Kernels that the pipeline makes from PyTorch functions, each run natively and by the IR's interpreter on the same random memory.

Bounds of size symbols and the values of index tensors are the only things that the data respects, so each kernel is
compared on its own: a difference here is a fault of code generation (or of the interpreter), never of a pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from aicc.backends.llvm import host_target
from aicc.compiler import driver
from aicc.compiler.dynamo import aicc
from aicc.ir import Builder, Operation, SymbolRef, TensorType, make_func, make_module
from aicc.ir.expr import evaluate
from aicc.ir.interpreter import interpret
from aicc.ir.target import Target
from kernels import TORCH, run

Function = Callable[..., torch.Tensor]


def r(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


FUNCTIONS: dict[str, tuple[Function, tuple[torch.Tensor, ...]]] = {
    "pointwise": (lambda x, y: torch.tanh(x * y + 1).relu() - x.exp().log1p(), (r(13, 70), r(70))),
    "transposed": (lambda x: (x.t() + 1).contiguous() * 2, (r(33, 50),)),
    "bf16": (lambda x, y: F.silu(x) * y, (r(9, 130, dtype=torch.bfloat16), r(9, 130, dtype=torch.bfloat16))),
    "softmax": (lambda x: torch.softmax(x * 3, -1), (r(5, 7, 100),)),
    "layer_norm": (lambda x, w: F.layer_norm(x, (96,), w), (r(6, 96), r(96))),
    "columns": (lambda x: x.sum(0) + x.amax(0), (r(45, 37),)),
    "argmax": (lambda x: x.argmax(1), (r(12, 65),)),
    "matmul": (lambda x, w, b: F.gelu(x @ w + b), (r(37, 50), r(50, 70), r(70))),
    "batched": (lambda q, k: torch.softmax(q @ k.transpose(-1, -2) * 0.25, -1) @ k, (r(3, 20, 16), r(3, 20, 16))),
    "conv": (lambda x, w: F.conv2d(x, w, padding=1).relu(), (r(2, 8, 9, 11), r(16, 8, 3, 3))),
    "embedding": (lambda ix, w: F.embedding(ix, w) * 2, (torch.randint(0, 2, (4, 6)), r(10, 24))),
    "scatter": (lambda x, ix, v: x.index_add(0, ix, v), (r(10, 20), torch.randint(0, 2, (7,)), r(7, 20))),
    "cumsum": (lambda x: x.cumsum(1), (r(3, 50),)),
    "integers": (lambda x: (x * 3) % 7 + (x // 2) - x.abs(), (torch.randint(-50, 50, (77,)),)),
    "where": (lambda x: torch.where(x > 0, x, x * 0.1).masked_fill(x > 1, 9.0), (r(41, 3),)),
    "pad": (lambda x: F.pad(x, (1, 2, 3, 0), value=2.0).flip(1), (r(5, 30),)),
}


def kernels_of(function: Function, inputs: tuple[torch.Tensor, ...], dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> list[Operation]:
    """The kernels of everything that compiling and calling `function` compiles."""
    found: list[Operation] = []
    compile_module = driver.compile_module

    def record(module: Operation, target: Target, **given: Any) -> Any:
        found.extend(op.clone() for op in module.body if op.name == "tile.kernel")
        return compile_module(module, target, **given)
    monkeypatch.setenv("AICC_STRICT", "1")
    monkeypatch.setenv("AICC_CACHE", "0")
    monkeypatch.setattr(driver, "compile_module", record)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=aicc, dynamic=dynamic)(*inputs)
    return found


def compare(kernel: Operation) -> None:
    """Runs one kernel both ways on random memory."""
    args, outputs = kernel.body.args, kernel["outputs"]
    sizes = {s: max(low, 12 + 5 * n) for n, (s, (low, _)) in enumerate(sorted(kernel["bounds"].items()))}
    sizes |= {s: high for s, (_, high) in kernel["bounds"].items() if isinstance(high, int) and sizes[s] > high}
    types = [TensorType(a.type.shape, a.type.dtype, a.type.strides) for a in args]  # type: ignore[attr-defined]
    given = len(args) - outputs
    module, top = make_module("tile")
    top.append(kernel.clone())
    _, body = make_func(top, "main", types[:given], symbols=dict.fromkeys(sizes, (0, None)))
    b = Builder.at_end(body)
    b.create("return", b.create("tile.launch", list(body.args), {"kernel": SymbolRef(kernel["sym_name"])}, types[given:]).results)
    memory, views = [], []
    for t in types:
        shape, strides = ([evaluate(e, sizes) for e in part] for part in (t.shape, t.layout))
        extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides))
        dtype = TORCH[t.dtype.name]
        flat = torch.randn(extent).to(dtype) if dtype.is_floating_point else torch.randint(0, 2, (extent,)).to(dtype)
        memory.append(flat)
        views.append(flat.as_strided(shape, strides))
    want = interpret(module, [v.clone() if v.is_contiguous() else v for v in views[:given]], symbols=sizes)
    for source, result in kernel.attributes.get("updates", ()):  # such a result holds a copy when the kernel starts
        views[result].copy_(views[source])
    assert run(kernel, memory, sizes, host_target()) == 0
    for got, expected in zip(views[given:], want, strict=True):
        tolerance = 1e-2 if got.dtype == torch.bfloat16 else 2e-4
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance / 2, equal_nan=True)


@pytest.mark.product
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_kernels(name: str, dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    function, inputs = FUNCTIONS[name]
    kernels = kernels_of(function, inputs, dynamic, monkeypatch)
    assert kernels
    for kernel in kernels:
        compare(kernel)
