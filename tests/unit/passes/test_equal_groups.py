"""Groups that are alike are lowered once, and nothing but the time shows it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from aicc.compiler.pipelines import pipeline
from aicc.ir import Operation
from aicc.ir.passes import PassContext, Remark, parse_pipeline, run_pipeline
from aicc.ir.printer import print_op
from aicc.passes.tiling import lower as lowering
from aicc.passes.tiling.equal_groups import Lowered
from aicc.tests.support.stages import AVX2, CUDA, OPTIONS, capture
from torch import Tensor

LAYERS = 5


def attention(x: Tensor, w: Tensor) -> Tensor:
    for _ in range(LAYERS):
        q = x @ w
        x = (q @ q.transpose(-1, -2)).softmax(-1) @ x + x
    return x


def tiled(module: Operation, target: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[Remark], int, int]:
    """The module after `tile`, its remarks, the launches, and how many groups were lowered."""
    count = 0
    original = lowering.lower

    def counted(*args: Any) -> Operation:
        nonlocal count
        count += 1
        return original(*args)

    with monkeypatch.context() as m:
        m.setattr(lowering, "lower", counted)
        ctx = PassContext(target)
        run_pipeline(module, parse_pipeline("tile"), ctx)
    return print_op(module), ctx.remarks, sum(op.name == "tile.launch" for op in module.walk()), count


@pytest.mark.parametrize("target", [AVX2, CUDA], ids=["avx2", "cuda"])
def test_layers_are_lowered_once(target: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    program = capture(attention, (torch.randn(2, 160, 32), torch.randn(32, 32)))
    made = []
    for known in (True, False):
        module = program.module()
        for stage in ("graph", "tensor"):
            run_pipeline(module, parse_pipeline(pipeline(stage, target, OPTIONS)), PassContext(target))
        with monkeypatch.context() as m:
            if not known:
                m.setattr(Lowered, "kernel_of", lambda self, group, ctx: None)
            made.append(tiled(module, target, monkeypatch))
    (text, remarks, launches, few), (every_text, every_remark, _, many) = made
    assert text == every_text
    assert [(r.kind, r.message) for r in remarks] == [(r.kind, r.message) for r in every_remark]
    assert many == launches >= LAYERS and few <= launches - LAYERS + 2


def test_what_reads_an_argument_is_not_what_reads_a_result() -> None:
    """On GPUs the order of a product's loads depends on it."""
    program = capture(attention, (torch.randn(2, 160, 32), torch.randn(32, 32)))
    module = program.module()
    for stage in ("graph", "tensor"):
        run_pipeline(module, parse_pipeline(pipeline(stage, CUDA, OPTIONS)), PassContext(CUDA))
    groups = [op for op in module.walk() if op.name == "tensor.fused"]
    seen, ctx = Lowered(), PassContext(CUDA)
    entry = seen.remember(groups[0])
    entry.kernel = "first"
    assert seen.kernel_of(groups[0], ctx) == "first"
    assert any(len(g.body) == len(groups[0].body) for g in groups[1:]) and all(seen.kernel_of(g, ctx) is None for g in groups[1:])
    seen.forget()
    assert seen.kernel_of(groups[0], ctx) is None
