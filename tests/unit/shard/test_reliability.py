"""Stragglers, failures, elastic pipelines, and 100,000 devices in seconds."""

from dataclasses import replace
from time import process_time

import pytest
from aicc.passes.shard.cluster import load_cluster
from aicc.passes.shard.model import ModelConfig
from aicc.passes.shard.plan import Plan
from aicc.passes.shard.reliability import (
    Failures,
    best_interval,
    elastic_plan,
    pipeline_templates,
    run_with_failures,
    with_stragglers,
)
from aicc.passes.shard.step import predict_step

MODEL = ModelConfig("gpt-7b", hidden=4096, layers=32, heads=32, vocab=51200, seq=2048)
CLUSTER = load_cluster("a100-80gb-sxm", nodes=8)
PLAN = Plan(dp=4, tp=4, pp=4, sp=True, zero=1, recompute="full")


def test_one_slow_device_slows_the_step_by_no_more_than_itself():
    nominal = predict_step(MODEL, PLAN, CLUSTER, 128, exact=False)
    assert with_stragglers(MODEL, PLAN, CLUSTER, 128, 0.0).seconds == pytest.approx(nominal.seconds)
    slow = with_stragglers(MODEL, PLAN, CLUSTER, 128, 0.0, slowest=1.5)
    assert 1.3 < slow.seconds / nominal.seconds < 1.5
    assert sum(slow.breakdown().values()) == pytest.approx(slow.seconds)
    jitter = [with_stragglers(MODEL, PLAN, CLUSTER, 128, j).seconds for j in (0.0, 0.02, 0.1)]
    assert jitter == sorted(jitter) and jitter[0] < jitter[1] < jitter[2]
    with pytest.raises(ValueError, match="jitter"):
        with_stragglers(MODEL, PLAN, CLUSTER, 128, -0.1)


def test_goodput_adds_up_and_falls_with_failures():
    calm, rough = (run_with_failures(10.0, 1024, Failures(days * 86400.0), days=60) for days in (5000.0, 200.0))
    assert 0.97 < calm.goodput < 1.0 and calm.failures < rough.failures
    for run in (calm, rough):
        accounted = run.goodput * run.seconds + run.lost + run.checkpointing + run.down
        assert accounted == pytest.approx(run.seconds, rel=1e-3)
    assert rough.goodput < calm.goodput - 0.02
    assert rough.failures == pytest.approx(60 / 200 * 1024, rel=0.2)
    assert run_with_failures(10.0, 8, Failures(1e15), days=1).failures == 0


def test_the_best_interval_is_best():
    failures = Failures(500 * 86400.0, checkpoint_s=60.0)
    best = best_interval(failures, 4096)
    goodput = {f: sum(run_with_failures(10.0, 4096, replace(failures, interval_s=best * f), days=90, seed=s).goodput for s in range(6))
               for f in (0.25, 1.0, 4.0)}
    assert goodput[1.0] > goodput[0.25] and goodput[1.0] > goodput[4.0]


def test_elastic_pipelines_use_the_nodes_that_are_left():
    templates = pipeline_templates(MODEL, PLAN, CLUSTER)
    assert [t.nodes for t in templates] == sorted(t.nodes for t in templates) and len(templates) >= 2
    assert templates[0].period > templates[-1].period
    whole = elastic_plan(MODEL, PLAN, CLUSTER, 128, 8)
    previous = whole.seconds
    for survivors in (7, 5, 3):
        found = elastic_plan(MODEL, PLAN, CLUSTER, 128, survivors)
        assert sum(t.nodes for t, _ in found.pipelines) + found.idle_nodes == survivors
        assert sum(n for _, n in found.pipelines) == 128
        assert found.idle_nodes == 0
        assert found.seconds > previous * 0.999
        assert found.seconds < whole.seconds * 8 / survivors * 1.35
        previous = found.seconds
    huge = replace(MODEL, layers=96, hidden=12288, heads=96, name="big")
    assert elastic_plan(huge, replace(PLAN, pp=1, dp=16), CLUSTER, 128, 1) is None


def test_a_hundred_thousand_devices_in_seconds():
    cluster = load_cluster("h100-sxm", nodes=12500)
    config = ModelConfig("llama-405b", hidden=16384, layers=126, heads=128, kv_heads=8, ffn=53248, vocab=128256, seq=8192, gated=True,
                         rotary=True, tied=False)
    plan = Plan(dp=625, tp=8, pp=20, sp=True, zero=1, recompute="selective", schedule="zb-h1")
    began = process_time()
    report = predict_step(config, plan, cluster, 625 * 80)
    slow = with_stragglers(config, plan, cluster, 625 * 80, 0.02)
    life = run_with_failures(report.seconds, cluster.size, Failures(5 * 365 * 86400.0), days=30)
    assert process_time() - began < 10
    assert cluster.size == 100_000 and 0.2 < slow.mfu < report.mfu < 0.7
    assert life.failures > 1000 and 0.3 < life.goodput < 0.95
