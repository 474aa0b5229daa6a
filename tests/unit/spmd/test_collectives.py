"""Passes over collectives, the order of what is lowered, and planted faults."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from aicc.backends.nccl import collective_order, lower_collectives
from aicc.compiler.distributed.auto_shard import auto_shard
from aicc.compiler.distributed.validation import planted_faults, validate_plan
from aicc.ir.core import IRError, Operation
from aicc.ir.parser import parse_module
from aicc.ir.passes import PassContext, parse_pipeline, run_pipeline
from aicc.ir.printer import print_op
from aicc.ir.sharding import Mesh
from aicc.ir.verifier import VerificationError, verify
from aicc.passes.shard import Plan
from aicc.passes.spmd import run_virtual
from aicc.passes.spmd.traffic import traffic

from .programs import Tiny, cross_entropy

MESH = Mesh((("t", 2),))


def module(body: str, arguments: str) -> Operation:
    return parse_module(f"module {{\n func @main {{\n  ^({arguments}):\n{body}\n }}\n}}")


def run(m: Operation, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Every rank's results, one after the other, on fixed inputs that differ from rank to rank."""
    random = torch.Generator().manual_seed(0)
    return [x for rank in run_virtual(m, MESH, [[torch.randn(s, generator=random) for s in shapes] for _ in range(2)]) for x in rank]


def optimise(m: Operation, passes: str, *shapes: tuple[int, ...]) -> str:
    """Runs the passes; the values must stay."""
    before = run(m, *shapes)
    run_pipeline(m, parse_pipeline(passes), PassContext())
    for a, b in zip(before, run(m, *shapes), strict=True):
        torch.testing.assert_close(a, b)
    return print_op(m)


AXIS = 'axis = "t", ranks = 2'


def test_equal_collectives_are_merged() -> None:
    m = module(f"""   %a = dist.all_reduce(%x) {{{AXIS}}} : tensor<4x4xf32>
   %b = dist.all_reduce(%x) {{{AXIS}}} : tensor<4x4xf32>
   %c = dist.all_reduce(%x) {{{AXIS}, kind = "max"}} : tensor<4x4xf32>
   return(%a, %b, %c)""", "%x: tensor<4x4xf32>")
    assert optimise(m, "dist-simplify", (4, 4)).count("dist.all_reduce") == 2


def test_all_reduce_of_pieces_is_a_reduce_scatter() -> None:
    m = module(f"""   %a = dist.all_reduce(%x) {{{AXIS}}} : tensor<4x4xf32>
   %p = dist.shard(%a) {{{AXIS}, dim = 1}} : tensor<4x2xf32>
   %g = dist.all_gather(%p) {{{AXIS}, dim = 1}} : tensor<4x4xf32>
   %q = dist.shard(%g) {{{AXIS}, dim = 1}} : tensor<4x2xf32>
   return(%q)""", "%x: tensor<4x4xf32>")
    text = optimise(m, "dist-simplify", (4, 4))
    assert "dist.reduce_scatter" in text
    assert all(name not in text for name in ("all_reduce", "all_gather", "dist.shard"))


def test_buckets() -> None:
    m = module(f"""   %y = graph.neg(%x) : tensor<4x6xf32>
   %a = dist.all_reduce(%x) {{{AXIS}}} : tensor<4x6xf32>
   %b = dist.all_reduce(%y) {{{AXIS}}} : tensor<4x6xf32>
   %c = dist.reduce_scatter(%x) {{{AXIS}, dim = 1}} : tensor<4x3xf32>
   %d = dist.reduce_scatter(%y) {{{AXIS}, dim = 0}} : tensor<2x6xf32>
   %e = dist.all_gather(%x) {{{AXIS}, dim = 1}} : tensor<4x12xf32>
   %f = dist.all_gather(%y) {{{AXIS}, dim = 1, parts = 3}} : tensor<4x12xf32>
   return(%a, %b, %c, %d, %e, %f)""", "%x: tensor<4x6xf32>")
    before = traffic(m)
    small = m.clone()
    text = optimise(m, "dist-bucket", (4, 6))
    assert [text.count(f"dist.{k}") for k in ("all_reduce", "reduce_scatter", "all_gather")] == [1, 1, 1]
    assert traffic(m) == before
    assert optimise(small, "dist-bucket{bytes=100}", (4, 6)).count("dist.all_reduce") == 2


def test_collectives_start_early_and_end_late() -> None:
    m = module(f"""   %y = graph.neg(%x) : tensor<4x4xf32>
   %z = graph.exp(%x) : tensor<4x4xf32>
   %a = dist.all_reduce(%y) {{{AXIS}}} : tensor<4x4xf32>
   %w = graph.mul(%z, %z) : tensor<4x4xf32>
   %r = graph.add(%a, %w) : tensor<4x4xf32>
   return(%r)""", "%x: tensor<4x4xf32>")
    optimise(m, "dist-overlap", (4, 4))
    func = next(op for op in m.body if op.name == "func")
    assert [op.name.partition(".")[2] or op.name for op in func.body] == ["neg", "all_reduce", "exp", "mul", "wait", "add", "return"]


