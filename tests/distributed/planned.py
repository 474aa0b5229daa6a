"""torch.compile with a plan: every rank gets what one process would. Prints 'RANK r: KIND: figure'. Started by test_planned.py.

    planned.py PLAN.toml
"""

from __future__ import annotations

import copy
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from aicc.compiler.dynamo import aicc as backend
from torch import nn


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(16, 32), nn.Linear(32, 16), nn.LayerNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.down(torch.relu(self.up(x))))


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 6, 16, requires_grad=True)
    whole, y = copy.deepcopy(model), x.detach().clone().requires_grad_()
    compiled = torch.compile(model, backend=backend, options={"plan": sys.argv[1]}, dynamic=False)
    factors, worst = torch.randn(4, 6, 16), 0.0
    for _ in range(2):
        got, want = compiled(x), whole(y)
        (got * factors).sum().backward()
        (want * factors).sum().backward()
        assert got.shape == want.shape
        pairs = [(got.detach(), want.detach()), (x.grad, y.grad), *((p.grad, q.grad) for p, q in zip(model.parameters(), whole.parameters(), strict=True))]
        worst = max(worst, *(float((a - b).abs().max() / b.abs().max()) for a, b in pairs))
        with torch.no_grad():  # pieces that were kept must not be used again
            for p in (*model.parameters(), *whole.parameters()):
                p.sub_(0.01 * p.grad)
                p.grad = None
            x.grad = y.grad = None
    print(f"RANK {dist.get_rank()}: worst: {worst}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
