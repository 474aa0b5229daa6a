"""What is kept between forward and backward under each kind of recomputation, and that the halves of a backward pass give the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from aicc.compiler.distributed.auto_shard import ShardingPlan, auto_shard
from aicc.compiler.distributed.joint import Argument, Exported, make_joint
from aicc.compiler.distributed.program import build_program
from aicc.compiler.distributed.validation import validate_plan
from aicc.compiler.errors import UserError
from aicc.compiler.options import Options
from aicc.ir.interpreter import interpret
from aicc.passes.shard import Plan
from aicc.passes.spmd.recompute import recomputable
from torch import nn

WIDTH, LENGTH, BATCH, LAYERS = 16, 8, 4, 3


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


X = torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(0))


def sharding(recompute: str, **degrees: int) -> ShardingPlan:
    plan = Plan(recompute=recompute, micro_batch=BATCH // degrees.get("dp", 1), **degrees)
    return auto_shard(Net(), (X,), mesh=plan.devices, plan=plan, optimizer=torch.optim.SGD, device="cpu")


def kept_elements(recompute: str) -> int:
    """Elements of all values that the forward pass keeps, per token."""
    program = sharding(recompute).program()
    func = next(op for op in program.cut.forward.body if op.name == "func")
    return sum(int(v.type.numel) for v in func.body.terminator.operands[program.joint.outputs:]) // (BATCH * LENGTH)  # type: ignore[attr-defined]


def kept_by(function: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype = torch.float32) -> list[str]:
    """What the forward pass keeps of function(x @ w.T), as types."""
    net = nn.Sequential(nn.Linear(WIDTH, 64, bias=False)).to(dtype)
    plan = auto_shard(net, (X.to(dtype),), mesh=1, plan=Plan(micro_batch=BATCH), loss_fn=function, optimizer=torch.optim.SGD, device="cpu")
    program = plan.program()
    func = next(op for op in program.cut.forward.body if op.name == "func")
    return [str(v.type) for v in func.body.terminator.operands[program.joint.outputs:]]


def test_one_value_is_kept_for_several_that_are_made_of_it() -> None:
    assert kept_by(lambda y: nn.functional.gelu(y, approximate="tanh").square().mean()) == ["tensor<32x64xf32>"]


def test_the_16_bit_value_is_kept_and_not_what_is_made_of_it() -> None:
    def loss(y: torch.Tensor) -> torch.Tensor:
        wide = y.float()
        return (wide - wide.amax(-1, keepdim=True)).exp().square().mean()
    assert sorted(kept_by(loss, torch.bfloat16)) == ["tensor<32x64xbf16>", "tensor<4x8x1xf32>"]


def test_weights_picked_for_each_token_are_not_kept() -> None:
    """What is kept are the numbers of the experts, and not their weights, once per token."""
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(WIDTH, WIDTH, bias=False), nn.Parameter(torch.randn(4, WIDTH, WIDTH))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x).reshape(-1, WIDTH)
            return torch.bmm(self.second[y.argmax(-1) % 4], y.unsqueeze(-1)).square().mean()

    plan = auto_shard(Experts(), (X,), mesh=1, plan=Plan(micro_batch=BATCH), optimizer=torch.optim.SGD, device="cpu")
    program = plan.program()
    func = next(op for op in program.cut.forward.body if op.name == "func")
    kept = [v.type for v in func.body.terminator.operands[program.joint.outputs:]]
    assert all(t.numel <= BATCH * LENGTH * WIDTH for t in kept), kept  # type: ignore[attr-defined]
    assert any(t.dtype.name == "i64" for t in kept), kept  # type: ignore[attr-defined]


def test_a_forward_pass_that_changes_an_argument_is_refused() -> None:
    """The backward pass would pick from it what the forward pass never saw."""
    def step(x: torch.Tensor, cache: torch.Tensor) -> tuple[torch.Tensor]:
        cache.add_(x)
        return ((cache[torch.arange(4) // 2] * x).sum(),)

    arguments = [Argument("input", "x", (4,), torch.float32), Argument("buffer", "cache", (4,), torch.float32)]
    with pytest.raises(UserError, match="changes one of its arguments"):
        make_joint(Exported(torch.fx.symbolic_trace(step), arguments), differentiable_inputs=[0])


def test_kept_values() -> None:
    """full keeps what each block reads, selective what its products with parameters give; none at least that and what norms need."""
    none, selective, full = (kept_elements(kind) for kind in ("none", "selective", "full"))
    assert full <= (LAYERS + 1) * WIDTH
    assert selective <= LAYERS * (4 + 1) * WIDTH + WIDTH
    assert full < selective <= none
    with pytest.raises(ValueError, match="recompute 'some' is unknown; allowed: none, selective, full"):
        recomputable([], "some")


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_the_step_is_right(recompute: str) -> None:
    for degrees in ({"tp": 2}, {"dp": 2, "zero": 3}):
        plan = sharding(recompute, **degrees)
        report = validate_plan(plan, Net(), [X])
        assert report.ok, str(report)


def test_made_again_where_it_is_read() -> None:
    """Under full recomputation the last block's values are made first, each block's right before its gradients."""
    program = sharding("full").program()
    func = next(op for op in program.cut.backward.body if op.name == "func")
    numbers = [int(op.location.module.split(".")[1]) for op in func.body if op.location.module.startswith("blocks.")]
    assert numbers == sorted(numbers, reverse=True)


def test_halves() -> None:
    """Gradients of inputs and of weights apart are those of the whole backward pass."""
    plan = sharding("none")
    joint = plan.joint()
    whole = build_program(joint, plan.layout(joint), plan.mesh, 0, {}, Options.from_user(), compiled=False)
    parted = build_program(joint, plan.layout(joint), plan.mesh, 0, {}, Options.from_user(), compiled=False, halves=True)
    assert parted.halves is not None
    assert parted.which("input") == []
    func = next(op for op in whole.cut.backward.body if op.name == "func")
    given = [torch.randn(tuple(a.type.shape), generator=torch.Generator().manual_seed(i), dtype=torch.float64)  # type: ignore[attr-defined]
             for i, a in enumerate(func.body.args)]
    want = interpret(whole.cut.backward, given, precision=torch.float64)
    first = interpret(parted.halves.forward, given, precision=torch.float64)
    kept = [*(given[i] for i in parted.halves.saved_arguments), *first]
    got = interpret(parted.halves.backward, kept, precision=torch.float64)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