def test_lowering_has_one_order_and_no_dist_ops() -> None:
    m = module(f"""   %s = dist.shard(%x) {{{AXIS}, dim = 1}} : tensor<4x2xf32>
   %c = dist.coordinate() {{{AXIS}}} : tensor<i64>
   %a = dist.all_reduce(%x) {{{AXIS}, stage = "start"}} : tensor<4x4xf32>
   %b = dist.all_to_all(%x) {{{AXIS}, split = 0, concat = 1}} : tensor<2x8xf32>
   %w = dist.wait(%a, %x) : tensor<4x4xf32>
   return(%s, %c, %w, %b)""", "%x: tensor<4x4xf32>")
    orders = []
    for rank in range(2):
        mine = m.clone()
        orders.append(collective_order(mine))
        lower_collectives(mine, MESH, rank, {"t": "group"})
        verify(mine)
        text = print_op(mine)
        assert not any(op.name.startswith("dist.") for op in mine.walk())
        assert Counter(op["target"] for op in mine.walk() if op.name == "graph.extern") == {
            "_c10d_functional.all_reduce.default": 1, "_c10d_functional.all_to_all_single.default": 1, "aicc_dist.wait.default": 2}
        assert f"starts = [0, {2 * rank}]" in text
    assert orders[0] == orders[1] != []
    with pytest.raises(IRError, match="no process group for mesh axis 't'; there are u"):
        lower_collectives(m, MESH, 0, {"u": "group"})


@pytest.mark.parametrize("line", ["dist.all_gather(%x) {AXIS, dim = 0} : tensor<4x4xf32>", "dist.reduce_scatter(%x) {AXIS, dim = 2} : tensor<4x4xf32>",
                                  "dist.all_reduce(%x) {AXIS, kind = \"mean\"} : tensor<4x4xf32>",
                                  "dist.all_to_all(%x) {AXIS, split = 0, concat = 1} : tensor<4x4xf32>"])
def test_wrong_shapes_are_refused(line: str) -> None:
    m = module(f"   %a = {line.replace('AXIS', AXIS)}\n   return(%a)", "%x: tensor<4x4xf32>")
    with pytest.raises(VerificationError, match="dist"):
        verify(m)


def test_validation_and_planted_faults() -> None:
    """The plan is right, and every fault is caught: by the results alone, and by name when values in between may be seen."""
    model, ids = Tiny(), torch.arange(32).reshape(4, 8)
    following = (ids * 7 + 3) % 32
    sharding = auto_shard(model, (ids,), targets=(following,), loss_fn=cross_entropy, mesh=4, optimizer=torch.optim.AdamW,
                          plan=Plan(dp=2, tp=2, sp=True, zero=2, micro_batch=2))
    report = validate_plan(sharding, model, [ids, following])
    assert report.ok, str(report)
    assert "largest relative difference" in str(report)
    assert len(report.updates) > 3
    for results_only in (True, False):
        faults = planted_faults(sharding, model, [ids, following], results_only=results_only)
        print(faults)
        assert not faults.missed
        assert set(faults.planted) == {"dropped all-reduce", "wrong reduce operator", "gathered in the wrong order", "swapped gradients",
                                       "micro-batch off by one"}
        assert sum(faults.planted.values()) > 20


def test_gathers_start_as_far_ahead_as_memory_allows() -> None:
    """Each gathers 128 bytes: with room for two, the third starts where the first has been read."""
    lines = "\n".join(f"   %g{i} = dist.all_gather(%w{i}) {{{AXIS}, dim = 0}} : tensor<8x4xf32>\n"
                      f"   %h{i + 1} = graph.add(%h{i}, %g{i}) : tensor<8x4xf32>" for i in range(3))
    m = module(f"{lines}\n   return(%h3)", "%h0: tensor<8x4xf32>, %w0: tensor<4x4xf32>, %w1: tensor<4x4xf32>, %w2: tensor<4x4xf32>")
    optimise(m, "dist-overlap{ahead=256}", (8, 4), (4, 4), (4, 4), (4, 4))
    func = next(op for op in m.body if op.name == "func")
    names = [op.name.partition(".")[2] or op.name for op in func.body]
    assert names == ["all_gather", "all_gather", "wait", "all_gather", "add", "wait", "add", "wait", "add", "return"]


def test_large_gradients_travel_alone_and_at_once() -> None:
    m = module(f"""   %a = graph.neg(%x) : tensor<8x8xf32>
   %b = graph.exp(%a) : tensor<8x8xf32>
   %p = dist.reduce_scatter(%a) {{{AXIS}, dim = 0}} : tensor<4x8xf32>
   %q = dist.reduce_scatter(%b) {{{AXIS}, dim = 0}} : tensor<4x8xf32>
   return(%q, %p)""", "%x: tensor<8x8xf32>")
    optimise(m, "dist-bucket{small=100}", (8, 8))
    func = next(op for op in m.body if op.name == "func")
    assert [op.name.partition(".")[2] or op.name for op in func.body] == ["neg", "reduce_scatter", "exp", "reduce_scatter", "return"]
