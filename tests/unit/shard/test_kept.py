"""What the planner thinks that a step keeps between forward and backward is what the partitioned programs keep."""

from __future__ import annotations

import math
from typing import Any

import aicc
import pytest
import torch
from aicc.passes.shard import from_transformers, load_cluster, predict_step
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

BATCH, LENGTH, WIDTH, VOCABULARY = 8, 64, 64, 512
PLANS: dict[str, dict[str, Any]] = {"one": {}, "dp2": {"dp": 2}, "zero3": {"dp": 2, "zero": 3}, "tp2": {"tp": 2}, "tp2+sp": {"tp": 2, "sp": True}}


def network(name: str) -> tuple[Any, torch.nn.Module]:
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if name == "gpt2":
        config: Any = GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=LENGTH, use_cache=False, resid_pdrop=0.0,
                                 embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, loss_type="ForCausalLM")
        return config, GPT2LMHeadModel(config)
    config = LlamaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=4, max_position_embeddings=LENGTH, use_cache=False, tie_word_embeddings=False, **ids)
    return config, LlamaForCausalLM(config)


@pytest.mark.parametrize("name", [pytest.param("llama", marks=pytest.mark.slow), "gpt2"])
def test_kept_bytes(name: str) -> None:
    with torch.device("meta"):
        config, model = network(name)
    ids = torch.zeros(BATCH, LENGTH, dtype=torch.long)
    sizes = from_transformers(config, seq=LENGTH, dtype="fp32")
    for degrees in PLANS.values():
        plan = aicc.Plan(micro_batch=BATCH // degrees.get("dp", 1), **degrees)
        sharding = aicc.auto_shard(model, {"input_ids": ids, "labels": ids}, mesh=plan.devices, plan=plan, device="cpu")
        program = sharding.program()
        func = next(op for op in program.cut.forward.body if op.name == "func")
        kept = sum(math.prod(v.type.shape) * v.type.dtype.bytes for v in func.body.terminator.operands[program.joint.outputs:])  # type: ignore[attr-defined]
        cluster = load_cluster("cpu-box", mesh=aicc.Mesh.parse(f"1x{plan.devices}"))
        thought = predict_step(sizes, plan, cluster, BATCH, "aicc-fp32").memory[0].activations
        assert thought == pytest.approx(kept, rel=0.03), plan.label
