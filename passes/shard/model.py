"""The model as the planner sees it: sizes of a decoder-only transformer, dense or with experts, and how a block is cut.

Entry points: `ModelConfig`, `from_transformers(config)`, `block_params(config, kind)`.

A model is a run-length list of block kinds (`embedding`, `dense`, `moe`, `head`): equal blocks are described once, whatever
their number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Protocol

from .hashing import hash_once

__all__ = ["ELEMENT", "CustomBlocks", "LatentAttention", "MixtureOfExperts", "ModelConfig", "Params", "Shard", "block_params",
           "from_transformers"]

ELEMENT = {"fp32": 4, "tf32": 4, "bf16": 2, "fp16": 2, "fp8": 2}  # fp8 GEMMs still pass 16-bit activations around


@dataclass(frozen=True)
class MixtureOfExperts:
    """Routed experts. `ffn` is one expert's hidden width, `shared_ffn` that of the experts every token takes (0: none).

    `first_dense` blocks at the front stay dense. `imbalance` is tokens of the busiest device over the mean (1 = balanced).
    """

    experts: int
    top_k: int
    ffn: int
    shared_ffn: int = 0
    first_dense: int = 0
    imbalance: float = 1.0


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2/V3): low-rank queries and keys/values."""

    q_rank: int
    kv_rank: int
    rope_dim: int
    nope_dim: int
    value_dim: int


class CustomBlocks(Protocol):
    """Blocks of a model that is no decoder of known sizes (see `traced.py`). Hashable."""

    def runs(self) -> tuple[tuple[str, int], ...]:
        """Kinds in order with their counts; the first is `embedding`, the last `head`."""

    def params(self, kind: str) -> Params:
        """Parameters of one block."""

    def work(self, kind: str, micro_batch: int, shard: Shard) -> Any:
        """The `workload.BlockWork` of one block on one device."""

    def cut(self, kind: str, kernel: str, shard: Shard) -> str:
        """How a kernel's weight is cut over the tensor axis, in words."""


@hash_once
@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer, or anything that `custom` describes (then hidden and seq say what passes between blocks).

    Zeros mean the usual: kv_heads = heads, head_dim = hidden / heads, ffn = 4 * hidden.

    attention: `unfused` materialises the score matrix (2021 practice), `flash` streams it (score FLOPs halved by the
    causal mask).
    """

    name: str
    hidden: int
    layers: int
    heads: int
    vocab: int
    seq: int
    kv_heads: int = 0
    head_dim: int = 0
    ffn: int = 0
    gated: bool = False
    dropout: bool = False
    rotary: bool = False
    tied: bool = True
    learned_positions: bool = False
    attention: str = "flash"
    fused_loss: bool = True
    dtype: str = "bf16"
    moe: MixtureOfExperts | None = None
    latent: LatentAttention | None = None
    custom: CustomBlocks | None = None

    def __post_init__(self) -> None:
        for field in ("hidden", "layers", "heads", "vocab", "seq"):
            if getattr(self, field) < 1:
                raise ValueError(f"model {self.name}: {field} = {getattr(self, field)}: must be a positive integer")
        for field, usual in (("kv_heads", self.heads), ("head_dim", self.hidden // self.heads), ("ffn", 4 * self.hidden)):
            if getattr(self, field) == 0:
                object.__setattr__(self, field, usual)
        if self.heads % self.kv_heads:
            raise ValueError(f"model {self.name}: heads = {self.heads} is not a multiple of kv_heads = {self.kv_heads}")
        if self.attention not in ("flash", "unfused"):
            raise ValueError(f"model {self.name}: attention = {self.attention!r}: allowed: flash, unfused")

    @cached_property
    def runs(self) -> tuple[tuple[str, int], ...]:
        """Block kinds in order with their counts: embedding, dense and moe runs, head."""
        if self.custom is not None:
            return self.custom.runs()
        if self.moe is None:
            middle: tuple[tuple[str, int], ...] = (("dense", self.layers),)
        else:
            front = min(self.moe.first_dense, self.layers)
            middle = tuple(r for r in (("dense", front), ("moe", self.layers - front)) if r[1])
        return (("embedding", 1), *middle, ("head", 1))

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """Every block's kind in order."""
        return tuple(kind for kind, count in self.runs for _ in range(count))

    def experts(self) -> MixtureOfExperts:
        """The experts. Raises ValueError for a dense model."""
        if self.moe is None:
            raise ValueError(f"model {self.name} has no experts")
        return self.moe

    def params(self) -> float:
        """All parameters (a tied head adds nothing)."""
        return sum(count * block_params(self, kind).total for kind, count in self.runs) - (
            self.vocab * self.hidden if self.tied else 0)

    def active_params(self) -> float:
        """Parameters that one token meets."""
        if self.moe is None:
            return self.params()
        idle = (self.moe.experts - self.moe.top_k) * 3 * self.hidden * self.moe.ffn
        return self.params() - idle * sum(count for kind, count in self.runs if kind == "moe")


