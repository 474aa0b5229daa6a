"""Measured curves: read between samples, written to a cluster file and read back, taken instead of formulas."""

from dataclasses import replace

import pytest
from aicc.passes.shard.calibrate import LinkSample, cluster_toml, fit_attention, fit_link, fit_memory
from aicc.passes.shard.cluster import Level, load_cluster
from aicc.passes.shard.collectives import all_times, axis_group, collective_time
from aicc.passes.shard.curves import curve_seconds, rising
from aicc.passes.shard.kernels import attention_time, memory_time
from aicc.passes.shard.layer_cost import SOFTWARE, Placement
from aicc.passes.shard.model import ModelConfig
from aicc.passes.shard.plan import Plan
from aicc.passes.shard.step import predict_step
from aicc.passes.shard.tables import ConfigError

CURVE = ((1000.0, 1e-4), (3000.0, 2e-4), (7000.0, 6e-4))
BOX = load_cluster("cpu-box", nodes=1)
SMALL = ModelConfig("small", hidden=256, layers=4, heads=4, vocab=1024, seq=128, dtype="fp32", tied=False)


@pytest.mark.parametrize(("nbytes", "seconds"), [(1, 1e-4), (1000, 1e-4), (2000, 1.5e-4), (3000, 2e-4), (5000, 4e-4), (7000, 6e-4), (9000, 8e-4)])
def test_between_and_beyond_samples(nbytes, seconds):
    assert curve_seconds(CURVE, nbytes) == pytest.approx(seconds)


def test_a_disturbed_sample_is_pulled_to_its_neighbours():
    assert rising(((1, 1.0), (2, 5.0), (3, 3.0), (4, 6.0))) == ((1, 1.0), (2, 4.0), (3, 4.0), (4, 6.0))
    assert rising(CURVE) == CURVE


def measured():
    """A cluster as `aicc calibrate` makes it."""
    device = fit_memory(BOX.device, [(1e4, 2e-6), (1e6, 1e-4), (1e8, 5e-2)])
    samples = [LinkSample(kind, "ring", size, 2, 1e-4 + size / 1e9) for kind in ("all_reduce", "all_gather") for size in (1e3, 1e5, 1e7)]
    level = fit_link(Level("loopback", 2, 1e-5, 4e9), samples)
    return replace(BOX, groups=(replace(BOX.groups[0], device=device),), levels=(level,))


def test_written_and_read_back(tmp_path):
    path = tmp_path / "here.toml"
    path.write_text(cluster_toml(measured()))
    assert load_cluster(path) == measured()


def test_the_curve_is_taken_for_groups_of_all_children_alone():
    cluster = measured()
    assert collective_time("all_reduce", 1e6, axis_group(cluster, 1, 2)) == pytest.approx(1e-4 + 1e-3)
    assert set(all_times("all_reduce", 1e6, axis_group(cluster, 1, 2))) == {"measured"}
    wide = replace(cluster, levels=(replace(cluster.levels[0], size=4),))
    assert "ring" in all_times("all_reduce", 1e6, axis_group(wide, 1, 2))
    assert memory_time(cluster.device, 1e6) == pytest.approx(1e-4)


@pytest.mark.parametrize("text", ["[[1, 2]]", "[[2, 1.0], [1, 2.0]]", "[[1, -1.0], [2, 2.0]]", "7", "[[1, 2], [3]]"])
def test_a_malformed_curve_is_located(tmp_path, text):
    path = tmp_path / "bad.toml"
    whole = cluster_toml(measured())
    start = whole.index("all_gather = ")
    path.write_text(whole[:start] + f"all_gather = {text}\n")
    with pytest.raises(ConfigError, match=r"bad.toml:\d+: .*all_gather.* must be a list of two or more \[bytes, seconds\] pairs"):
        load_cluster(path)


def test_attention_rates_are_recovered():
    device = BOX.device
    truth = replace(device, efficiency=replace(device.efficiency, attention=0.21, attention_backward=0.6))
    samples = [(flops, attention_time(truth, "fp32", flops), attention_time(truth, "fp32", flops, backward=True)) for flops in (1e8, 1e9)]
    found = fit_attention(device, "fp32", samples).efficiency
    assert (found.attention, found.attention_backward) == (pytest.approx(0.21), pytest.approx(0.6))


def test_collectives_on_the_cores_that_compute_hide_nothing():
    plan, alone = Plan(dp=2, micro_batch=4), replace(BOX.device, overlap_loss=0.0)
    shared = BOX.device
    assert shared.overlap_loss == 1.0
    assert Placement.of(plan, BOX, SOFTWARE["aicc"]).software.overlap_loss == 1.0
    cluster = replace(BOX, groups=(replace(BOX.groups[0], device=alone),))
    assert predict_step(SMALL, plan, BOX, 8).seconds > predict_step(SMALL, plan, cluster, 8).seconds


def test_memory_of_a_model_in_its_own_type_is_less_than_with_master_copies():
    cluster, config = load_cluster("h100-sxm", nodes=1), replace(SMALL, dtype="bf16")
    plan = Plan(dp=8, micro_batch=1)
    mixed, plain = (predict_step(config, plan, cluster, 8, software).memory[0] for software in ("aicc", "aicc-bf16"))
    assert (mixed.gradients, mixed.optimizer) == (pytest.approx(2 * plain.gradients), pytest.approx(3 * plain.optimizer))
