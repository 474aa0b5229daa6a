"""Ring attention: forward and backward on virtual ranks in float64, what it sends, and what a rank does not compute."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from aicc.backends.nccl import collective_order, lower_collectives
from aicc.compiler.distributed.joint import Joint, export_model, make_joint
from aicc.ir.passes import PassContext, parse_pipeline, run_pipeline
from aicc.ir.sharding import Mesh, shard
from aicc.passes.spmd import Partitioned, Policy, partition
from aicc.passes.spmd.faults import plant
from aicc.passes.spmd.validate import Report, run_whole, validate

from .programs import Function

Tensor = torch.Tensor
LENGTH = 8
SHAPE = (2, 4, LENGTH, 4)


def _padded(kind: torch.dtype) -> Tensor:
    """Causal, and the first three positions of the second sequence are padding: rows that see nothing."""
    mask = torch.ones(2, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    mask[1, :, :, :3] = False
    return mask if kind == torch.bool else torch.where(mask, 0.0, -torch.inf)


CASES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "causal": lambda x, w: F.scaled_dot_product_attention(x * w, x.cos() * w, x.sin() * w, is_causal=True),
    "all": lambda x, w: F.scaled_dot_product_attention(x * w, x.sin(), x, scale=0.3),
    "grouped": lambda x, w: F.scaled_dot_product_attention(x * w, x[:, :2], (x * w)[:, 2:], is_causal=True, enable_gqa=True),
    "padded": lambda x, w: F.scaled_dot_product_attention(x, x * w, x + w, _padded(torch.bool)),
    "padded by scores": lambda x, w: F.scaled_dot_product_attention(x, x * w, x + w, _padded(torch.float32)),
    "bias per key": lambda x, w: F.scaled_dot_product_attention(x, x * w, x + w, torch.linspace(0, 1, LENGTH).view(1, 1, 1, LENGTH)),
}


def ring_joint(name: str) -> Joint:
    return make_joint(export_model(Function(CASES[name], (4, 1, 1)), (torch.zeros(SHAPE),), {}), whole=True)


def results_of(joint: Joint, inputs: list[Tensor]) -> list[Tensor]:
    values = run_whole(joint.module, inputs)
    func = next(op for op in joint.module.body if op.name == "func")
    return [values[v] for v in func.body.terminator.operands]


def ring_partition(joint: Joint, ranks: int) -> tuple[Partitioned, Callable[[Partitioned], Report]]:
    placements: list[dict] = [{"cp": shard(2)} if a.kind == "input" else {} for a in joint.arguments] + [{}] * len(joint.tangents)
    results: list[dict] = [{}] * (joint.outputs + len(joint.gradients))
    mesh = Mesh((("cp", ranks),))
    done = partition(joint.module, mesh, [Policy("cp", "data", sequence=True, ring=True)], placements, results)
    random = torch.Generator().manual_seed(0)
    func = next(op for op in joint.module.body if op.name == "func")
    inputs = [joint.constants[a.name].double() if a.kind == "constant" and joint.constants[a.name].is_floating_point() else
              joint.constants[a.name] if a.kind == "constant" else torch.randn(a.shape, generator=random, dtype=torch.float64) for a in joint.arguments]
    inputs += [torch.ones(tuple(func.body.args[len(inputs) + k].type.shape), dtype=torch.float64) for k in range(len(joint.tangents))]
    return done, lambda given: validate(joint.module, given, mesh, ["cp"], placements, inputs, results=results)


@pytest.mark.product
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("name", CASES)
def test_equals_whole_attention(name: str, ranks: int) -> None:
    done, check = ring_partition(ring_joint(name), ranks)
    report = check(done)
    assert report.ok, str(report.first)
    shifts = [op for op in done.module.walk() if op.name == "dist.shift"]
    assert len(shifts) == 2 * (ranks - 1) + 2 * (ranks - 1) + 2 * ranks  # forward; backward; gradients until they are home
    assert not [op for op in done.module.walk() if op.name == "dist.all_to_all"]


def test_the_whole_operators_are_attention_and_its_gradient() -> None:
    """What the joint graph computes is what torch computes."""
    for name in ("causal", "padded"):
        joint = ring_joint(name)
        assert [op.name for op in joint.module.walk() if "attention" in op.name] == ["graph.attention", "graph.attention_backward"]
        x, w = torch.randn(SHAPE, dtype=torch.float64), torch.randn(4, 1, 1, dtype=torch.float64)
        plain = make_joint(export_model(Function(CASES[name], (4, 1, 1)), (torch.zeros(SHAPE),), {}))
        one = torch.ones((), dtype=torch.float64)
        got, want = (results_of(j, [*(w if a.kind == "param" else x if a.kind == "input" else j.constants[a.name] for a in j.arguments), one])
                     for j in (joint, plain))
        assert len(got) == len(want) == 2
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)


def test_a_dropped_shift_is_caught() -> None:
    done, check = ring_partition(ring_joint("causal"), 4)
    faults = [f for f in plant(done) if f.kind == "dropped shift"]
    assert len(faults) == 2 * 3 + 2 * 3 + 2 * 4
    assert not any(check(f.partitioned).ok for f in faults)


def test_blocks_behind_a_rank_are_not_computed() -> None:
    """The first of four ranks sees its own block alone, the last all four; all send the same messages in the same order."""
    done, _ = ring_partition(ring_joint("causal"), 4)
    mesh = Mesh((("cp", 4),))
    blocks, orders = [], set()
    for rank in range(4):
        mine = done.module.clone()
        orders.add("\n".join(collective_order(mine)))
        lower_collectives(mine, mesh, rank, {"cp": "0"})
        run_pipeline(mine, parse_pipeline("canonicalize,cse,fold-constants,dce"), PassContext())
        blocks.append([sum(op.name == f"graph.{kind}" for op in mine.walk()) for kind in ("attention", "attention_backward")])
    assert blocks == [[1, 1], [2, 2], [3, 3], [4, 4]]
    assert len(orders) == 1
