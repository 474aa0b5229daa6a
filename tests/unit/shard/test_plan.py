"""Plan files: written, read back, and wrong ones located."""

import json
from dataclasses import replace

import pytest
from aicc.passes.shard import ModelConfig, Plan, load_cluster, load_plan, parse_plan, plan_problems, predict_step
from aicc.passes.shard.model import LatentAttention, MixtureOfExperts
from aicc.passes.shard.plan import SCHEMA
from aicc.passes.shard.plan_file import PlanFile, Target, load_plan_file
from aicc.passes.shard.tables import ConfigError

PLAN = Plan(dp=2, tp=2, pp=2, sp=True, zero=1, micro_batch=2, recompute="selective", schedule="zb-h1", split=(3, 1))
MODEL = ModelConfig("small", hidden=1024, layers=4, heads=8, vocab=8192, seq=512)


def test_round_trip(tmp_path):
    assert parse_plan(PLAN.to_toml()) == PLAN
    assert parse_plan(PLAN.to_json(), "plan.json") == PLAN
    path = tmp_path / "plan.toml"
    path.write_text(PLAN.to_toml())
    assert load_plan(path) == PLAN
    assert set(SCHEMA["properties"]) == {*json.loads(PLAN.to_json()), "target", "model"}


@pytest.mark.parametrize(("old", "new", "message"), [
    ("tp = 2", "tp = 0", r"plan.toml:4: tp = 0: must be an integer of at least 1"),
    ("tp = 2", "tpp = 2", r"plan.toml:4: tpp = 2: is not a key of this table; did you mean 'tp"),
    ("zero = 1", "zero = 4", r"zero = 4: must be at most 3"),
    ("sp = true", "sp = 1", r"sp = 1: must be true or false"),
    ('"zb-h1"', '"zb-h7"', r"schedule = 'zb-h7': is unknown; did you mean 'zb-h1'"),
    ("[3, 1]", "[3, -1]", r"must be a list of block counts"),
])
def test_mistakes_are_located(old, new, message):
    text = PLAN.to_toml()
    assert old in text
    with pytest.raises(ConfigError, match=message):
        parse_plan(text.replace(old, new, 1))


EXPERTS = replace(MODEL, moe=MixtureOfExperts(8, 2, 512, imbalance=1.25), latent=LatentAttention(256, 128, 32, 64, 64))


@pytest.mark.parametrize("model", [MODEL, EXPERTS])
def test_a_file_says_what_it_is_for(tmp_path, model):
    whole = PlanFile(PLAN, Target("a100-80gb-sxm", "1x8", 8, source="model.py"), model)
    path = tmp_path / "plan.toml"
    path.write_text(whole.to_toml())
    assert load_plan_file(path) == whole
    assert load_plan(path) == PLAN
    assert whole.target.cluster().size == PLAN.devices


@pytest.mark.parametrize(("old", "new", "message"), [
    ("version = 1", "version = 2", r"plan.toml:2: version = 2: this aicc reads plan files of version 1"),
    ('mesh = "1x8"', 'mesh = "1y8"', r"plan.toml:[0-9]+: target.mesh = '1y8': mesh '1y8': '1y8' is not an extent"),
    ("global_batch = 8", "global_batch = 0", r"plan.toml:[0-9]+: target.global_batch = 0: must be an integer of at least 1"),
    ("hidden = 1024", "hiden = 1024", r"plan.toml:[0-9]+: model.hiden = 1024: is not a key of this table; did you mean 'hidden'"),
    ("layers = 4", "layers = 0", r"plan.toml: \[model\]: model small: layers = 0"),
    ("top_k = 2", 'top_k = "two"', r"plan.toml:[0-9]+: model.moe.top_k = 'two': must be an integer"),
    ('software = "aicc"', 'software = "megatron"', r"target.software = 'megatron': is unknown; did you mean 'megatron-20"),
])
def test_mistakes_in_what_it_is_for(tmp_path, old, new, message):
    path = tmp_path / "plan.toml"
    text = PlanFile(PLAN, Target("a100-80gb-sxm", "1x8", 8), EXPERTS).to_toml()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError, match=message):
        load_plan_file(path)


@pytest.mark.parametrize(("change", "message"), [
    ({"dp": 4}, "= 16 devices, the mesh has 8"), ({"micro_batch": 3}, "is not a multiple of dp 2"),
    ({"split": (2, 1)}, "split has 2 parts of 3 blocks"), ({"ep": 2}, "does not divide 1 experts"),
    ({"tp": 1, "dp": 4}, "sequence parallelism"), ({"schedule": "zb-v"}, "zb-v needs at least 3")])
def test_problems_are_listed(change, message):
    plan = Plan(**{**vars(PLAN), **change})
    cluster = load_cluster("a100-80gb-sxm")
    assert any(message in p for p in plan_problems(plan, MODEL, cluster, 8))
    with pytest.raises(ConfigError, match="plan dp"):
        predict_step(MODEL, plan, cluster, 8)


def test_a_plan_for_the_mesh_runs():
    report = predict_step(MODEL, PLAN, load_cluster("a100-80gb-sxm"), 8)
    assert report.fits
    assert sum(report.breakdown().values()) == pytest.approx(report.seconds)
