"""Plans for forward passes: the cache, the two phases, the objectives, and what does not fit."""

from dataclasses import replace

import pytest
from aicc.passes.shard.cluster import load_cluster
from aicc.passes.shard.inference import InferenceProblem, cache_bytes_per_token, plan_inference, predict_inference
from aicc.passes.shard.model import LatentAttention, ModelConfig
from aicc.passes.shard.plan import Plan
from aicc.passes.shard.planner import Infeasible

LLAMA70 = ModelConfig("llama-70b", hidden=8192, layers=80, heads=64, kv_heads=8, ffn=28672, vocab=128256, seq=4096, gated=True, rotary=True,
                      tied=False)
NODE = load_cluster("h100-sxm")
PROBLEM = InferenceProblem(LLAMA70, NODE, batch=16, prompt=2048, output=2048)


def plan(**changes):
    base = Plan(**changes)
    return replace(base, split=tuple(80 // base.pp for _ in range(base.pp)))


def test_cache_bytes():
    assert cache_bytes_per_token(LLAMA70, 1) == 2 * 8 * 2 * 128
    assert cache_bytes_per_token(LLAMA70, 8) == 2 * 2 * 128
    assert cache_bytes_per_token(LLAMA70, 16) == 2 * 2 * 128  # a head is not cut
    latent = replace(LLAMA70, latent=LatentAttention(1536, 512, 64, 128, 128))
    assert cache_bytes_per_token(latent, 8) == 2 * 576
    report = predict_inference(PROBLEM, plan(tp=8))
    assert report.cache == 80 * 16 * 4096 * 2 * 2 * 128
    assert report.weights == pytest.approx(2 * LLAMA70.params() / 8, rel=0.01)


def test_decode_reads_all_weights_and_prefill_computes():
    report = predict_inference(replace(PROBLEM, batch=1), plan(tp=8))
    reading = report.weights / NODE.device.memory_bandwidth
    assert reading < report.token_s < 3 * reading
    computing = 2 * LLAMA70.params() * 2048 / 8 / NODE.device.flops("bf16")
    assert computing < report.first_token_s < 3 * computing


def test_more_ranks_lower_latency_and_larger_batches_raise_throughput():
    tokens = [predict_inference(replace(PROBLEM, batch=8), plan(dp=8 // tp, tp=tp)).token_s for tp in (2, 4, 8)]
    assert tokens == sorted(tokens, reverse=True)
    rates = [predict_inference(replace(PROBLEM, batch=b), plan(tp=8)).tokens_per_second for b in (1, 8, 64)]
    assert rates == sorted(rates) and rates[2] > 10 * rates[0]
    long, short = (predict_inference(replace(PROBLEM, prompt=p), plan(tp=8)).token_s for p in (32768, 1024))
    assert long > short


def test_the_best_is_the_best_of_all():
    result = plan_inference(PROBLEM)
    every = []
    for tp in (1, 2, 4, 8):
        for pp in (1, 2, 4, 8):
            if 8 % (tp * pp) == 0:
                r = predict_inference(PROBLEM, plan(dp=8 // tp // pp, tp=tp, pp=pp))
                every += [r] if r.fits else []
    assert result.token.token_s == min(r.token_s for r in every)
    assert result.first_token.first_token_s == min(r.first_token_s for r in every)
    assert result.request.request_s == min(r.request_s for r in every)
    assert result.throughput.tokens_per_second == max(r.tokens_per_second for r in every)
    pinned = plan_inference(replace(PROBLEM, pins=(("tp", 4),)))
    assert pinned.token.plan.tp == 4 and pinned.token.token_s >= result.token.token_s


def test_what_does_not_fit_says_why():
    with pytest.raises(Infeasible, match=r"does not fit on 1 x H100-SXM5-80GB for inference .* most of it is weights"):
        plan_inference(replace(PROBLEM, cluster=NODE.with_node_size(1), batch=1, prompt=128, output=128))
    with pytest.raises(Infeasible, match="most of it is the cache of keys and values"):
        plan_inference(replace(PROBLEM, batch=512, prompt=16384))
    with pytest.raises(Infeasible, match="no plan exists for 8 devices and a batch of 16 with tp=3"):
        plan_inference(replace(PROBLEM, pins=(("tp", 3),)))