@dataclass(frozen=True)
class Shard:
    """How one block is cut: tensor (with sequence), context and expert degrees. Experts are cut over `ep` whole. ring: keys and values go round the
    context ranks, instead of heads being exchanged for the sequence.
    """

    tp: int = 1
    sp: bool = False
    cp: int = 1
    ep: int = 1
    ring: bool = False


@dataclass(frozen=True)
class Params:
    """Parameters of a block: `dense` ones are cut by tp, `expert` ones by ep, `whole` ones (norms) by neither."""

    dense: float = 0.0
    expert: float = 0.0
    whole: float = 0.0

    @property
    def total(self) -> float:
        return self.dense + self.expert + self.whole

    def local(self, shard: Shard) -> tuple[float, float]:
        """(parameters replicated over all data-parallel ranks, expert parameters replicated over dp / ep) on one device."""
        return self.dense / shard.tp + self.whole, self.expert / shard.ep


@lru_cache(maxsize=1024)
def block_params(config: ModelConfig, kind: str) -> Params:
    """Parameters of one block of `kind`, biases and norms included."""
    if config.custom is not None:
        return config.custom.params(kind)
    h, biased = config.hidden, not config.gated
    if kind == "embedding":
        return Params(dense=config.vocab * h, whole=config.seq * h if config.learned_positions else 0)
    if kind == "head":
        return Params(dense=config.vocab * h, whole=(2 if biased else 1) * h)
    attention = _attention_params(config)
    matrices = 3 if config.gated else 2
    norms = (4 if biased else 2) * h
    if kind == "dense":
        bias = config.ffn + h + config.heads * config.head_dim * 3 + h if biased else 0
        return Params(dense=attention + matrices * h * config.ffn, whole=norms + bias)
    moe = config.experts()
    return Params(dense=attention + matrices * h * moe.shared_ffn, expert=moe.experts * matrices * h * moe.ffn,
                  whole=norms + h * moe.experts)


def _attention_params(config: ModelConfig) -> float:
    h, a = config.hidden, config.heads
    if config.latent is None:
        return h * config.head_dim * (2 * a + 2 * config.kv_heads)
    m = config.latent
    query = h * m.q_rank + m.q_rank * a * (m.nope_dim + m.rope_dim) if m.q_rank else h * a * (m.nope_dim + m.rope_dim)
    return query + h * (m.kv_rank + m.rope_dim) + m.kv_rank * a * (m.nope_dim + m.value_dim) + a * m.value_dim * h


# ModelConfig field -> attribute names of transformers configurations, first found wins.
_ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "hidden": ("hidden_size", "n_embd", "d_model"), "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "heads": ("num_attention_heads", "n_head", "num_heads"), "vocab": ("vocab_size",),
    "kv_heads": ("num_key_value_heads",), "head_dim": ("head_dim",), "ffn": ("intermediate_size", "n_inner", "ffn_dim"),
    "tied": ("tie_word_embeddings",), "seq": ("max_position_embeddings", "n_positions", "n_ctx"),
}
_EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts")
_GATED = ("silu", "swish", "swiglu", "geglu", "gelu_pytorch_tanh")


def from_transformers(config: Any, seq: int | None = None, dtype: str = "bf16") -> ModelConfig:
    """A ModelConfig from a transformers configuration object, by attribute names (nothing is imported).

    `seq` overrides the configured maximum length. Raises ValueError, naming the attributes looked for, when a size is
    missing.
    """
    found: dict[str, Any] = {}
    for field, names in _ATTRIBUTES.items():
        value = next((getattr(config, n) for n in names if getattr(config, n, None) is not None), None)
        if value is not None:
            found[field] = value
        elif field in ("hidden", "layers", "heads", "vocab") or (field == "seq" and seq is None):
            raise ValueError(f"{type(config).__name__} has none of {', '.join(names)}: cannot find the model's {field}")
    found["seq"] = seq or found["seq"]
    learned = hasattr(config, "n_positions") or getattr(config, "position_embedding_type", "") == "absolute"
    activation = getattr(config, "hidden_act", None) or getattr(config, "activation_function", "gelu")
    latent = None
    if getattr(config, "kv_lora_rank", None):
        latent = LatentAttention(config.q_lora_rank or 0, config.kv_lora_rank, config.qk_rope_head_dim, config.qk_nope_head_dim,
                                 config.v_head_dim)
        found.pop("head_dim", None)
        found["head_dim"] = config.v_head_dim
    model = ModelConfig(name=str(getattr(config, "model_type", type(config).__name__)), dtype=dtype, latent=latent,
                        rotary=not learned,
                        learned_positions=learned, gated=activation in _GATED and not learned, **found)
    experts = next((getattr(config, n) for n in _EXPERTS if getattr(config, n, None)), 0)
    if not experts:
        return model
    expert_ffn = getattr(config, "moe_intermediate_size", None) or model.ffn
    shared = (getattr(config, "n_shared_experts", None) or 0) * expert_ffn
    return replace(model, moe=MixtureOfExperts(experts, config.num_experts_per_tok, expert_ffn, shared,
                                               getattr(config, "first_k_dense_replace", 0) or 0))
