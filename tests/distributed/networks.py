"""Small models with random weights, and the names of the plans that they are trained under."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

VOCABULARY, LENGTH, BATCH = 128, 16, 8
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def gpt2(layers: int) -> torch.nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=layers, n_head=4, n_positions=LENGTH, use_cache=False, resid_pdrop=0.0,
                                      embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2, loss_type="ForCausalLM"))


def llama(layers: int) -> torch.nn.Module:
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
                                        num_key_value_heads=4, max_position_embeddings=LENGTH, use_cache=False, **_IDS))


def mixtral(layers: int) -> torch.nn.Module:
    return MixtralForCausalLM(MixtralConfig(vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
                                            num_key_value_heads=4, num_local_experts=4, max_position_embeddings=LENGTH, use_cache=False,
                                            experts_implementation="batched_mm", **_IDS))


MODELS: dict[str, Any] = {"gpt2": gpt2, "llama": llama, "mixtral": mixtral}


def build(name: str, layers: int = 2, seed: int = 0) -> torch.nn.Module:
    """The model, the same on every rank."""
    torch.manual_seed(seed)
    return MODELS[name](layers)


def batches(count: int) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(7)
    return [torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=random) for _ in range(count)]
