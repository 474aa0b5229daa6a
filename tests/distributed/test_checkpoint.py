"""Checkpoints of torch.distributed.checkpoint: written under one plan, read under another, into a model that never had weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from .launch import torchrun

SCRIPT = Path(__file__).parent / "checkpoint.py"


@pytest.mark.slow
@pytest.mark.parametrize(("model", "first", "second"), [
    ("llama", {"dp": 2, "zero": 3, "micro_batch": 4}, {"tp": 2, "sp": True, "micro_batch": 8}),
    ("gpt2", {"tp": 2, "micro_batch": 8}, {"dp": 2, "zero": 2, "micro_batch": 4}),
])
def test_resume_under_another_plan(tmp_path: Path, model: str, first: dict, second: dict) -> None:
    done = torchrun(2, SCRIPT, model, json.dumps(first), json.dumps(second), str(tmp_path / "saved"))
    line = next((x for x in done.stdout.splitlines() if x.startswith("LOSSES:")), None)
    assert line is not None, done.stderr[-3000:]
    whole, resumed = json.loads(line.removeprefix("LOSSES:"))
    assert resumed == pytest.approx(whole, rel=2e-5)
