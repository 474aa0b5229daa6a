"""Pipelines of sub-meshes: equal to brute force on small cases, no worse than equal stages, and better where devices or nodes come out odd."""

from dataclasses import replace
from itertools import combinations, product

import pytest
from aicc.passes.shard.cluster import load_cluster
from aicc.passes.shard.model import ModelConfig
from aicc.passes.shard.planner import Infeasible, Problem, search
from aicc.passes.shard.space import Space
from aicc.passes.shard.submesh import _edges, _run, _sizes, _Stages, search_submeshes

SMALL = ModelConfig("small", hidden=1024, layers=4, heads=8, vocab=8192, seq=512, gated=True, rotary=True, tied=False)
SPACE = Space(schedules=("1f1b",), max_context=1, zero=(0, 1))


def brute(problem, rows):
    """The fastest chain over all cuts and sizes, run by the simulator."""
    layers, total, stages, best = problem.config.layers, problem.cluster.size, _Stages(problem, rows), float("inf")
    for count in range(1, layers + 1):
        for cuts, sizes in product(combinations(range(1, layers), count - 1), product(_sizes(problem.cluster), repeat=count)):
            if sum(sizes) > total:
                continue
            edges = (0, *cuts, layers)
            chain, start = [(s, a, b) for s, a, b in zip(sizes, edges, edges[1:], strict=False)], 0
            for k, (s, a, b) in enumerate(chain):
                if stages.best(problem.cluster.device_of_range(start, s), s, *_edges(a, b, layers), count - k) is None:
                    break
                start += s
            else:
                best = min(best, _run(problem, stages, chain, rows, problem.global_batch // rows).seconds)
    return best


@pytest.mark.parametrize(("devices", "batch", "memory"), [(4, 8, None), (6, 8, None), (4, 8, 3.0e9)])
def test_close_to_brute_force(devices, batch, memory):
    """The dynamic program bounds the slowest stage and leaves the exact bubble to the simulator, as Alpa does: within a few percent."""
    cluster = load_cluster("a100-40gb-pcie").with_node_size(devices).with_nodes(1)
    problem = Problem(SMALL, cluster, batch, space=SPACE, memory_limit=memory)
    found = search_submeshes(problem)
    best = min(brute(problem, rows) for rows in (1, 2, 4, 8))
    assert best * (1 - 1e-9) <= found.seconds <= best * 1.03
    assert all(s.memory <= problem.capacity(cluster.device) for s in found.stages)
    assert sum(s.blocks for s in found.stages) == SMALL.layers


def test_three_nodes_are_better_used_by_unequal_stages():
    cluster = load_cluster("a100-40gb-pcie").with_node_size(4).with_nodes(3)
    config = replace(SMALL, layers=8, hidden=4096, heads=32, vocab=32000, seq=1024)
    problem = Problem(config, cluster, 16, space=replace(SPACE, max_micro_batch=4))
    equal, found = search(problem), search_submeshes(problem, max_stages=6)
    assert found.seconds < 0.95 * equal.best.seconds
    assert found.unequal
    assert sum(s.plan.devices for s in found.stages) + found.idle == 12


@pytest.mark.slow
def test_a_slow_node_gets_its_own_degrees_and_fewer_blocks():
    cluster = load_cluster("mixed-a100-v100")
    config = ModelConfig("gpt-7b", hidden=4096, layers=8, heads=32, vocab=51200, seq=2048, dtype="fp16")
    found = search_submeshes(Problem(config, cluster, 16, space=SPACE), max_stages=4)
    per_device = {}
    for stage in found.stages:
        per_device.setdefault(stage.device, []).append(stage.blocks / stage.plan.devices)
    assert len(per_device) == 2 or found.idle
    fast, slow = (per_device.get(name, [0.0]) for name in sorted(per_device, key=lambda n: "V100" in n))
    assert min(fast) >= max(slow)


def test_what_does_not_fit():
    huge = ModelConfig("huge", hidden=16384, layers=8, heads=128, vocab=51200, seq=4096)
    with pytest.raises(Infeasible, match="huge does not fit on 2 devices as a pipeline of sub-meshes"):
        search_submeshes(Problem(huge, load_cluster("a100-40gb-pcie").with_node_size(2).with_nodes(1), 4, space=SPACE))
