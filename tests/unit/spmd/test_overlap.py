"""What lies between the start of a collective and its end in the program that a rank runs."""

from __future__ import annotations

import torch
from aicc.backends.nccl import lower_collectives
from aicc.compiler.distributed.auto_shard import auto_shard
from aicc.compiler.driver import Compilation, lower
from aicc.compiler.options import Options
from aicc.ir import Operation, Target
from aicc.passes.shard import Plan
from torch import nn

SM90 = Target(kind="cuda", name="sm_90", capability=90, multiprocessors=132, l2=50 << 20)
WIDTH, ROWS = 4096, 4096


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.float().square().mean()


def backward(plan: Plan) -> list[Operation]:
    """The host program of rank 0's backward pass, launches, library calls and externs in order."""
    with torch.device("meta"):
        model = Net().to(torch.bfloat16)
    x = torch.empty(2, ROWS // 2, WIDTH, dtype=torch.bfloat16, device="meta")
    program = auto_shard(model, (x,), mesh=2, plan=plan, device="cpu").program()
    module = program.cut.backward.clone()
    lower_collectives(module, program.mesh, 0, {"dp": "1", "tp": "2"})
    lower(module, SM90, Options.from_user(), Compilation("backward", SM90))
    func = next(op for op in module.body if op.name == "func")
    return [op for op in func.body if op.name in ("host.launch", "host.library", "host.extern")]


def kinds(ops: list[Operation]) -> list[str]:
    names = {"host.launch": "launch", "host.library": "product"}
    return [names.get(op.name) or op["target"].partition(".")[2].removesuffix(".default") for op in ops]


def gaps(ops: list[Operation], start: str) -> list[list[str]]:
    """For each collective of a kind, what is between its start and its own wait."""
    names = kinds(ops)
    ends = {op.operands[0]: i for i, op in enumerate(ops) if names[i] == "wait"}
    return [names[i + 1:ends[op.operands[1]]] for i, op in enumerate(ops) if names[i] == start]


def test_gradients_of_weights_run_beside_the_sum_of_a_gradient() -> None:
    """Tensor parallelism: while the gradient of a block's input is summed, the block's weights get theirs."""
    found = gaps(backward(Plan(tp=2, micro_batch=2)), "all_reduce")
    assert sum("product" in gap for gap in found) >= 3, found


def test_parameters_are_gathered_ahead() -> None:
    """ZeRO-3: the gather of the next weight is on its way when a product runs, and gradients leave while the next is computed."""
    ops = backward(Plan(dp=2, zero=3, micro_batch=1))
    gathers = [gap for gap in gaps(ops, "all_gather_into_tensor") if gap]
    assert sum("product" in gap for gap in gathers) >= 3, gathers
    scattered = gaps(ops, "reduce_scatter_tensor")
    assert sum("product" in gap for gap in scattered) >= 3, scattered
    assert kinds(ops).index("reduce_scatter_tensor") < len(ops) // 2
