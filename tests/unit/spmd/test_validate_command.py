"""`aicc shard --validate`, on a model small enough to run on virtual ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from aicc.compiler.cli import app
from typer.testing import CliRunner

MODEL = """
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.LayerNorm(16))
inputs = (torch.randn(4, 16),)
"""


@pytest.mark.parametrize("plan", ["tp = 2", "dp = 2\nzero = 1"])
def test_a_right_plan_passes(tmp_path: Path, plan: str) -> None:
    (tmp_path / "model.py").write_text(MODEL)
    (tmp_path / "plan.toml").write_text(f"version = 1\n{plan}\n")
    done = CliRunner().invoke(app, ["shard", str(tmp_path / "model.py"), "--mesh", "2", "--plan", str(tmp_path / "plan.toml"), "--validate"])
    assert done.exit_code == 0, done.output
    assert "the sharded step equals the whole one" in done.output
    assert "dropped all-reduce" in done.output
