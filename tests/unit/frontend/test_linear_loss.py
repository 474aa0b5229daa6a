"""Cross-entropy of a linear layer in parts: losses and gradients against float64, which programs are left alone, and the memory that is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from aicc.compiler.driver import Compilation, watching
from aicc.compiler.dynamo import aot_backend
from aicc.compiler.options import Options
from aicc.compiler.pipelines import STAGES, pipeline
from aicc.frontend.importer import import_graph
from aicc.frontend.linear_loss import chunk_losses
from aicc.ir import Operation
from aicc.ir.passes import PassContext, parse_pipeline, run_pipeline
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

from ...gpu.cases import SM90

ROWS, WIDTH, VOCABULARY = 300, 32, 333


def flat(h: Tensor, w: Tensor, b: Tensor, y: Tensor, **how: Any) -> Tensor:
    return F.cross_entropy(F.linear(h, w, b).view(-1, VOCABULARY).to(torch.promote_types(h.dtype, torch.float32)), y.view(-1), **how)


def shifted(h: Tensor, w: Tensor, b: Tensor, y: Tensor, **how: Any) -> Tensor:
    return F.cross_entropy(F.linear(h, w, b)[:, :-1].reshape(-1, VOCABULARY), y[:, 1:].reshape(-1), **how)


def classes_second(h: Tensor, w: Tensor, b: Tensor, y: Tensor, **how: Any) -> Tensor:
    return F.cross_entropy((h @ w.t()).transpose(1, 2), y, **how) + 0 * b.sum()


def draw(dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(3, ROWS // 3, WIDTH).to(dtype), (0.3 * torch.randn(VOCABULARY, WIDTH)).to(dtype), torch.randn(VOCABULARY).to(dtype)]


def results(f: Callable[..., Tensor], given: list[Tensor], y: Tensor, dtype: torch.dtype, **how: Any) -> list[Tensor]:
    leaves = [t.detach().to(dtype).clone().requires_grad_() for t in given]
    loss = f(*leaves, y, **how)
    loss.backward(torch.linspace(0.5, 1.5, loss.numel(), dtype=torch.float64).reshape(loss.shape).to(loss.dtype) if loss.dim() else torch.tensor(1.7).to(loss.dtype))
    return [loss.detach(), *(t.grad for t in leaves)]  # type: ignore[misc]


def error(got: Tensor, true: Tensor) -> float:
    return float((got.double() - true).abs().max() / true.abs().max().clamp(min=1e-30))


@pytest.mark.parametrize(("f", "dtype", "how"), [
    (flat, torch.float32, {}),
    pytest.param(flat, torch.bfloat16, {"reduction": "sum", "label_smoothing": 0.1}, marks=pytest.mark.slow),
    (flat, torch.float16, {"ignore_index": 7}),
    (shifted, torch.float32, {"reduction": "none", "label_smoothing": 0.2}),
    (classes_second, torch.float32, {"label_smoothing": 0.1}),
    pytest.param(classes_second, torch.float32, {"reduction": "none"}, marks=pytest.mark.slow),
], ids=lambda v: getattr(v, "__name__", str(v)))
def test_losses_and_gradients(f: Callable[..., Tensor], dtype: torch.dtype, how: dict[str, Any]) -> None:
    given, y = draw(dtype), torch.randint(0, VOCABULARY, (3, ROWS // 3))
    y[0, :9] = how.get("ignore_index", -100)
    torch._dynamo.reset()
    seen: list[Compilation] = []
    with watching(compiled=seen.append):
        got = results(torch.compile(f, backend="aicc", dynamic=False, options={"loss_bytes": 80_000}), given, y, dtype, **how)
    true, eager = (results(f, given, y, d, **how) for d in (torch.float64, dtype))
    assert all(c.stats["externs"] == [] for c in seen)
    for a, b, c in zip(got, eager, true, strict=True):
        assert a.dtype == b.dtype and error(a, c) <= 2 * error(b, c) + 2e-6, (error(a, c), error(b, c))


def test_inference() -> None:
    """In parts large enough that they do not run side by side."""
    rows, vocabulary = 2048, 4096
    h, w, y = torch.randn(rows, WIDTH), torch.randn(vocabulary, WIDTH), torch.randint(0, vocabulary, (rows,))
    torch._dynamo.reset()
    with torch.no_grad(), watching(compiled=(seen := list[Compilation]()).append):
        got = torch.compile(lambda h, w, y: F.cross_entropy(h @ w.t(), y), backend="aicc", dynamic=False, options={"loss_bytes": 4 << 20})(h, w, y)
    assert error(got, F.cross_entropy(h.double() @ w.double().t(), y)) < 1e-6
    assert seen[0].stats["memory"]["arena_bytes"] < 4 * rows * vocabulary / 2


def test_labels_out_of_range() -> None:
    given = draw(torch.float32)
    torch._dynamo.reset()
    run = torch.compile(flat, backend="aicc", dynamic=False, options={"loss_bytes": 100_000})
    for wrong in (VOCABULARY, -1):
        with torch.no_grad(), pytest.raises(IndexError):
            run(*given, torch.full((3, ROWS // 3), wrong))


def _returned(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Any:
    logits = F.linear(h, w, b).view(-1, VOCABULARY)
    return F.cross_entropy(logits, y.view(-1)), logits


def _weighted(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Any:
    return F.cross_entropy(F.linear(h, w).view(-1, VOCABULARY), y.view(-1), weight=b)


def _mixed(h: Tensor, w: Tensor, b: Tensor, y: Tensor) -> Any:
    """Rows of the loss are no rows of the product."""
    return F.cross_entropy(F.linear(h, w, b).transpose(0, 2).reshape(-1, VOCABULARY), y.view(-1))


@pytest.mark.parametrize(("f", "limit", "wanted"), [(flat, 100_000, 1), (flat, 0, 0), (flat, 1 << 20, 0), (_returned, 1000, 0), (_weighted, 1000, 0),
                                                    (_mixed, 1000, 0)], ids=lambda v: getattr(v, "__name__", str(v)))
def test_what_is_left_whole(f: Callable[..., Any], limit: int, wanted: int) -> None:
    found: list[int] = []

    def look(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        found.append(chunk_losses(gm, limit))
        return gm.forward

    torch._dynamo.reset()
    h, w, b = draw(torch.float32)
    torch.compile(f, backend=look, dynamic=False)(h, w, b, torch.zeros(3, ROWS // 3, dtype=torch.long))
    assert found == [wanted]


def _forward_on_a_gpu(rows: int, width: int, vocabulary: int, parts: int) -> Operation:
    """The host function of the forward pass; nothing runs."""
    found: list[Operation] = []

    def lowered(role: str) -> Any:
        def compiler(gm: torch.fx.GraphModule, _: Any) -> Any:
            module = import_graph(gm)
            for stage in STAGES:
                run_pipeline(module, parse_pipeline(pipeline(stage, SM90, Options())), PassContext(SM90))
            found.append(next(op for op in module.body if op.name == "func"))
            raise NotImplementedError("compiled, not run")
        return compiler

    h = torch.empty(rows, width, dtype=torch.bfloat16, requires_grad=True)
    w = torch.empty(vocabulary, width, dtype=torch.bfloat16, requires_grad=True)
    torch._dynamo.reset()
    backend = aot_backend(lowered, loss_bytes=2 * rows * vocabulary // parts)
    with pytest.raises(BackendCompilerFailed, match="compiled, not run"):
        torch.compile(lambda h, w, y: F.cross_entropy(h @ w.t(), y), backend=backend, dynamic=False)(h, w, torch.zeros(rows, dtype=torch.long))
    return found[0]


def test_memory_on_a_gpu() -> None:
    """Logits of one part and their gradient, and one sum of the weight's gradient, in the memory of the result."""
    rows, width, vocabulary, parts = 4096, 1024, 16384, 4
    func = _forward_on_a_gpu(rows, width, vocabulary, parts)
    part, workspace = 2 * rows * vocabulary // parts, 34 << 20
    assert func["stats"]["arena_bytes"] < 2 * part + workspace + (4 << 20)
    sums = [op for op in func.body if op.name == "host.library" and "c" in op["roles"]]
    assert len(sums) == parts - 1
    assert all(op.operands[op["roles"].index("c")] is op.operands[op["roles"].index("d")] for op in sums)


def test_products_of_parts_are_not_made_at_once() -> None:
    """Though each of them is small enough to be launched along with the others."""
    func = _forward_on_a_gpu(2048, 256, 8192, 4)
    first = next(op for op in func.body if op.name == "host.launch")
    assert "and_3_more" not in str(first["kernel"])
