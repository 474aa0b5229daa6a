"""Context parallelism: what each of its two ways moves, when the search takes which, and what may run."""

from dataclasses import replace

import pytest
from aicc.compiler.distributed.layouts import check_supported
from aicc.compiler.errors import UserError
from aicc.passes.shard.cluster import load_cluster
from aicc.passes.shard.model import ModelConfig, Shard
from aicc.passes.shard.plan import Plan, parse_plan, plan_problems
from aicc.passes.shard.planner import Problem, search
from aicc.passes.shard.space import Space
from aicc.passes.shard.workload import block_work

LONG = ModelConfig("long", hidden=1024, layers=4, heads=16, kv_heads=4, ffn=4096, vocab=8192, seq=32768, gated=True, rotary=True, tied=False)
CLUSTER = load_cluster("h100-sxm", nodes=1)


def sent(shard: Shard, phase: str) -> float:
    return sum(c.nbytes for c in block_work(LONG, "dense", 1, shard).comms if c.axis == "cp" and c.phase == phase)


def test_bytes():
    rows, head = LONG.seq / 4, LONG.head_dim
    assert sent(Shard(cp=4, ring=True), "forward") == 2 * rows * 2 * 4 * head * 3  # keys and values of three other ranks
    home = 4 * rows * 2 * 4 * head * 4  # their gradients in float32, once round
    assert sent(Shard(cp=4, ring=True), "backward") == sent(Shard(cp=4, ring=True), "forward") + home
    assert sent(Shard(cp=4), "forward") == sent(Shard(cp=4), "backward") == 2 * rows * head * (16 + 8 + 16)  # q, k and v; what comes out
    work, ring = (sum(k.flops for k in block_work(LONG, "dense", 1, s).kernels if not k.fused) for s in (Shard(cp=4), Shard(cp=4, ring=True)))
    assert work == ring


def test_the_search_takes_the_cheaper_way():
    problem = Problem(LONG, CLUSTER, 1, space=Space(schedules=("1f1b",)).pin(cp=4, tp=2, pp=1))
    ways = {way: search(replace(problem, space=problem.space.pin(context=way))).best for way in ("ring",)}
    assert search(problem).best.seconds <= ways["ring"].seconds
    narrow = replace(problem, space=Space(schedules=("1f1b",)).pin(cp=4, tp=1, dp=1, pp=2))
    pinned = {way: search(replace(narrow, space=narrow.space.pin(context=way))).best.seconds for way in ("ring", "ulysses")}
    assert search(narrow).best.seconds == pytest.approx(min(pinned.values()))


def test_heads_that_do_not_divide_leave_the_ring():
    plan = Plan(cp=8, micro_batch=1)
    assert "cp 8 does not divide the 4 / 1 heads of keys and values of a tensor rank: context=ring" in plan_problems(plan, LONG, CLUSTER, 1)
    assert not plan_problems(replace(plan, context="ring"), LONG, CLUSTER, 1)
    assert plan_problems(replace(plan, context="star"), LONG, CLUSTER, 1)[0].startswith("context 'star' is unknown")


def test_label_file_and_what_runs():
    ring = Plan(cp=2, context="ring")
    assert "cp-ring2" in ring.label and "cp2" in Plan(cp=2).label
    assert parse_plan(ring.to_toml()) == ring
    check_supported(Plan(cp=2))
    check_supported(ring)
    with pytest.raises(UserError, match="expert groups run over the data ranks: ep must be 1 or dp = 4, the plan has ep = 2"):
        check_supported(Plan(dp=4, ep=2))


def test_the_last_rank_of_a_ring_sees_almost_all():
    """Under a causal mask the slowest of n ranks meets all blocks, its own by half; heads for the sequence share the work evenly."""
    def scale(cp, ring):
        return next(k for k in block_work(LONG, "dense", 1, Shard(cp=cp, ring=ring)).kernels if k.fused).scale
    assert [scale(cp, True) for cp in (2, 4, 8)] == [0.75, 0.875, 0.9375]
    assert scale(4, False) == scale(1, False) == 0.5
