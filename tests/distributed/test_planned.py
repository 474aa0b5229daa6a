"""`options={"plan": ...}` on torch.compile."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from aicc.compiler.distributed.planned import compile_planned
from aicc.compiler.errors import UserError
from aicc.compiler.options import Options
from aicc.passes.shard import Plan

from .launch import torchrun

SCRIPT = Path(__file__).parent / "planned.py"


@pytest.mark.parametrize("plan", [Plan(tp=2), pytest.param(Plan(dp=2), marks=pytest.mark.slow),
                                  pytest.param(Plan(tp=2, sp=True), marks=pytest.mark.slow), pytest.param(Plan(cp=2), marks=pytest.mark.slow)],
                         ids=lambda p: p.label)
def test_values_and_gradients_of_one_process(tmp_path: Path, plan: Plan) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(plan.to_toml())
    done = torchrun(2, SCRIPT, str(path))
    found = [float(x) for x in re.findall(r"RANK \d: worst: ([\d.e+-]+)", done.stdout)]
    assert len(found) == 2, done.stdout + done.stderr[-3000:]
    assert max(found) < 1e-5


@pytest.mark.parametrize(("plan", "message"), [(Plan(pp=2), "a pipeline"), (Plan(dp=2, zero=1), "ZeRO"), (Plan(dp=2, ep=2), "expert parallelism"),
                                               (Plan(dp=2), "no process group")], ids=str)
def test_what_it_cannot_do(tmp_path: Path, plan: Plan, message: str) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(plan.to_toml())
    graph = torch.fx.symbolic_trace(torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match=message):
        compile_planned(graph, [torch.ones(2, 2)], Options.from_user(None, {"plan": str(path)}))
