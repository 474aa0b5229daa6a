"""Views that share their source's memory: which ones do, and that programs with them give eager's numbers (compiled for this CPU)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from aicc.backends.llvm import compile_module, host_target
from aicc.compiler.driver import mark_saved
from aicc.compiler.dynamo import aot_backend, first_saved
from aicc.compiler.manifest import build_manifest
from aicc.compiler.options import Options
from aicc.compiler.pipelines import STAGES, pipeline
from aicc.frontend.importer import import_graph
from aicc.ir import Operation
from aicc.ir.passes import PassContext, parse_pipeline, run_pipeline
from aicc.runtime.executor import CompiledGraph
from torch import Tensor
from torch._functorch.aot_autograd import make_boxed_func


class Programs:
    """Compiles with `alias-views` before fusion; `modules` at the host level, by role, and what compiled graphs returned."""

    def __init__(self, saved: int | None = None) -> None:
        self.saved = saved  # the first saved result, where torch does not say
        self.modules: dict[str, Operation] = {}
        self.returned: dict[str, list[Any]] = {}

    def compile(self, f: Callable[..., Any]) -> Callable[..., Any]:
        torch._dynamo.reset()
        return torch.compile(f, backend=aot_backend(self._compiler), dynamic=False)

    def aliases(self, role: str) -> int:
        return sum(a["kind"] == "view" for op in self.modules[role].body if op.name == "func" for a in op["result_attrs"])

    def _compiler(self, role: str) -> Callable[..., Any]:
        def compile_one(gm: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
            module = import_graph(gm)
            saved = first_saved(role) if self.saved is None else self.saved
            if saved is not None:
                mark_saved(module, saved)
            target = host_target(None)
            for stage in STAGES:
                text = pipeline(stage, target, Options())
                if stage == "tensor":
                    text = text.replace(",stream,", ",alias-views,stream,")
                    assert "alias-views" in text
                run_pipeline(module, parse_pipeline(text), PassContext(target))
            self.modules[role] = module
            compiled = compile_module(module, target)
            graph = CompiledGraph(build_manifest(module, errors=compiled.errors), compiled.object_code)

            def run(*args: Any) -> list[Any]:
                self.returned[role] = graph(*args)
                return self.returned[role]
            return make_boxed_func(run)
        return compile_one


def heads(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
    """Parts of one product, seen as heads, which the backward pass wants again."""
    b, s, d = x.shape
    q, k, t = ((x @ w).split(d, -1))
    q, k, t = (y.view(b, s, 4, d // 4).transpose(1, 2) for y in (q, k, t))
    a = (q @ k.transpose(-1, -2)).softmax(-1) @ t
    return F.gelu(a.transpose(1, 2).reshape(b, s, d)) @ v


def inputs() -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    return tuple((0.2 * torch.randn(s, generator=g)).requires_grad_() for s in ((4, 96, 64), (64, 192), (64, 64)))


def parts(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """Parts of one product, seen as heads."""
    b, s, d = x.shape
    return tuple(y.view(b, s, 4, d // 4).transpose(1, 2) for y in (x @ w).split(d, -1))


def test_gradients_are_eagers() -> None:
    programs = Programs()
    given, same = inputs(), inputs()
    out, true = programs.compile(heads)(*given), heads(*same)
    out.sin().sum().backward()
    true.sin().sum().backward()
    torch.testing.assert_close(out, true, rtol=1e-4, atol=1e-4)
    for a, b in zip(given, same, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4)


def test_saved_parts_of_a_product_are_views_of_it() -> None:
    programs = Programs(saved=0)
    x, w, _ = inputs()
    with torch.no_grad():
        got, true = programs.compile(parts)(x, w), parts(x, w)
    assert programs.aliases("inference") == 3
    for a, b in zip(got, true, strict=True):
        assert a.stride() == b.stride()
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert len({t.untyped_storage().data_ptr() for t in programs.returned["inference"]}) == 1


def test_operators_are_given_views_of_saved_results() -> None:
    def f(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        q, k, v = parts(x, w)
        return q, k, torch.mode(v, -1)[0]

    programs = Programs(saved=0)
    x, w, _ = inputs()
    with torch.no_grad():
        got, true = programs.compile(f)(x, w), f(x, w)
    for a, b in zip(got, true, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert programs.aliases("inference") == 2


def test_results_that_the_user_sees_have_memory_of_their_own() -> None:
    def f(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        y = x @ w
        return y, y.view(-1, 32).clone()

    programs = Programs()
    with torch.no_grad():
        a, b = programs.compile(f)(torch.randn(256, 64), torch.randn(64, 128))
    assert a.data_ptr() != b.data_ptr() and programs.aliases("inference") == 0
    torch.testing.assert_close(a.view(-1, 32), b)


def test_an_operator_reads_a_view_of_an_argument() -> None:
    def f(x: Tensor) -> Tensor:
        return x.view(256, 3, 4, 64).unbind(1)[1].transpose(0, 1).mode(-1)[0]

    programs, x = Programs(), torch.randn(256, 768)
    with torch.no_grad():
        got = programs.compile(f)(x)
    assert torch.equal(got, f(x))
    func = next(op for op in programs.modules["inference"].body if op.name == "func")
    assert [op.name for op in func.body if op.name in ("host.launch", "host.extern", "host.view")][:2] == ["host.view", "host.extern"]


def test_an_argument_that_is_written_is_not_shared() -> None:
    def f(x: Tensor) -> Tensor:
        made = x.view(256, 3, 4, 64).unbind(1)[1].transpose(0, 1).mode(-1)[0]
        x.mul_(2)
        return made

    programs, x = Programs(), torch.randn(256, 768)
    true = f(x.clone())
    with torch.no_grad():
        got = programs.compile(f)(x)
    assert torch.equal(got, true)
