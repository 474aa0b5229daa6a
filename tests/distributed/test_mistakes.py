"""Mistakes give one clear error on every rank, and nothing hangs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from aicc.compiler.distributed.auto_shard import auto_shard
from aicc.compiler.errors import UserError
from aicc.passes.shard import Plan

from .launch import torchrun

SCRIPT = Path(__file__).parent / "mistakes.py"


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "message"), [
    ("world", "takes 4 ranks (pp 1 * dp 4 * tp 1), but 2 are running: start it with torchrun --nproc-per-node 4"),
    ("model", "this plan was made for another model"),
    ("ranks", "the ranks disagree on the plan and the model: ranks 0:"),
    ("batch", "the plan takes torch.float32 of shape [4, 8] (all ranks together) or [2, 8] (this rank)"),
])
def test_every_rank_says_the_same(mode: str, message: str) -> None:
    done = torchrun(2, SCRIPT, mode, timeout=200)
    lines = [line.strip() for line in re.findall(r"RANK \d: .*?(?=RANK \d:|\Z)", done.stdout, re.DOTALL)]  # ranks write at one time
    assert len(lines) == 2, done.stdout + done.stderr[-2000:]
    for line in lines:
        assert "UserError" in line
        assert message in line
    texts = {line.split(" s: ", 1)[1] for line in lines}
    assert len(texts) == 1


def test_a_rank_that_does_not_come() -> None:
    """The collective's timeout names the op, its line of Python and the missing rank."""
    done = torchrun(2, SCRIPT, "late", timeout=200)
    text = done.stdout
    assert "RANK 0: CollectiveError" in text, text + done.stderr[-2000:]
    assert "dist.all_reduce over mesh axis 'dp'" in text
    assert "mistakes.py:" in text
    assert "ranks that did not arrive: 1" in text


def test_plans_that_do_not_fit() -> None:
    model, x = torch.nn.Linear(4, 4), torch.ones(4, 4)

    def loss(y: torch.Tensor) -> torch.Tensor:
        return y.sum()
    with pytest.raises(UserError, match="takes 2 devices .* the mesh 4 has 4"):
        auto_shard(model, (x,), mesh=4, plan=Plan(dp=2), loss_fn=loss)
    with pytest.raises(UserError, match="a batch of 4 is no multiple of dp 3"):
        auto_shard(model, (x,), mesh=3, plan=Plan(dp=3), loss_fn=loss)
    with pytest.raises(UserError, match="expert groups run over the data ranks"):
        auto_shard(model, (x,), mesh=2, plan=Plan(tp=2, ep=2), loss_fn=loss)
    with pytest.raises(UserError, match="gives no scalar loss"):
        auto_shard(model, (x,), mesh=2, plan=Plan(dp=2))
    with pytest.raises(UserError, match="Adagrad"):
        auto_shard(model, (x,), mesh=2, plan=Plan(dp=2), loss_fn=loss, optimizer=torch.optim.Adagrad)
    with pytest.raises(UserError, match="no process group"):
        auto_shard(model, (x,), mesh=2, plan=Plan(dp=2), loss_fn=loss).compile(model)
