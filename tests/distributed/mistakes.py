"""What a user may do wrong, one mode at a time, on every rank: prints 'RANK r: TYPE: message' and exits. Started by test_mistakes.py."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

import aicc


class Net(torch.nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.up, self.down = torch.nn.Linear(8, width), torch.nn.Linear(width, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x))).square().mean()


X = torch.ones(4, 8)


def shard(plan: aicc.Plan, model: torch.nn.Module | None = None) -> Any:
    return aicc.auto_shard(model or Net(), (X,), mesh=plan.devices, plan=plan, optimizer=torch.optim.SGD)


def world(rank: int) -> None:
    """A mesh larger than the world."""
    shard(aicc.Plan(dp=4)).compile(Net())


def model(rank: int) -> None:
    """A plan for another model."""
    shard(aicc.Plan(dp=2)).compile(Net(16))


def ranks(rank: int) -> None:
    """Ranks with different plans."""
    shard(aicc.Plan(dp=2, micro_batch=1 + rank)).compile(Net())


def late(rank: int) -> None:
    """A rank that does not come."""
    trained = shard(aicc.Plan(dp=2, micro_batch=2)).compile(Net())
    trained.step(X)
    if rank == 1:
        time.sleep(20)
        return
    trained.step(X)


def batch(rank: int) -> None:
    """A batch of another size than planned."""
    shard(aicc.Plan(dp=2, micro_batch=2)).compile(Net()).step(torch.ones(6, 8))


def main() -> None:
    torch.manual_seed(0)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60 if sys.argv[1] != "late" else 8))
    rank = dist.get_rank()
    started = time.monotonic()
    try:
        {"world": world, "model": model, "ranks": ranks, "late": late, "batch": batch}[sys.argv[1]](rank)
        print(f"RANK {rank}: no error", flush=True)
    except Exception as e:
        print(f"RANK {rank}: {type(e).__name__} after {time.monotonic() - started:.0f} s: {e}", flush=True)
    if sys.argv[1] == "late" and rank == 0:
        time.sleep(12)  # the store lives on this rank


if __name__ == "__main__":
    main()
