"""Partitioned programs mean what the whole program means, for every way to cut their arguments; and cost what they should."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from aicc.compiler.distributed.joint import Joint
from aicc.ir import equivalent
from aicc.ir.core import IRError
from aicc.ir.parser import parse_module
from aicc.ir.printer import print_with_resources
from aicc.ir.sharding import Mesh, Placement, partial, placement_from_attribute, shard
from aicc.passes.spmd import Partitioned, Policy, partition, tensor_seeds
from aicc.passes.spmd.rules import strategies
from aicc.passes.spmd.validate import validate

from .programs import function_joint, tiny_joint

FUNCTIONS: dict[str, Any] = {
    "matmul": (lambda x, w: x @ w, (4, 6, 8), (8, 4)),
    "broadcast": (lambda x, w: x * w + w, (4, 6, 8), (6, 1)),
    "reshape and permute": (lambda x, w: (x.reshape(8, 3, 8) @ w).permute(1, 0, 2).reshape(3, 32), (4, 6, 8), (8, 4)),
    "merge inner dimensions": (lambda x, w: (x * w).reshape(4, 48).reshape(2, 2, 6, 8).sin(), (4, 6, 8), (6, 8)),
    "softmax": (lambda x, w: torch.softmax(x * w, -1), (4, 8), (8,)),
    "log softmax": (lambda x, w: torch.log_softmax(x * w, 0), (4, 8), (8,)),
    "means": (lambda x, w: (x * w).mean((0, 2)) + (x - w).mean(), (4, 6, 8), (6, 8)),
    "largest": (lambda x, w: (x * w).amax(1) + (x + w).amin(1), (4, 8), (8,)),
    "layer norm": (lambda x, w: F.layer_norm(x, (8,), w), (4, 6, 8), (8,)),
    "rms norm": (lambda x, w: F.rms_norm(x, (8,), w), (4, 6, 8), (8,)),
    "slices and cat": (lambda x, w: torch.cat([(x * w)[..., 4:], (x * w)[..., :4]], -1) @ torch.ones(8, 2), (4, 8), (8,)),
    "pad": (lambda x, w: F.pad(x * w, (1, 1)).cumsum(1), (4, 8), (8,)),
    "attention": (lambda x, w: F.scaled_dot_product_attention(x, x * w, x + w, is_causal=True), (2, 4, 6, 8), (4, 1, 8)),
    "table": (lambda x, w: F.embedding((x.abs() * 3).long() % 8, w).tanh(), (4, 6), (8, 4)),
    "gather": (lambda x, w: (x * w).gather(1, (x.abs() * 3).long()[:, :1] % 8), (4, 8), (8,)),
    "convolution": (lambda x, w: F.conv2d(x, w, padding=1), (4, 2, 6, 6), (4, 2, 3, 3)),
    "sorted": (lambda x, w: (x * w).topk(2, dim=1).values, (4, 8), (8,)),
}


def cuts(shape: tuple[int, ...]) -> list[Placement | None]:
    """Replicated, and cut along every dimension that comes out even; in two parts where that does."""
    found: list[Placement | None] = [None]
    for d, size in enumerate(shape):
        found += [shard(d, p) for p in (1, 2) if size % (2 * p) == 0]
    return found


def partition_and_validate(joint: Joint, mesh: Mesh, policies: list[Policy], arguments: list[dict], gradients: list[dict]) -> Partitioned:
    func = next(op for op in joint.module.body if op.name == "func")
    random = torch.Generator().manual_seed(0)
    inputs = [torch.randn(tuple(a.type.shape), generator=random, dtype=torch.float64) if a.type.dtype.is_float
              else torch.randint(0, 32, tuple(a.type.shape), generator=random) for a in func.body.args]
    placements = [*arguments, *[{}] * len(joint.tangents)]
    results = [*[{}] * joint.outputs, *gradients]
    done = partition(joint.module, mesh, policies, placements, results)
    report = validate(joint.module, done, mesh, [p.axis for p in policies], placements, inputs, results=results)
    assert report.ok, str(report.first)
    assert report.compared > 2
    return done


@pytest.mark.product
@pytest.mark.parametrize("role", ["data", "tensor"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_cut(name: str, role: str) -> None:
    """All placements of both arguments; the gradient lies as the weight, and cut where the weight is whole."""
    function, x, w = FUNCTIONS[name]
    joint = function_joint(function, x, w)
    assert [a.kind for a in joint.arguments][:2] == ["param", "input"]
    constants = [{}] * (len(joint.arguments) - 2)
    for first in cuts(w):
        for second in cuts(x):
            weight = {} if first is None else {"t": first}
            given = {} if second is None else {"t": second}
            gradient = weight or ({"t": cuts(w)[-1]} if cuts(w)[-1] is not None else {})
            policy = Policy("t", role, sequence=role == "tensor")
            partition_and_validate(joint, Mesh((("t", 2),)), [policy], [weight, given, *constants], [gradient] * len(joint.gradients))


def _counts(done: Partitioned) -> Counter[tuple[str, str]]:
    return Counter((op.name.removeprefix("dist."), op["axis"]) for op in done.module.walk()
                   if op.name.startswith("dist.") and op.name not in ("dist.mesh", "dist.coordinate", "dist.shard"))


@pytest.fixture(scope="module")
def tiny() -> Joint:
    return tiny_joint()


def _tensor_arguments(joint: Joint, ranks: int) -> list[dict[str, Placement]]:
    seeds = tensor_seeds(joint.module, ranks, joint.outputs)
    return [{"tp": seeds[i]} if i in seeds else {} for i in range(len(joint.arguments))]


def test_seeds_are_megatrons(tiny: Joint) -> None:
    """By columns, by rows, the fused projection part by part, the tables by rows of the vocabulary; norms are whole."""
    seeds = {tiny.arguments[i].name: p for i, p in tensor_seeds(tiny.module, 2, tiny.outputs).items()}
    assert seeds == {"embed.weight": shard(0), "qkv.weight": shard(0, 3), "qkv.bias": shard(0, 3), "proj.weight": shard(1), "up.weight": shard(0),
                     "up.bias": shard(0), "down.weight": shard(1), "head.weight": shard(0)}


def test_seeds_leave_alone_what_would_be_gathered(tiny: Joint) -> None:
    """Four heads do not come out even over 8 ranks: their projection stays whole, the MLP is cut, and no activation is gathered forward."""
    arguments = _tensor_arguments(tiny, 8)
    seeds = {a.name for a, p in zip(tiny.arguments, arguments, strict=True) if p}
    assert not seeds & {"qkv.weight", "qkv.bias"}
    assert {"up.weight", "down.weight", "head.weight"} <= seeds


def test_tensor_parallel_collectives(tiny: Joint) -> None:
    """All-reduces alone: after embedding, attention and MLP forward, before them backward, and small ones of the loss."""
    arguments = _tensor_arguments(tiny, 2)
    done = partition_and_validate(tiny, Mesh((("tp", 2),)), [Policy("tp", "tensor")], arguments, [arguments[i] for i in tiny.gradients])
    large = [op for op in done.module.walk() if op.name == "dist.all_reduce" and op.result.type.numel >= 4 * 8 * 16]
    assert set(_counts(done)) == {("all_reduce", "tp")}
    assert len(large) == 3 + 3  # embedding, attention, MLP; head, MLP, attention


def test_sequence_parallel_collectives(tiny: Joint) -> None:
    """Reduce-scatters and all-gathers take the place of the all-reduces of activations."""
    arguments = _tensor_arguments(tiny, 2)
    done = partition_and_validate(tiny, Mesh((("tp", 2),)), [Policy("tp", "tensor", sequence=True)], arguments,
                                  [arguments[i] for i in tiny.gradients])
    large = [op for op in done.module.walk() if op.name == "dist.all_reduce" and op.result.type.numel >= 4 * 8 * 16]
    counts = _counts(done)
    assert not large
    assert counts["reduce_scatter", "tp"] == 3 + 3
    assert counts["all_gather", "tp"] >= 5


@pytest.mark.parametrize("zero", [2, 3])
def test_zero_collectives(tiny: Joint, zero: int) -> None:
    """Gradients are reduce-scattered, and with ZeRO 3 parameters gathered: each once (forward and backward share it before they are cut)."""
    cut = {i: {"dp": shard(0)} for i, a in enumerate(tiny.arguments) if a.kind == "param"}
    inputs = [{"dp": shard(0)} if a.kind == "input" else cut.get(i, {}) if zero == 3 else {} for i, a in enumerate(tiny.arguments)]
    done = partition_and_validate(tiny, Mesh((("dp", 2),)), [Policy("dp")], inputs, [cut[i] for i in tiny.gradients])
    counts = _counts(done)
    assert counts["reduce_scatter", "dp"] == len(cut)
    assert counts["all_gather", "dp"] == (len(cut) if zero == 3 else 0)
    assert counts["all_reduce", "dp"] <= 2  # the loss, and what divides it


def test_two_axes_and_text(tiny: Joint) -> None:
    """A mixed plan on four ranks; its module prints, parses back equal, and says how its values lie."""
    arguments = _tensor_arguments(tiny, 2)
    arguments = [{**p, "dp": shard(0)} if a.kind == "input" else p for a, p in zip(tiny.arguments, arguments, strict=True)]
    done = partition_and_validate(tiny, Mesh((("dp", 2), ("tp", 2))), [Policy("tp", "tensor", sequence=True), Policy("dp")], arguments,
                                  [arguments[i] for i in tiny.gradients])
    text, resources = print_with_resources(done.module)
    assert equivalent(parse_module(text, resources=resources), done.module)
    assert "{dp = {shard = 0}, tp = {shard = 1}}" in text or "{tp = {shard = 1}, dp = {shard = 0}}" in text
    assert 'dist.mesh @mesh() {shape = [2, 2], axes = ["dp", "tp"]}' in text


def test_uneven_pieces_are_refused(tiny: Joint) -> None:
    with pytest.raises(IRError, match="dimension 0 of size 4 cannot be cut into 3"):
        partition(tiny.module, Mesh((("dp", 3),)), [Policy("dp")], [{"dp": shard(0)} if a.kind == "input" else {} for a in tiny.arguments] + [{}],
                  [{}] * (tiny.outputs + len(tiny.gradients)))


@pytest.mark.parametrize("placement", [shard(2), shard(0, 3), partial(), partial("max")])
def test_placements_as_attributes(placement: Placement) -> None:
    assert placement_from_attribute(placement.attribute) == placement
    with pytest.raises(IRError, match="is no placement"):
        placement_from_attribute({"shard": "x"})


def test_called_attention_is_cut_by_sequences_and_by_heads() -> None:
    """The states of random numbers among its results are on every rank; a mask for all heads too."""
    module = parse_module("""module { func @main { ^(%q: tensor<2x4x8x8xbf16>, %k: tensor<2x4x8x8xbf16>, %v: tensor<2x4x8x8xbf16>, %m: tensor<2x1x8x8xbf16>):
  %o, %l, %s = graph.extern(%q, %k, %v, %m) {target = "aten._scaled_dot_product_cudnn_attention.default", args = [{operand = 0}, {operand = 1},
    {operand = 2}, {operand = 3}, true], result_kinds = ["tensor", "tensor", "tensor"], random = true}
    : tensor<2x4x8x8xbf16>, tensor<2x4x8x1xf32>, tensor<i64>
  return(%o, %l, %s) } }""")
    op = next(op for op in module.walk() if op.name == "graph.extern")
    found = strategies(op, 2)
    whole = Placement("replicate")
    assert [(s.operands, s.results) for s in found] == [((shard(0),) * 4, (shard(0), shard(0), whole)),
                                                        ((shard(1), shard(1), shard(1), whole), (shard(1), shard(1), whole))]
    assert strategies(op, 3) == []
