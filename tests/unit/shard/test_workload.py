"""The transformer model: parameters, FLOPs and activation bytes against published formulas and known models."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from aicc.passes.shard.model import (
    LatentAttention,
    MixtureOfExperts,
    ModelConfig,
    Shard,
    block_params,
    from_transformers,
)
from aicc.passes.shard.workload import block_work, model_flops

GPT = ModelConfig("gpt-175b", hidden=12288, layers=96, heads=96, vocab=51200, seq=2048, dropout=True, learned_positions=True,
                  attention="unfused", dtype="fp16")
LLAMA = ModelConfig("llama-405b", hidden=16384, layers=126, heads=128, kv_heads=8, ffn=53248, vocab=128256, seq=8192,
                    gated=True, rotary=True, tied=False)
DEEPSEEK = ModelConfig("deepseek-v3", hidden=7168, layers=61, heads=128, ffn=18432, vocab=129280, seq=4096, gated=True,
                       rotary=True, tied=False, head_dim=128, moe=MixtureOfExperts(256, 8, 2048, 2048, 3),
                       latent=LatentAttention(1536, 512, 64, 128, 128))


@pytest.mark.parametrize("tp", [1, 2, 8])
@pytest.mark.parametrize("micro_batch", [1, 4])
def test_activation_bytes_match_korthikanti(tp, micro_batch):
    s, b, h, a = GPT.seq, micro_batch, GPT.hidden, GPT.heads
    tensor = block_work(GPT, "dense", b, Shard(tp=tp))
    assert tensor.saved_bytes("none") == pytest.approx(s * b * h * (10 + 24 / tp + 5 * a * s / (h * tp)), rel=1e-12)
    sequence = block_work(GPT, "dense", b, Shard(tp=tp, sp=tp > 1))
    assert sequence.saved_bytes("none") == pytest.approx(s * b * h / tp * (34 + 5 * a * s / h), rel=1e-12)
    assert sequence.saved_bytes("selective") == pytest.approx(s * b * h / tp * 34, rel=1e-12)
    assert tensor.saved_bytes("full") == 2 * s * b * h


@pytest.mark.parametrize(("h", "layers", "a", "billions"), [
    (2304, 24, 24, 1.7), (4096, 36, 32, 7.5), (8192, 48, 64, 39.1), (12288, 80, 96, 145.6), (20480, 105, 128, 529.6)])
def test_parameters_of_the_published_gpts(h, layers, a, billions):
    model = replace(GPT, hidden=h, layers=layers, heads=a, ffn=4 * h, head_dim=h // a, kv_heads=a)
    assert model.params() / 1e9 == pytest.approx(billions, abs=0.051)  # published to one decimal
    exact = 12 * layers * h * h * (1 + 13 / (12 * h) + (51200 + 2048) / (12 * layers * h))
    assert model.params() == pytest.approx(exact, rel=1e-4)


def test_flops_match_narayanan():
    b, s, layers, h, v = 64, GPT.seq, GPT.layers, GPT.hidden, GPT.vocab
    published = 72 * b * s * layers * h**2 * (1 + s / (6 * h) + v / (12 * layers * h))
    assert model_flops(GPT, b * s) == pytest.approx(published, rel=1e-9)


def test_known_models():
    assert LLAMA.params() / 1e9 == pytest.approx(405.9, rel=0.002)
    assert DEEPSEEK.params() / 1e9 == pytest.approx(671, rel=0.003)
    assert DEEPSEEK.active_params() / 1e9 == pytest.approx(37.5, rel=0.03)
    assert DEEPSEEK.runs == (("embedding", 1), ("dense", 3), ("moe", 58), ("head", 1))
    assert LLAMA.blocks.count("dense") == 126


@pytest.mark.parametrize(("model", "kind"), [(GPT, "dense"), (LLAMA, "dense"), (DEEPSEEK, "moe"), (LLAMA, "head")])
def test_sharding_divides_gemm_work(model, kind):
    whole = block_work(model, kind, 1, Shard()).forward_flops
    for shard in (Shard(tp=4, sp=True), Shard(cp=4), Shard(tp=2, cp=2)):
        if model.latent and shard.tp > 1:
            continue  # the latent projections down are repeated on every tensor rank
        assert block_work(model, kind, 1, shard).forward_flops == pytest.approx(whole / (shard.tp * shard.cp), rel=1e-9)
    if model.moe:
        # Experts spread over ep: each device's tokens leave and as many come.
        assert block_work(model, kind, 1, Shard(ep=8)).forward_flops == pytest.approx(whole, rel=1e-9)
        assert block_params(model, kind).local(Shard(ep=8))[1] == block_params(model, kind).expert / 8


def test_sequence_parallel_moves_the_same_bytes_forward():
    size = 2 * GPT.seq * GPT.hidden
    plain = [c for c in block_work(GPT, "dense", 1, Shard(tp=8)).comms if c.phase == "forward"]
    thin = [c for c in block_work(GPT, "dense", 1, Shard(tp=8, sp=True)).comms if c.phase == "forward"]
    assert [(c.kind, c.nbytes) for c in plain] == [("all_reduce", size)] * 2
    assert sorted((c.kind, c.nbytes) for c in thin) == [("all_gather", size)] * 2 + [("reduce_scatter", size)] * 2
    assert block_work(GPT, "dense", 1, Shard()).comms == ()


def test_flash_attention_keeps_no_scores():
    flash = replace(GPT, attention="flash", dropout=False)
    unfused = replace(flash, attention="unfused")
    kept = [block_work(m, "dense", 1, Shard()).saved_bytes("none") for m in (flash, unfused)]
    assert kept[0] < kept[1]


def test_grouped_queries_save_keys_and_values():
    by_name = {s.name: s.nbytes for s in block_work(LLAMA, "dense", 1, Shard()).saved}
    assert by_name["k"] * 16 == by_name["q"]


def test_imbalance_slows_experts():
    uneven = replace(DEEPSEEK, moe=replace(DEEPSEEK.moe, imbalance=1.5))
    even_flops, uneven_flops = (block_work(m, "moe", 1, Shard(ep=8)).forward_flops for m in (DEEPSEEK, uneven))
    assert uneven_flops > even_flops


def test_from_transformers_by_attribute_names():
    llama = SimpleNamespace(model_type="llama", hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
                            num_key_value_heads=8, intermediate_size=14336, vocab_size=128256,
                            max_position_embeddings=8192, hidden_act="silu",
                            tie_word_embeddings=False)
    model = from_transformers(llama, seq=4096)
    assert model.params() / 1e9 == pytest.approx(8.03, rel=0.002)
    assert (model.seq, model.gated, model.kv_heads) == (4096, True, 8)
    gpt2 = SimpleNamespace(model_type="gpt2", n_embd=768, n_layer=12, n_head=12, vocab_size=50257, n_positions=1024,
                           activation_function="gelu_new", tie_word_embeddings=True, n_inner=None)
    assert from_transformers(gpt2).params() / 1e6 == pytest.approx(124.4, rel=0.002)
    with pytest.raises(ValueError, match=r"none of hidden_size, n_embd, d_model"):
        from_transformers(SimpleNamespace(vocab_size=1))


def test_from_real_transformers_configs():
    transformers = pytest.importorskip("transformers")
    mixtral = from_transformers(transformers.MixtralConfig(), seq=4096)
    assert mixtral.params() / 1e9 == pytest.approx(46.7, rel=0.005)
    assert mixtral.moe is not None and mixtral.moe.top_k == 2
    deepseek = from_transformers(transformers.DeepseekV3Config(), seq=4096)
    assert deepseek.params() / 1e9 == pytest.approx(671, rel=0.005)


@pytest.mark.parametrize(("change", "message"), [({"hidden": 0}, "hidden = 0"), ({"kv_heads": 7}, "not a multiple"),
                                                 ({"attention": "magic"}, "allowed: flash, unfused")])
def test_mistakes(change, message):
    with pytest.raises(ValueError, match=message):
        replace(GPT, **change)
