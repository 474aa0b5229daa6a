"""What one half of a program hands to the other has the layout that the other expects."""

from __future__ import annotations

import torch
from aicc.compiler.distributed.auto_shard import auto_shard
from aicc.compiler.driver import cpu_target
from aicc.compiler.options import Options
from aicc.compiler.pipelines import pipeline
from aicc.ir.passes import PassContext, parse_pipeline, run_pipeline
from aicc.passes.shard import Plan
from torch import nn


def test_saved_values_are_row_major_for_both_halves() -> None:
    """A convolution's result would be channels-last in the forward pass; the backward pass, compiled by itself, reads it row-major."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Sigmoid(), nn.Conv2d(8, 8, 3, padding=1), nn.Sigmoid())
    plan = auto_shard(model, (torch.randn(2, 3, 8, 8),), mesh=1, plan=Plan(micro_batch=2), loss_fn=lambda y: y.square().mean(), device="cpu")
    cut = plan.program().cut
    forward, backward = (next(op for op in m.body if op.name == "func") for m in (cut.forward, cut.backward))
    count = len(cut.saved_arguments)
    taken = [a.type for a in backward.body.args[count:count + cut.saved_values]]
    assert any(len(t.shape) == 4 for t in taken)
    options = Options.from_user()
    target = cpu_target(options)
    for stage in ("graph", "tensor"):
        run_pipeline(cut.forward, parse_pipeline(pipeline(stage, target, options)), PassContext(target))
    forward = next(op for op in cut.forward.body if op.name == "func")
    made = [v.type for v in forward.body.terminator.operands[1:]]
    assert [tuple(t.layout) for t in made] == [tuple(t.layout) for t in taken]
